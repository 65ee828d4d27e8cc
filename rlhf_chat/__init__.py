"""The name under which rlhf-chat is imported and started; with it, its three packages are its own.

`applications`, `training` and `inference` are names that others use too: on PYTHONPATH or in the working directory they
would come first. After `import rlhf_chat` these three are those beside it, in this process; all other names, and
`sys.path`, stay as they are. Every command and script imports it before anything else.

Programs and notebooks have `load_settings`, `train` and `Run` from it (docs/python.md), imported when they are used.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from applications.from_python import Run, Settings, StageFailed, Training, UserError, load_settings, train

__all__ = ["Run", "Settings", "StageFailed", "Training", "UserError", "load_settings", "train"]

PACKAGES = ("applications", "training", "inference")
HOME = Path(__file__).resolve().parent.parent
"""Where they lie."""
EXIT_CLASH = 2


class OwnPackages:
    """Finds the three packages, before all other finders."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(HOME)]) if name in PACKAGES else None


def refuse_clash() -> None:
    """End the process with a sentence where another package of these names has been imported already."""
    for name in PACKAGES:
        path = path_of(sys.modules.get(name))
        if path and path != HOME / name:
            end(f"{path} is imported as {name} already, which is the name of {HOME / name}: import rlhf_chat first.")


def refuse_other_copy(script: str) -> None:
    """End the process with a sentence where the file `script` is not of the rlhf-chat that Python imports."""
    if HOME not in (path := Path(script).resolve()).parents:
        end(
            f"{path} is not of the rlhf-chat that Python imports, {HOME}: start the script of that one, or install "
            f"the other in its place."
        )


def path_of(module: ModuleType | None) -> Path | None:
    """The folder of a package, or the file of a module that is none."""
    paths = [*getattr(module, "__path__", []), getattr(module, "__file__", None)]
    return Path(paths[0]).resolve() if paths[0] else None


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import applications.from_python

    return getattr(applications.from_python, name)


def end(sentence: str) -> NoReturn:
    print(f"rlhf-chat: {sentence}", file=sys.stderr)
    raise SystemExit(EXIT_CLASH)


def main() -> None:
    """The command `rlhf-chat`."""
    from applications.cli import main

    main()


refuse_clash()
sys.meta_path.insert(0, OwnPackages)
