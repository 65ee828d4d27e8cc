"""A path -> the data files that it means. Of a directory with splits only the training split is read."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

from inference.errors import UserError
from inference.model_store import hub_sentence
from training.data.entries import BadRow, LeftOut
from training.data.sources import FILE_ENDINGS, PACKINGS, ending

UNREAD = (".zst", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".rar")
"""Files that may hold data and are not read; of zip files those whose name does not say what is in them."""
PART = re.compile(r"(.*?)-?\d+(-of-0*(\d+)\..*)")
"""`train-00000-of-00002.parquet`, as `datasets` and the hub name the parts of a split."""
SAVED = "state.json"  # stands for the data set in its directory, where `Dataset.save_to_disk` wrote it
NOT_DATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json")
"""`datasets` and the hub write these beside the data."""
MORE = "(set|data|split|file|part|row)?s?"
TRAINING = re.compile(f"(train|training){MORE}")
HELD_OUT = re.compile(
    f"(validation|validate|valid|val|development|dev|testing|test|evaluation|eval|heldout|holdout){MORE}"
)
"""These are the words of `datasets` for its splits, and some more that people write."""
FILES_NAMED = 3


def find_files(path: Path) -> tuple[list[Path], list[str]]:
    """Find the data files that `path` means, sorted by name, and what a person should know about the choice.

    Raises UserError with the way out.
    """
    if not path.exists():
        raise UserError(
            f"There is no data source {path}: give a file, a directory, a data set of the hub as owner/name, or "
            f"'chitchat'."
        )
    kinds = ", ".join(FILE_ENDINGS)
    if not path.is_dir():
        if is_unread(path):
            raise UserError(f"{path} is packed in a way that is not read: unpack it, and give what was in it.")
        if ending(path) not in FILE_ENDINGS:
            raise UserError(
                f"{path} is none of {kinds} (also with {', '.join(PACKINGS)}): save the data in one of these."
            )
        return [path], []
    files = data_files(path)
    packed = list(filter(is_unread, sorted(path.rglob("*"))))
    unread = [f"{listed(path, packed)}: not read, unpack it first"] if packed else []
    if not files or (packed and all(split_of(file.relative_to(path)) == "held out" for file in files)):
        why = f"; {unread[0]}" if packed else ""
        raise UserError(f"The directory {path} has no data files to train on ({kinds}){why}; put the data there.")
    read, notes = choose_files(path, files)
    return read, notes + missing_parts(read) + unread


def is_unread(file: Path) -> bool:
    return ending(file) not in FILE_ENDINGS and (file.suffix.lower() in UNREAD or ending(file) in UNREAD)


def data_files(root: Path) -> list[Path]:
    """List all data files in a directory and its folders, in the order of their names, hidden ones aside.

    Of a folder of `Dataset.save_to_disk` it is SAVED alone: older files and caches may lie there too.
    """
    files = [
        file
        for file in sorted(root.rglob("*"))
        if file.is_file()
        and ending(file) in FILE_ENDINGS
        and file.name not in NOT_DATA
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
    ]
    saved = {file.parent for file in files if is_saved(file)}
    return [file for file in files if is_saved(file) or file.parent not in saved]


def is_saved(file: Path) -> bool:
    return file.name == SAVED and (file.parent / "dataset_info.json").exists()


def choose_files(root: Path, files: list[Path]) -> tuple[list[Path], list[str]]:
    """Choose the files to train on, and write a line that names what is read and what is not.

    These are the files of a training split; where there is none, those of no split. Of either the files right in
    `root`, or else those in its folders. Raises UserError where all are held out.
    """
    splits = {file: split_of(file.relative_to(root)) for file in files}
    wanted = "train" if "train" in splits.values() else ""
    read = [file for file in files if splits[file] == wanted]
    if not read:
        raise UserError(
            f"The directory {root} has only files that are named as validation or test data "
            f"({listed(root, files)}): to train on one of them, give that file itself."
        )
    read = [file for file in read if file.parent == root] or read
    left = [file for file in files if file not in read]
    why = ", as not of the training split" if any(splits[file] != wanted for file in left) else ""
    return read, [f"read: {listed(root, read)}" + (f"; not read{why}: {listed(root, left)}" if left else "")]


def missing_parts(files: list[Path]) -> list[str]:
    """Say which splits of several files are incomplete, by what the names of their parts say."""
    parts = Counter(match.groups() for file in files if (match := PART.fullmatch(str(file))))
    return [
        f"only {there} of {count} parts of {Path(name).name}"
        for (name, _, count), there in parts.items()
        if there < int(count)
    ]


def split_of(file: Path) -> str:
    """`train`, `held out` or neither, as `datasets` has it: a folder's name counts before the file's own.

    The innermost folder that says something counts. A name that says both is held out.
    """
    for name in [*reversed(file.parts[:-1]), file.name]:
        if any(map(HELD_OUT.fullmatch, words(name))):
            return "held out"
        if any(map(TRAINING.fullmatch, words(name))):
            return "train"
    return ""


def words(name: str) -> list[str]:
    """`hh_trainSet-01` has hh, train and set, and hhtrain and trainset, for people write `held_out` and `heldout`."""
    parts = [part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]
    return parts + [first + second for first, second in pairwise(parts)]


def listed(root: Path, files: Iterable[Path]) -> str:
    shown = [file.with_name("*.arrow") if is_saved(file) else file for file in files]
    names = [file.relative_to(root).as_posix() for file in shown]
    more = f" and {len(names) - FILES_NAMED} more" if len(names) > FILES_NAMED else ""
    return ", ".join(names[:FILES_NAMED]) + more


CONVERTED = "refs/convert/parquet"
"""The branch on which the hub keeps every data set that it could load, also those of loading scripts, as Parquet."""
ANY_FILE = tuple(f"*{ending}{packing}" for ending in FILE_ENDINGS for packing in ("", *PACKINGS))
TRAINING_FILES = tuple(f"*[tT][rR][aA][iI][nN]{pattern}" for pattern in ANY_FILE)
"""`*` stands for `/` too, so this covers files in a folder of that name, and some more."""


def fetch_files(
    name: str, repository: str, revision: str, patterns: tuple[str, ...], report: Callable[[str], None]
) -> tuple[list[Path], list[str]]:
    """Fetch the files of a data set's training rows, with where they are from, and which. `name` is what a user typed.

    Tried in turn: `patterns` (where the set is known), files of a training split, any data files, and the converted
    branch. Raises UserError with the way out.
    """
    report(f"Fetching {repository} from the Hugging Face hub; files that are already here are not loaded again.")
    tries = [(revision, patterns)] if patterns else [(revision, TRAINING_FILES), (revision, ANY_FILE)]
    if not revision:
        tries.append((CONVERTED, ("*/train/*.parquet", "*/partial-train/*.parquet")))
    for branch, wanted in tries:
        directory, files = snapshot(name, repository, branch, wanted)
        if wanted == TRAINING_FILES:
            files = [file for file in files if split_of(file.relative_to(directory)) == "train"]
        if not files:
            continue
        where = [f"revision {f'{CONVERTED} at ' if branch == CONVERTED else ''}{directory.name[:12]}"]
        if branch == CONVERTED:
            return one_configuration(repository, files), where
        files, read = (files, []) if patterns else choose_files(directory, files)
        return files, where + read
    raise UserError(
        f"{repository} has no data files that can be read here (it may be a loading script, which is never run): get "
        f"its rows as one of {', '.join(FILE_ENDINGS)}, and give --data {name}@FILE."
    )


def snapshot(name: str, repository: str, revision: str, patterns: tuple[str, ...]) -> tuple[Path, list[Path]]:
    """Fetch the directory of a commit, named after it, and the files that fit; none where a branch does not exist."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        directory = Path(
            huggingface_hub.snapshot_download(
                repository, repo_type="dataset", revision=revision or None, allow_patterns=list(patterns)
            )
        )
    except errors.RevisionNotFoundError:
        if revision == CONVERTED:
            return Path(), []
        raise UserError(f"{repository} has no revision '{revision}': give a branch, a tag or a whole commit.") from None
    except Exception as error:  # errors of the hub, of its HTTP library and of the disk
        copy = f"a copy: hf download --repo-type dataset {repository} --local-dir DIR, then --data {name}@DIR"
        raise UserError(hub_sentence(repository, error, "data set", copy)) from error
    return directory, matching(directory, patterns)


