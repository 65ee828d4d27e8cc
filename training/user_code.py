"""A Python file of the user's, run inside our process as `python mine.py` would run it."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType


class UserFile:
    """`load` it, and call what is in it inside `running`."""

    def __init__(self, file: Path):
        self.file = file.absolute()
        self.folder = str(file.resolve().parent)
        self.directory = os.getcwd()
        """Where its code works: it may go elsewhere, and we do not go with it."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, what lies in the file's folder can be imported, and the working directory is that of its code."""
        ours = os.getcwd()
        sys.path.insert(0, self.folder)
        os.chdir(self.directory)
        try:
            yield
        finally:
            self.directory = os.getcwd()
            os.chdir(ours)
            if self.folder in sys.path:
                sys.path.remove(self.folder)

    def load(self) -> ModuleType:
        """The module, which dataclasses, pickle and pools of processes find by its name. Raises what its code raises,
        KeyboardInterrupt and SystemExit included.
        """
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
        """The file's own, unless something else that can be imported has it."""
        name = self.file.stem
        other = f"reward_file_{name.replace('.', '_')}"
        if "." in name:
            return other
        if name in sys.modules:
            return name if getattr(sys.modules[name], "__file__", None) == str(self.file) else other
        found = importlib.util.find_spec(name)
        return name if found is None or found.origin == str(self.file) else other
