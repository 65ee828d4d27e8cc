"""What `inference` asks of torch, transformers and DeepSpeed beyond their public surface; no other module of it does.

Each function says why, and in which version it was read. `tests/inference/test_private_surfaces.py` asks the installed
libraries for each, and fails where one has changed it.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where a module keeps its hooks: DeepSpeed's hold the engine, which a copy of the module must not. torch 2.13.0."""

COMPILER = "torch._dynamo"
ITEMS = "torch._dynamo._trace_wrapped_higher_order_op"
MARKS = ("disable", "allow_in_graph", "assume_constant_result")


def attention_of(config: Any) -> str:
    """The name of the attention function that a model of this configuration calls. transformers 5.23.0."""
    return config._attn_implementation


def set_attention(config: Any, name: str) -> None:
    """Let the model call another one. The public `set_attn_implementation` goes over all modules, and we change it at
    each decode step. transformers 5.23.0."""
    config._attn_implementation = name


def goes_through_interface(model: nn.Module) -> bool:
    """Whether the family says that its attention goes through AttentionInterface. transformers 5.23.0."""
    return bool(getattr(model, "_supports_attention_backend", False))


def keeps_a_state(family: Any) -> bool:
    """Whether a class of models keeps a state instead of keys and values; nothing public says so. transformers
    5.23.0."""
    return family._is_stateful


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Under ZeRO 3 a parameter is empty between uses and keeps its shape aside. DeepSpeed 0.19.8."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def is_divided(parameter: nn.Parameter) -> bool:
    """Whether ZeRO 3 has divided a parameter over the ranks. DeepSpeed 0.19.8."""
    return hasattr(parameter, "ds_shape")


def put_plain_parameters(module: nn.Module) -> None:
    """Take out the dictionary that ZeRO 3 puts in place of a module's, which gathers what is read from it. torch 2.13.0
    keeps the parameters there."""
    module._parameters = dict(module._parameters)


def blocks_bf16() -> bool:
    """Whether oneDNN computes in bf16 on this processor; without AVX-512 it does not. torch 2.13.0."""
    return _onednn()._is_mkldnn_bf16_supported()


def in_blocked_order(weight: Tensor, rows: int) -> Tensor:
    """A linear layer's weight, (outputs, inputs), in the order that oneDNN likes for that many rows. Public functions
    make it again in each call. torch 2.13.0."""
    return _onednn()._reorder_linear_weight(weight, rows)


def linear_on_blocked() -> Callable[..., Tensor]:
    """(x, blocked weight, bias, "none", [], "") -> x weight^T + bias. torch 2.13.0."""
    return _onednn()._linear_pointwise.default


def linear_and_sum_on_blocked() -> Callable[..., Tensor]:
    """(x, other, blocked weight, None, "add") -> x weight^T + other. torch 2.13.0."""
    return _onednn()._linear_pointwise.binary


def softmax_backward(gradient: Tensor, weights: Tensor) -> Tensor:
    """The gradient of what the last dimension's softmax, `weights`, was taken of: in one pass, and in 16 bit with the
    sum in fp32. torch 2.13.0."""
    return torch.ops.aten._softmax_backward_data(gradient, weights, -1, weights.dtype)


def _onednn() -> Any:
    return torch.ops.mkldnn


def import_transformers_lightly() -> None:
    """Import what every family of transformers needs, in half the time, for a process that neither compiles nor
    distributes its model.

    transformers imports torch's compiler, for decorators and one class, and torch's distributed tensors and accelerate,
    to ask whether it has been given any. It also reads through the files of all its families twice, for names with
    `models.` before them and without. transformers 5.23.0, torch 2.13.0.
    """
    if "transformers.modeling_utils" in sys.modules or COMPILER in sys.modules:
        return
    for name in (COMPILER, ITEMS):
        sys.modules[name] = Deferred(name)
    import transformers.utils
    from transformers.utils import import_utils

    families = families_of_transformers()
    with patch.object(import_utils, "define_import_structure", lambda _: families):
        import_module("transformers.models")
    with ExitStack() as patches:
        for module in (transformers.utils, import_utils):
            for name in ("is_torch_distributed_available", "is_accelerate_available"):
                patches.enter_context(patch.object(module, name, lambda *_: False))
        for name in ("modeling_utils", "masking_utils", "modeling_layers", "generation.utils"):
            import_module(f"transformers.{name}")


def families_of_transformers() -> dict[frozenset[str], dict[str, set[str]]]:
    """What each family's files define, by the packages that they need: from what transformers has read, and remembers,
    with `models.` before the names. transformers 5.23.0."""
    from transformers.utils.import_utils import define_import_structure

    read = define_import_structure(Path(sys.modules["transformers"].__path__[0]) / "models", prefix="models")
    return {
        packages: {name.removeprefix("models."): made for name, made in files.items() if name.startswith("models.")}
        for packages, files in read.items()
    }


class Deferred(ModuleType):
    """Stands in for torch's compiler, or the one module of it that transformers takes a class from, until more of it is
    wanted than the marks that it puts on functions: they change nothing before something is compiled."""

    def __getattr__(self, name: str) -> Any:
        if self.__name__ == COMPILER:
            return leave_unmarked if name in MARKS else getattr(self._real(), name)
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **options: getattr(self._real(), name)(*arguments, **options)

    def _real(self) -> ModuleType:
        for name in (COMPILER, ITEMS):
            if isinstance(sys.modules.get(name), Deferred):
                del sys.modules[name]
        return import_module(self.__name__)


def leave_unmarked(function: Callable | None = None, *_: Any, **__: Any) -> Callable:
    return leave_unmarked if function is None else function
