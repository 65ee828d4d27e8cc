"""A path -> the data files that it means. Of a directory with splits only the training split is read."""

import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from inference.errors import UserError
from training.data.sources import FILE_ENDINGS, PACKINGS, ending

UNREAD = (".zst", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".rar")
"""Files that may hold data and are not read; of zip files those whose name does not say what is in them."""
PART = re.compile(r"(.*?)-?\d+(-of-0*(\d+)\..*)")
"""`train-00000-of-00002.parquet`, as `datasets` and the hub name the parts of a split."""
SAVED = "state.json"
"""Stands for the data set in its directory, where `Dataset.save_to_disk` wrote it."""
NOT_DATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json")
"""What `datasets` and the hub write beside the data."""
MORE = "(set|data|split|file|part|row)?s?"
TRAINING = re.compile(f"(train|training){MORE}")
HELD_OUT = re.compile(
    f"(validation|validate|valid|val|development|dev|testing|test|evaluation|eval|heldout|holdout){MORE}"
)
"""The words of `datasets` for its splits, and some more that people write."""
FILES_NAMED = 3


def find_files(path: Path) -> tuple[list[Path], list[str]]:
    """The data files that `path` means, in the order of their names, and what a person should know about the choice.

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
    """All data files in a directory and its folders, in the order of their names, hidden ones aside.

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
    """The files to train on, and a line that names what is read and what is not.

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
    """Which splits of several files are not there as a whole, by what the names of their parts say."""
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
        found = words(name)
        if any(map(HELD_OUT.fullmatch, found)):
            return "held out"
        if any(map(TRAINING.fullmatch, found)):
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