def matching(directory: Path, patterns: tuple[str, ...]) -> list[Path]:
    """List the data files in a directory whose relative path fits one of the patterns, sorted by name."""
    return [
        file
        for file in data_files(directory)
        if any(fnmatch(file.relative_to(directory).as_posix(), pattern) for pattern in patterns)
    ]


def one_configuration(repository: str, files: list[Path]) -> list[Path]:
    """Choose a converted data set's only configuration, or `default`. Raises UserError for several."""
    names = sorted({re.sub("^partial-", "", file.parent.parent.name) for file in files})
    if len(names) > 1 and "default" not in names:
        raise UserError(
            f"{repository} has several configurations ({', '.join(names[:5])}): download the one that you want with "
            f"hf download --repo-type dataset --revision {CONVERTED} {repository} --include '{names[0]}/*' "
            f"--local-dir DIR, and give --data DIR."
        )
    name = names[0] if len(names) == 1 else "default"
    return [file for file in files if file.parent.parent.name.removeprefix("partial-") == name]


Adapter = Callable[[dict[str, Any]], dict[str, Any]]  # a row of a set -> the same in one of TRL's formats

CITATION = re.compile(r"\s*\[\d+(?:,\s*\d+)*\]")
VICUNA_TURN = re.compile(r"(?:^|</s>|\s)\s*(USER|ASSISTANT):")
VICUNA_ROLES = {"USER": "user", "ASSISTANT": "assistant"}


