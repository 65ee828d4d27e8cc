"""What we do beyond the public surface of a library stands in one room of a wing, and nowhere else."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.warm import ROOT

ROOMS = {ROOT / "inference/private_surfaces.py", ROOT / "training/private_surfaces.py"}
INTERNALS = {
    "bit16_groups", "buffered_allreduce_fallback", "checkpoint_event_epilogue", "checkpoint_event_prologue",
    "default_pg_timeout", "distributed_c10d", "ds_id", "ds_shape", "ds_status", "ds_tensor", "fp16_groups",
    "fp32_groups_flat_partition", "fp32_partitioned_groups_flat", "fragment_address", "loss_scaler",
    "overflow_checker", "single_partition_of_fp32_groups", "__compatible_ops__",
}  # fmt: skip
"""Names without an underscore that no library promises."""
PUBLIC = {"_exit", "_replace"}
"""Names with an underscore that Python's own documentation promises: of os, and of named tuples."""


MAYBE = re.compile(r"(?<!self\.)(?<!cls\.)(?<!def )\b_[A-Za-z]|torch\.ops|" + "|".join(INTERNALS))
"""In every file that has a private use, and in few others: to parse takes long."""


def is_private(name: str) -> bool:
    return name in INTERNALS or (name.startswith("_") and not name.startswith("__") and name not in PUBLIC | {"_"})


def private_uses(source: str) -> Iterator[str]:
    """Line and expression of each attribute that is not a module's own: private of another object, or imported so."""
    for node in ast.walk(ast.parse(source)) if MAYBE.search(source) else ():
        if isinstance(node, ast.Attribute) and (is_private(node.attr) or ast.unparse(node) == "torch.ops"):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") and node.attr not in INTERNALS
            if not own:
                yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from (f"line {node.lineno}: import of {part}" for part in parts if is_private(part))
        elif isinstance(node, ast.Import):
            parts = [part for alias in node.names for part in alias.name.split(".")]
            yield from (f"line {node.lineno}: import of {part}" for part in parts if is_private(part))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)):
                yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("wing", ["applications", "training", "inference"])
def test_only_the_rooms_go_behind_a_library(wing):
    found = {
        str(file.relative_to(ROOT)): uses
        for file in sorted((ROOT / wing).rglob("*.py"))
        if file not in ROOMS and (uses := list(private_uses(file.read_text())))
    }
    assert not found, f"put these into private_surfaces.py, with a reason and a test: {found}"


@pytest.mark.parametrize(
    "source",
    [
        "engine.optimizer._update_scale(True)",
        "from torch._dynamo import config",
        "import torch._inductor",
        "import multiprocessing.util, torch._C",
        "getattr(model, '_tied_weights_keys', None)",
        "parameter.ds_tensor.data",
        "hasattr(parameter, 'ds_shape')",
        "torch.ops.mkldnn",
        "self.ds_tensor",
        "self.engine._config",
    ],
)
def test_a_private_use_is_seen(source):
    assert list(private_uses(source))


def test_ones_own_and_documented_names_are_not():
    assert not list(private_uses("self._a = cls._b; os._exit(0); row._replace(x=1); x.__dict__; from torch import nn"))
