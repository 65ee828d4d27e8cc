"""A Python file of the user's, run inside our process as `python mine.py` would run it."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    PathFinder,
    SourceFileLoader,
)
from pathlib import Path
from types import CodeType, ModuleType

import torch

from inference.errors import UserError
from rlhf_chat import HOME, PACKAGES


class SourceLoader(SourceFileLoader):
    """Compiles the source itself: what lies in __pycache__ beside it may be made of another one."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


class UserFile:
    """`load` it, and call what is in it inside `running`."""

    def __init__(self, file: Path):
        self.file = file.absolute()
        self.folder = str(file.resolve().parent)
        self.surroundings = surroundings()
        """What its code works in: it may change them, and ours stay."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, what lies in the file's folder can be imported, the command line holds nothing but the file, and the
        surroundings are those of its code. Raises UserError where it needs a package that has the name of one of ours.
        """
        ours, arguments = surroundings(), sys.argv
        sys.path.insert(0, self.folder)
        sys.path_hooks.insert(0, self.finder)
        forget_finders(self.folder)
        sys.argv = [str(self.file)]
        surround(*self.surroundings)
        try:
            yield
        except (ImportError, AttributeError) as error:
            refuse_own_package(error)
            raise
        finally:
            with suppress(FileNotFoundError):  # of a directory that it went to and removed
                self.surroundings = surroundings()
            surround(*ours)
            sys.argv = arguments
            if self.folder in sys.path:
                sys.path.remove(self.folder)
            sys.path_hooks.remove(self.finder)
            forget_finders(self.folder)

    def finder(self, path: str) -> FileFinder:
        """Find sources and extensions in the file's folder, no compiled files. Raises ImportError for other paths."""
        inside = Path(path).resolve().is_relative_to(self.folder)
        if not inside or Path(path).is_relative_to(sys.prefix):  # an environment may lie in the folder
            raise ImportError(path)
        return FileFinder(path, (ExtensionFileLoader, EXTENSION_SUFFIXES), (SourceLoader, SOURCE_SUFFIXES))

    def load(self) -> ModuleType:
        """Load the module, which dataclasses, pickle and pools of processes find by its name. Raises what its code
        raises, KeyboardInterrupt and SystemExit included."""
        name = self._module_name()
        spec = ModuleSpec(name, None, origin=str(self.file), is_package=True)  # a package, so `from .` finds neighbours
        module = importlib.util.module_from_spec(spec)
        module.__file__, module.__path__ = str(self.file), [self.folder]
        sys.modules[name] = module
        try:
            with self.running():
                exec(compile(self.file.read_bytes(), str(self.file), "exec", dont_inherit=True), module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
        return module

    def _module_name(self) -> str:
        """Choose the file's own name, unless something else that can be imported has it."""
        name = self.file.stem
        other = f"user_file_{name.replace('.', '_')}"
        if "." in name:
            return other
        if name in sys.modules:
            return name if getattr(sys.modules[name], "__file__", None) == str(self.file) else other
        spec = importlib.util.find_spec(name)
        return name if spec is None or spec.origin == str(self.file) else other


def refuse_own_package(error: ImportError | AttributeError) -> None:
    """Raise UserError where `error` is that something is missing in a package of ours, and there is another of its name
    that was meant."""
    missed_in = getattr(error.obj, "__name__", "") if isinstance(error, AttributeError) else error.name
    name = (missed_in or "").partition(".")[0]
    others = [path for path in sys.path if Path(path).resolve() != HOME]
    theirs = PathFinder.find_spec(name, others) if name in PACKAGES else None
    if theirs is not None:
        paths = theirs.submodule_search_locations or [str(theirs.origin)]
        raise UserError(
            f"Your Python file asks for {name}, which here is rlhf-chat's own, {HOME / name}, and not {paths[0]}: "
            f"give your package another name."
        ) from error


def forget_finders(folder: str) -> None:
    """Clear what Python has cached of how modules in `folder` are found."""
    for path in [path for path in sys.path_importer_cache if path.startswith(folder)]:
        del sys.path_importer_cache[path]


def surroundings() -> tuple[str, bool, torch.dtype, torch.device]:
    """Read what code can change for a process: working directory, gradients, format and device of new tensors."""
    return os.getcwd(), torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()


def surround(directory: str, gradients: bool, dtype: torch.dtype, device: torch.device) -> None:
    os.chdir(directory)
    torch.set_grad_enabled(gradients)
    torch.set_default_dtype(dtype)
    if device != torch.get_default_device():
        torch.set_default_device(None if device.type == "cpu" else device)  # one that is set costs in every call