@dataclass(frozen=True)
class HubSet:
    repository: str
    files: tuple[str, ...]
    """Patterns of the files with training rows. Empty: the repository is a loading script without data beside it."""
    seen: str  # the revision whose columns are written down here
    columns: tuple[str, ...]
    adapt: Adapter
    names: tuple[str, ...] = ()  # besides its repository


def follow(row: dict[str, Any], path: str) -> Any:
    """Return the value at `answers.ja.0.text`. Raises BadRow where a key is missing, LeftOut where it has no value."""
    value: Any = row
    for part in path.split("."):
        if part.isdigit():
            if not isinstance(value, list):
                raise BadRow(f"'{path}' is not a list")
            value = value[int(part)] if int(part) < len(value) else None
        elif not isinstance(value, dict) or part not in value:
            raise BadRow(f"there is no '{path}'")
        else:
            value = value[part]
        if value is None or value == "":
            raise LeftOut(f"'{path}' is empty in the set")
    return value


def renamed(paths: dict[str, str]) -> Adapter:
    return lambda row: {key: follow(row, path) for key, path in paths.items()}


def columns_set(repository: str, files: tuple[str, ...], seen: str, *names: str, **paths: str) -> HubSet:
    """Make a set whose columns only have other names: `prompt="INSTRUCTION"`."""
    columns = tuple(dict.fromkeys(path.partition(".")[0] for path in paths.values()))
    return HubSet(repository, files, seen, columns, renamed(paths), names)


def from_speakers(row: dict[str, Any]) -> dict[str, Any]:
    """Answers that begin with `Assistant:`, under a prompt that ends before it."""
    prompt = follow(row, "prompt")
    if prompt.lstrip().startswith("Human:"):
        prompt = f"{prompt.rstrip()}\n\nAssistant:"
    answers = {key: follow(row, key).strip().removeprefix("Assistant:") for key in ("chosen", "rejected")}
    return {"prompt": prompt, **answers}


def from_scores(row: dict[str, Any]) -> dict[str, Any]:
    """Two answers with scores; citations such as [1] name pages that the model does not see, and go."""
    answers = [CITATION.sub("", follow(row, f"answer_{i}")) for i in (0, 1)]
    scores = [float(follow(row, f"score_{i}")) for i in (0, 1)]
    if scores[0] == scores[1]:
        raise LeftOut("both answers have the same score")
    better = int(scores[1] > scores[0])
    return {
        "prompt": follow(row, "question.full_text"),
        "chosen": answers[better],
        "rejected": answers[1 - better],
        "margin": abs(scores[1] - scores[0]),
    }


def from_label(row: dict[str, Any]) -> dict[str, Any]:
    """Read comments A and B; `labels` is 1 where A is preferred."""
    label = follow(row, "labels")
    if label not in (0, 1):
        raise BadRow(f"'labels' is {str(label)[:20]}, not 0 or 1")
    better, worse = ("A", "B") if label == 1 else ("B", "A")
    return {
        "prompt": follow(row, "history"),
        "chosen": follow(row, f"human_ref_{better}"),
        "rejected": follow(row, f"human_ref_{worse}"),
    }


