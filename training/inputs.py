"""What a run was made from, as it was then: files that change later are named, for the run does not read them again."""

import ast
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import suppress
from fnmatch import fnmatch
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from inference.disk import writing
from inference.errors import UserError
from inference.model_store import PICKLES, SAFETENSORS, TEXT_FILES, Report, check_model_directory, resolve_model
from training.config import RunConfig
from training.data.sources import parse_source
from training.data_settings import EMBEDDED_DATA
from training.formulas.tables import own_files
from training.lineage import base_model, reward_model_before
from training.run_directory import RunDirectory, read_json, write_directory, write_json

LARGE = 2**28
"""Bytes from which size and time of a file stand for its content; a smaller one is read, a tenth of a second each."""
CODE = ("reward_function", "formulas")  # kinds of inputs that are Python files of the user's
CONSEQUENCES = {
    "data": "the run keeps its rows (a new run trains on the new ones)",
    "models": "steps that are done keep what they made of the old one",
    "reward_function": "iterations from now on are rewarded by the new one",
    "formulas": "what is trained from now on is trained by the new one",
}
"""Kind of an input -> what its change means for the run."""

Print = dict[str, Any]  # size and time of a file, and a hash of its content (empty for a large one)


def inputs_of(config: RunConfig) -> dict[str, dict[str, dict[str, Print]]]:
    """Kind -> path as the settings have it -> name in it -> Print. Only what lies on this machine by path is there."""
    return {
        kind: {
            str(path): {name: print_of(file) for name, file in files_of(kind, path)} for path in dict.fromkeys(paths)
        }
        for kind, paths in paths_of(config).items()
        if paths
    }


def changed_inputs(run: RunDirectory, config: RunConfig) -> list[str]:
    return [f"{path} has changed since the run was prepared; {CONSEQUENCES[kind]}." for kind, path in changes(run)]


def changes(run: RunDirectory) -> Iterator[tuple[str, str]]:
    """Yield kind and path of inputs that are not as they were; what is gone is no news, and old runs say nothing."""
    if not run.inputs_file.exists():
        return
    for kind, paths in read_json(run.inputs_file, "delete it, then changes of the run's data are not noticed").items():
        for path, prints in paths.items():
            now = dict(files_of(kind, Path(path), prints))
            if now and (now.keys() != prints.keys() or any(differs(file, prints[name]) for name, file in now.items())):
                yield kind, path


def paths_of(config: RunConfig) -> dict[str, list[Path]]:
    own = [] if config.data.source == EMBEDDED_DATA else config.data.sources
    mixed = [config.rlhf.ptx.source] if config.rlhf.ptx.coefficient and config.rlhf.ptx.source else []
    sources = [parse_source(text) for text in (*own, *config.data.eval_sources, *mixed)]
    models = [config.model, config.reward_model, config.sft_model, config.trained_reward_model]
    models.append(config.reference_model)
    return {
        "data": [source.copy or source.path for source in sources if (source.copy or source.path).exists()],
        "models": [Path(name) for name in models if Path(name).is_absolute()],
        "reward_function": [spec.file for spec in config.rlhf.reward_functions if spec.file],
        "formulas": [path for _, path in own_files(config)],
    }


def files_of(kind: str, path: Path, before: Collection[str] | None = None) -> Iterator[tuple[str, Path]]:
    """Yield names and files of an input; of code those in `before`, where they are known."""
    if kind not in CODE:
        yield from files_in(path)
        return
    path = path.resolve()  # what lies beside the file itself is imported
    for file in sorted(with_imports(path)):
        name = str(file.relative_to(path.parent))
        if before is None or name in before:
            yield name, file


def code_of(config: RunConfig, kind: str) -> dict[str, str]:
    """Hash the files of a kind of CODE by SHA-256, by name."""
    return {name: print_of(file)["content"] for name, file in code_files(config, kind)}


def code_files(config: RunConfig, *kinds: str) -> list[tuple[str, Path]]:
    """List names and files of the user's code, of these kinds."""
    return [named for kind in kinds for path in paths_of(config)[kind] for named in files_of(kind, path)]


