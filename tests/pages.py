"""What the pages (README.md, docs, benchmarks/README.md) claim, checked against the code without running any of it.

Each `wrong_...` function takes a page's text and returns a sentence for each claim that does not hold.
"""

import ast
import re
import shlex
import tomllib
from functools import cache
from itertools import pairwise, product
from pathlib import Path

from typer import BadParameter
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from applications.cli import app
from applications.preset_store import settings_for_model
from inference.errors import UserError
from training.config_files import load_config, setting_keys
from training.formulas.table import OWN
from training.formulas.tables import TABLES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
WINGS = ("rlhf_chat", "applications", "training", "inference", "benchmarks", "tests")
STAGE_OPTIONS = ROOT / "training" / "stage_script.py"
Refused: type[Exception] = BadParameter.__mro__[1]
"""What the command line's parser raises: typer exports only this one kind of it."""
EXAMPLES = re.compile(r"path/to/.*|(my/.*|mine|my)\b.*|runs/\w+/config\.yaml")
"""Files and models that a reader has."""
NAMES_OF_LIBRARIES = {"save_to_disk", "load_dataset", "from_file"}
FOREIGN = {
    "other_tools.md": r"^\|.*\|(?=[^|]+\|$)",
}
"""Columns with the words of other tools."""


def own_words(page: Path) -> str:
    """A page without the columns that are not ours."""
    text = page.read_text(encoding="utf-8")
    return re.sub(FOREIGN[page.name], "|", text, flags=re.MULTILINE) if page.name in FOREIGN else text


