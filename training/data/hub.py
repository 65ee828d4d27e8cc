"""A data set of the hub -> its data files on this machine, in the hub's own cache. Its code is never run."""

import re
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from inference.errors import UserError
from inference.model_store import hub_sentence
from training.data.find_files import choose_files, data_files, split_of
from training.data.sources import FILE_ENDINGS, PACKINGS

CONVERTED = "refs/convert/parquet"
"""The branch on which the hub keeps every data set that it could load, also those of loading scripts, as Parquet."""
ANY_FILE = tuple(f"*{ending}{packing}" for ending in FILE_ENDINGS for packing in ("", *PACKINGS))
TRAINING_FILES = tuple(f"*[tT][rR][aA][iI][nN]{pattern}" for pattern in ANY_FILE)
"""`*` stands for `/` too, so this covers files in a folder of that name, and some more."""


def fetch_files(
    name: str, repository: str, revision: str, patterns: tuple[str, ...], report: Callable[[str], None]
) -> tuple[list[Path], list[str]]:
    """The files of a data set's training rows, and where they are from, and which. `name` is what a user typed.

    Tried in turn: `patterns` (where the set is known), files of a training split, any data files, and the converted
    branch. Raises UserError with the way out.
    """
    report(f"Fetching {repository} from the Hugging Face hub; files that are already here are not loaded again.")
    tries = [(revision, patterns)] if patterns else [(revision, TRAINING_FILES), (revision, ANY_FILE)]
    if not revision:
        tries.append((CONVERTED, ("*/train/*.parquet", "*/partial-train/*.parquet")))
    for place, wanted in tries:
        directory, files = snapshot(name, repository, place, wanted)
        if wanted == TRAINING_FILES:
            files = [file for file in files if split_of(file.relative_to(directory)) == "train"]
        if not files:
            continue
        where = [f"revision {f'{CONVERTED} at ' if place == CONVERTED else ''}{directory.name[:12]}"]
        if place == CONVERTED:
            return one_configuration(repository, files), where
        files, read = (files, []) if patterns else choose_files(directory, files)
        return files, where + read
    raise UserError(
        f"{repository} has no data files that can be read here (it may be a loading script, which is never run): get "
        f"its rows as one of {', '.join(FILE_ENDINGS)}, and give --data {name}@FILE."
    )


def snapshot(name: str, repository: str, revision: str, patterns: tuple[str, ...]) -> tuple[Path, list[Path]]:
    """The directory of a commit, which it is named after, and the files that fit; none where a branch is not there."""
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
    """The data files in a directory whose relative path fits one of the patterns, in the order of their names."""
    return [
        file
        for file in data_files(directory)
        if any(fnmatch(file.relative_to(directory).as_posix(), pattern) for pattern in patterns)
    ]


def one_configuration(repository: str, files: list[Path]) -> list[Path]:
    """Of a converted data set the files of its only configuration, or of `default`. Raises UserError for several."""
    names = sorted({re.sub("^partial-", "", file.parent.parent.name) for file in files})
    if len(names) > 1 and "default" not in names:
        raise UserError(
            f"{repository} has several configurations ({', '.join(names[:5])}): download the one that you want with "
            f"hf download --repo-type dataset --revision {CONVERTED} {repository} --include '{names[0]}/*' "
            f"--local-dir DIR, and give --data DIR."
        )
    name = names[0] if len(names) == 1 else "default"
    return [file for file in files if file.parent.parent.name.removeprefix("partial-") == name]