def with_imports(file: Path, known: frozenset[Path] = frozenset()) -> frozenset[Path]:
    """Find a Python file, if it exists, and the modules beside it that it imports, or that these import."""
    if file in known or not file.is_file():
        return known
    known |= {file}
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return known
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{name}" for name in names]
        for parts in (name.split(".") for name in names):
            for path in (file.parent.joinpath(*parts[: i + 1]) for i in range(len(parts))):  # packages run too
                modules = [Path(f"{path}{suffix}") for suffix in (".py", *EXTENSION_SUFFIXES)]
                for module in (*modules, path / "__init__.py"):
                    known = with_imports(module, known)
    return known


def files_in(path: Path) -> Iterator[tuple[str, Path]]:
    """Yield names and files: the file itself, or those in the directory and its folders, hidden ones aside."""
    if path.is_file():
        yield path.name, path
    for file in sorted(path.rglob("*")) if path.is_dir() else []:
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            yield str(name), file


def print_of(file: Path) -> Print:
    status = file.stat()
    content = hashlib.sha256(file.read_bytes()).hexdigest() if status.st_size < LARGE else ""
    return {"size": status.st_size, "time": status.st_mtime_ns, "content": content}


def differs(file: Path, before: Print) -> bool:
    """Whether the content is another. A file that was only touched or copied is the same."""
    status = file.stat()
    if status.st_size != before["size"]:
        return True
    if status.st_mtime_ns == before["time"]:
        return False
    return not before["content"] or print_of(file)["content"] != before["content"]


NOTICES = ("LICENSE*", "NOTICE*", "README.md")


def stored_model(run: RunDirectory, source: str) -> Path:
    """Return the directory where the run stores the model `source`, if it does."""
    return run.path / "models" / re.sub(r"[^\w.=-]+", "--", source.removeprefix("package:"))


def local_model(run: RunDirectory, source: str, report: Report = print) -> Path:
    """Find the local directory of `source`: the run's own where it stores one, else that of `resolve_model`."""
    stored = stored_model(run, source)
    if not source or not stored.is_dir():
        return resolve_model(source, report)
    check_model_directory(stored)
    return stored


def models_of(config: RunConfig) -> list[str]:
    """List the models that the steps of a run, its comparison and its judges load and that none of its steps makes."""
    return list(
        dict.fromkeys(
            source
            for source in (
                config.actor_source,
                config.scorer_source if config.needs_scorer else "",
                config.trained_reward_model,
                config.reference_model,
                base_model(config),
                reward_model_before(config),
            )
            if source
        )
    )


def store_models(run: RunDirectory, config: RunConfig, report: Report) -> None:
    """Put the models that do not lie where the user said into the run. Those of a directory stay there."""
    for source in models_of(config):
        stored = stored_model(run, source)
        if Path(source).is_absolute():
            continue
        with suppress(UserError):  # not there, or not whole
            check_model_directory(stored)
            continue
        directory = resolve_model(source, report)

        def write(target: Path, directory: Path = directory) -> None:
            for file in files_of_model(directory):
                link_or_copy(file, target / file.name)

        with writing(f"the model {source}", run.path):
            write_directory(stored, write)


def files_of_model(directory: Path) -> list[Path]:
    """List configuration, tokenizer, one form of the weights, licences."""
    files = [file for file in sorted(directory.iterdir()) if file.is_file()]
    safe = [file for file in files if any(fnmatch(file.name, pattern) for pattern in SAFETENSORS)]
    wanted = (*TEXT_FILES, *NOTICES, *(SAFETENSORS if safe else PICKLES))
    return [file for file in files if any(fnmatch(file.name, pattern) for pattern in wanted)]


def link_or_copy(file: Path, target: Path) -> None:
    """Link a file of the user's on the same disk, so that weights take no room twice; copy any other."""
    file = file.resolve()  # the hub's cache holds links to it
    try:
        if file.stat().st_uid != os.getuid():
            raise PermissionError
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def name_base(directory: Path, old: Path, new: Path) -> None:
    """Rename the bases of the adapters in `directory`, which are full paths, from `old` to `new`."""
    for file in directory.rglob("adapter_config.json"):
        values = json.loads(file.read_text(encoding="utf-8"))
        base = Path(values["base_model_name_or_path"] or "/").resolve()
        if base.is_relative_to(old.resolve()):
            base = new.resolve() / base.relative_to(old.resolve())
            write_json(file, values | {"base_model_name_or_path": str(base)})