def blocks(text: str, *languages: str) -> list[str]:
    """Contents of the fenced blocks in these languages (`""`: those that name none)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [content for language, content in found if language in languages]


def spans(text: str) -> list[str]:
    """What stands between single backticks outside of fenced blocks."""
    return re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))


def commands(text: str) -> list[list[str]]:
    """The words of each command line: in fenced blocks all lines, between backticks what has arguments."""
    lines = "\n".join(blocks(text, "", "bash")).replace("\\\n", " ").splitlines()
    lines += [" ".join(span.split()) for span in spans(text)]
    found = []
    for line in lines:
        for part in re.split(r" \| | && ", line):
            if re.match(r"(rlhf-chat|python|torchrun|deepspeed|srun|make|pip) \S", part):
                found.append(shlex.split(part, comments=True))
    return found


def wrong_commands(text: str) -> list[str]:
    """Command lines that would be refused: unknown commands, options, scripts, settings, presets, make targets."""
    return [f"{' '.join(words)}: {mistake}" for words in commands(text) if (mistake := mistake_of(words))]


def mistake_of(words: list[str]) -> str:
    """Why a command line would be refused; empty where it would not."""
    program, arguments = words[0], words[1:]
    if program == "rlhf-chat":
        return mistake_of_rlhf_chat(arguments)
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        asked = {argument for argument in arguments if "=" not in argument}  # not a variable
        return "" if asked <= set(targets) else "no such target"
    if program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = re.findall(r"\.\[(\w+)]", " ".join(arguments))
        return "" if set(asked) <= set(extras) else "no such extra"
    for place, word in enumerate(arguments):
        if word == "-m" and arguments[place + 1] == "rlhf_chat":
            return mistake_of_rlhf_chat(arguments[place + 2 :])
        if word == "-m" and arguments[place + 1].split(".")[0] in WINGS:
            script = ROOT / (arguments[place + 1].replace(".", "/") + ".py")
            return mistake_of_script(script, arguments[place + 2 :])
        if word.endswith(".py") and word.split("/")[0] in WINGS:
            return mistake_of_script(ROOT / word, arguments[place + 1 :])
    return ""


@cache
def root_command() -> TyperGroup:
    return get_command(app)


def mistake_of_rlhf_chat(arguments: list[str]) -> str:
    command, path = root_command(), []
    while isinstance(command, TyperGroup) and arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
        if name == "COMMAND":
            return ""
        if name not in command.commands:
            return f"no command {name}"
        command = command.commands[name]
        path.append(name)
    if not arguments or arguments in (["--help"], ["-h"]) or "..." in arguments:  # the command is only named
        return ""
    try:
        given = command.make_context(" ".join(path), list(arguments)).params
    except Refused as error:
        return error.format_message()
    return mistake_of_settings(given.get("model"), given.get("set_") or [], given.get("config") or [])


@cache
def command_names() -> list[str]:
    """`run`, ..., `data show`, ..."""
    names = []
    for name, command in root_command().commands.items():
        names += [f"{name} {below}" for below in command.commands] if isinstance(command, TyperGroup) else [name]
    return names


def command_named(name: str) -> TyperCommand:
    command = root_command()
    for part in name.split():
        command = command.commands[part]
    return command


def mistake_of_settings(model: str | None, overrides: list[str], files: list[Path]) -> str:
    """Of a preset's name, and of `--set`; directories, hub ids and files of the reader's own are taken as right."""
    try:
        named = bool(model) and "/" not in model and model not in ("M", "NAME", "base", "sft", "rlhf", "dpo")
        base = settings_for_model(model) if named else {"model": "tiny"}
        entries = {table.setting for table in TABLES}
        own = {each for each in overrides if each.partition("=")[0] in entries and OWN.fullmatch(each)}
        given = [f"{each}()" if each in own else each for each in overrides]
        load_config([ROOT / file for file in files if (ROOT / file).exists()], given, base)
    except UserError as error:
        return str(error)
    missing = [str(file) for file in files if not (ROOT / file).exists() and not EXAMPLES.fullmatch(str(file))]
    return f"no file {missing[0]}" if missing else ""


def mistake_of_script(script: Path, arguments: list[str]) -> str:
    """Of a module with an argparse parser of its own, or a stage script: they share theirs."""
    if not script.is_file():
        return f"no file {script.relative_to(ROOT)}"
    known = options_of(script) or options_of(STAGE_OPTIONS)
    for word in arguments:
        if word.startswith("--") and word.partition("=")[0] not in known:
            return f"no option {word}"
    files = [Path(value) for option, value in pairwise(arguments) if option == "--config"]
    return mistake_of_settings(None, [], files)


@cache
def options_of(script: Path) -> frozenset[str]:
    """Every option that the file adds to a parser."""
    calls = [node for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    added = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"]
    return frozenset(arg.value for call in added for arg in call.args if isinstance(arg, ast.Constant))


def wrong_options(text: str) -> list[str]:
    """Options that stand alone between backticks, or behind a command's name, and that nothing of ours takes.

    Those with an underscore are other tools'.
    """
    ours = {name: options_of_command(name) for name in command_names()}
    scripts = [options_of(script) for script in (STAGE_OPTIONS, *(ROOT / "benchmarks").glob("*.py"))]
    anywhere = frozenset().union(*ours.values(), *scripts)
    wrong = []
    for span in spans(text):
        command = span.partition(" --")[0]
        if span.startswith("--") or command in ours:
            known = ours.get(command, anywhere)
            wrong += [
                option for option in re.findall(r"(?<!\S)--[a-z][\w-]*", span) if option not in known | {"--help"}
            ]
    return [option for option in wrong if "_" not in option]


def options_of_command(name: str) -> frozenset[str]:
    return frozenset(option for each in command_named(name).params for option in (*each.opts, *each.secondary_opts))


def wrong_settings(text: str) -> list[str]:
    """Dotted settings between backticks, and behind `--set`, that do not exist."""
    known = set(setting_keys())
    groups = {key.split(".")[0] for key in known if "." in key} - {"architecture"}
    wrong = []
    for span in spans(text):
        if span.startswith("--set "):
            wrong += [mistake_of_settings(None, [word for word in shlex.split(span) if word != "--set"], [])]
        for token in re.findall(rf"(?<![\w./-])(?:{'|'.join(groups)})\.[\w.{{}},=*-]+", span):
            keys = [each.partition("=")[0] for each in unbraced(token.rstrip(","))]
            wrong += [key for key in keys if not is_setting(key, known) and not is_file_name(key)]
    return list(filter(None, wrong))


def is_setting(key: str, known: set[str]) -> bool:
    group = key.removesuffix("KEY").removesuffix("*").removesuffix(".")
    return group in known or ".deepspeed." in key


def unbraced(text: str) -> list[str]:
    """`a.{b,c}.*` -> `a.b.*`, `a.c.*`."""
    parts = [part.split(",") if place % 2 else [part] for place, part in enumerate(re.split(r"{([^{}]*)}", text))]
    return ["".join(chosen) for chosen in product(*parts)]


def is_file_name(text: str) -> bool:
    return bool(re.search(r"\.(py|jsonl?|ya?ml|md|html|parquet|csv|tsv|txt|svg|safetensors|gz)$", text))


def wrong_links(page: Path, text: str) -> list[str]:
    """Relative links whose file or anchor does not exist."""
    wrong = []
    for target in re.findall(r"]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        place = (page.parent / file).resolve() if file else page
        if not place.exists() or (anchor and anchor not in anchors(place.read_text(encoding="utf-8"))):
            wrong.append(target)
    return wrong


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def wrong_paths(text: str) -> list[str]:
    """Files of the repository that do not exist: `.py` anywhere, other paths between backticks.

    A path may leave out its first folders, where the page said them before.
    """
    tree = repository()
    wrong = [name for name in re.findall(r"(?<![\w./:-])[\w./-]*\w\.py\b", text) if not stands_in(name, tree)]
    for span in spans(text):
        if re.fullmatch(rf"({'|'.join(WINGS)})/[\w./*-]*", span) and not stands_in(span.rstrip("/"), tree):
            wrong.append(span)
    return [name for name in wrong if not EXAMPLES.fullmatch(name)]


def stands_in(name: str, tree: frozenset[str]) -> bool:
    name = name.removeprefix("../")
    if "*" in name:
        return any(ROOT.glob(name))
    return any(path == name or path.endswith(f"/{name}") for path in tree)


@cache
def repository() -> frozenset[str]:
    """All files and folders of the wings and the pages, as paths from the root."""
    places = [place for wing in (*WINGS, "docs") for place in (ROOT / wing, *(ROOT / wing).rglob("*"))]
    return frozenset(str(place.relative_to(ROOT)) for place in places if "__pycache__" not in place.parts)


def wrong_names(text: str) -> list[str]:
    """Names of code and keys between backticks that no file of the project has: `snake_case`, `CamelCase`,
    `CAPITALS`."""
    known = words_of_code()
    wrong = []
    for span in spans(text):
        bare = span.partition("(")[0].partition("=")[0]
        is_name = re.fullmatch(r"[A-Za-z]\w*(\.\w+)?", bare) and re.search(r"_|[a-z][A-Z]|^[A-Z]{3}", bare)
        if is_name and not is_file_name(bare):
            wrong += [span for word in bare.split(".") if word not in known | NAMES_OF_LIBRARIES]
    return wrong


def wrong_metrics(text: str) -> list[str]:
    """Metrics between backticks (`group/metric`, and what the tables of metrics begin with) that no trainer writes."""
    groups = {name.split("/")[0] for name in written_metrics() if "/" in name}
    named = [span for span in spans(text) if re.fullmatch(rf"({'|'.join(groups)})/\w[\w/]*", span)]
    for section in re.findall(r"^## Metrics$(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE):
        named += [name for row in re.findall(r"^\|([^|]*)\|", section, re.MULTILINE) for name in spans(row)]
    return sorted({name for name in named if name not in written_metrics() and not name.endswith("/...")})


@cache
def written_metrics() -> frozenset[str]:
    """Every metric that is written out as a whole where `training` makes it: as a key or value of a dictionary, as what
    is assigned to, as a phase that is timed."""
    found: set[str] = set()
    for file in (ROOT / "training").rglob("*.py"):
        code = file.read_text(encoding="utf-8")
        if not re.search(r'"[a-z]+/\w+"|"grad_norm"', code):  # parsing all takes seconds
            continue
        for node in ast.walk(ast.parse(code)):
            made: list[ast.AST | None] = []
            if isinstance(node, ast.Dict):
                made = [*node.keys, *node.values]
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                made = [node.slice]
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("fromkeys", "phase"):
                made = [each for argument in node.args for each in ast.walk(argument)]
            found |= {each.value for each in made if isinstance(each, ast.Constant) and isinstance(each.value, str)}
    return frozenset(found)


@cache
def words_of_code() -> frozenset[str]:
    """Every word in the source files, presets and packaged pages; not in the pages that are checked."""
    files = {file for wing in WINGS for file in (ROOT / wing).rglob("*") if file.suffix in (".py", ".yaml", ".html")}
    files -= {Path(__file__), ROOT / "tests" / "test_docs.py"}  # these have wrong ones
    return frozenset(word for file in files for word in re.findall(r"\w+", file.read_text(encoding="utf-8")))


def wrong_imports(text: str) -> list[str]:
    """`from X import Y` of the Python examples where X is ours and has no Y."""
    wrong = []
    for block in blocks(text, "python"):
        for node in ast.walk(ast.parse(block)):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] not in WINGS:
                continue
            file = ROOT / f"{(node.module or '').replace('.', '/')}.py"
            defined = names_defined(file) if file.is_file() else frozenset()
            wrong += [f"{node.module}.{alias.name}" for alias in node.names if alias.name not in defined]
    return wrong


def names_defined(file: Path) -> frozenset[str]:
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return frozenset(node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef))