def from_vicuna(row: dict[str, Any]) -> dict[str, Any]:
    """`USER: ... ASSISTANT: ...</s>USER: ... ASSISTANT:`, the answer in `label`; before it perhaps a system text."""
    parts = VICUNA_TURN.split(follow(row, "prompt"))
    texts = [text.removesuffix("</s>").strip() for text in parts[::2]]
    messages = [{"role": "system", "content": texts[0]}] if texts[0] else []
    messages += [{"role": VICUNA_ROLES[r], "content": t} for r, t in zip(parts[1::2], texts[1:], strict=True)]
    if len(parts) == 1:
        messages = [{"role": "user", "content": texts[0]}]
    elif not texts[-1]:  # where the answer is to stand
        messages.pop()
    return {"prompt": messages, "response": follow(row, "label").strip().removesuffix("</s>")}


TRAIN = ("data/train-*.parquet",)
PAIR = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
MIRACL = {"prompt": "query", "chosen": "positive_passages.0.text", "rejected": "negative_passages.0.text"}

HUB_SETS = (
    columns_set("Dahoas/rm-static", TRAIN, "64fd53cc91f7cb73b283a6e4f661205e277d23c9", **PAIR),
    columns_set("Dahoas/full-hh-rlhf", TRAIN, "273ff2a", **PAIR),
    columns_set("Dahoas/synthetic-instruct-gptj-pairwise", TRAIN, "cc92d8d", **PAIR),
    HubSet("yitingxie/rlhf-reward-datasets", TRAIN, "eaf94e8", tuple(PAIR), from_speakers),
    HubSet(
        "openai/webgpt_comparisons",
        (),
        "f30e1bd2f0a51535b493de36d3686cfcfff47abe",
        ("question", "answer_0", "answer_1", "score_0", "score_1"),
        from_scores,
    ),
    HubSet(
        "stanfordnlp/SHP",
        ("*/train.json",),
        "e94b5f32602712d78ed494fe79105b1959396686",
        ("history", "human_ref_A", "human_ref_B", "labels"),
        from_label,
    ),
    HubSet(
        "pvduy/sharegpt_alpaca_oa_vicuna_format",
        TRAIN,
        "37b38dcfe4019b1bbebe6a91b04bab40d3978380",
        ("prompt", "label"),
        from_vicuna,
        ("sharegpt_alpaca_oa_vicuna",),
    ),
    columns_set("wangrui6/Zhihu-KOL", TRAIN, "fb4a72c", prompt="INSTRUCTION", response="RESPONSE"),
    columns_set("Hello-SimpleAI/HC3-Chinese", ("all.jsonl",), "09a687b", prompt="question", response="human_answers.0"),
    columns_set("apple/mkqa", (), "3251318", "mkqa-Chinese", prompt="queries.zh_cn", response="answers.zh_cn.0.text"),
    columns_set("apple/mkqa", (), "3251318", "mkqa-Japanese", prompt="queries.ja", response="answers.ja.0.text"),
    columns_set("lmqg/qg_jaquad", ("data/processed/train*.jsonl",), "3fef4e9", prompt="question", response="sentence"),
    columns_set(
        "lmqg/qag_jaquad", ("data/processed/train*.jsonl",), "1382b50", prompt="questions.0", response="paragraph"
    ),
    columns_set("Cohere/miracl-zh-queries-22-12", TRAIN, "125f282", **MIRACL),
    columns_set("Cohere/miracl-ja-queries-22-12", TRAIN, "46d49461b36bf03945d8ced94b62f7a90bc9acae", **MIRACL),
)


def find_set(name: str) -> HubSet | None:
    """Find the set of this name; upper and lower case are alike."""
    return next((hub_set for hub_set in HUB_SETS if name.lower() in all_names(hub_set)), None)


def all_names(hub_set: HubSet) -> tuple[str, ...]:
    """List a set's names in lower case. A repository with several sets in it does not name one of them."""
    shared = sum(other.repository == hub_set.repository for other in HUB_SETS) > 1
    return tuple(name.lower() for name in (*(() if shared else (hub_set.repository,)), *hub_set.names))


def same(row: dict[str, Any]) -> dict[str, Any]:
    return row


PLAIN = HubSet("", (), "", (), same)  # any other data, in one of TRL's formats
