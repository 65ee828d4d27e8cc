"""A GPU that is not there: shapes and devices are computed, no numbers. What mixes devices fails, and so does each look
at a number that lies on the GPU: there it would make the host wait."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from inference.generation import attention, passes

CUDA = torch.device("cuda:0")


@contextmanager
def pretended_cuda(*modules: nn.Module, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Inside, the modules lie on `CUDA`, and what is made there is without numbers; for good, so give it copies."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for module in modules:
        moved: dict[int, Any] = {}
        for part in module.modules():
            for kept in (part._parameters, part._buffers):
                for name, tensor in kept.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in moved:
                        is_weight = isinstance(tensor, nn.Parameter)
                        shape = torch.empty(tensor.shape, dtype=dtype if is_weight else tensor.dtype, device="meta")
                        fake = FakeTensor(mode, shape, CUDA)  # without CUDA there are no gradients
                        moved[id(tensor)] = nn.Parameter(fake, requires_grad=False) if is_weight else fake
                    kept[name] = moved[id(tensor)]
    with (
        patch.object(passes, "addresses", lambda passes: ()),
        patch.object(attention, "has_flash_attention", lambda device: True),
        mode,
        Indexing(),
    ):
        yield


WRITES = {Tensor.copy_: torch.ops.aten.copy, Tensor.masked_fill_: torch.ops.aten.masked_fill}
"""What looks at devices in the same way and writes nothing."""
READS = {Tensor.__invert__: torch.ops.aten.logical_not, Tensor.contiguous: torch.ops.aten.clone}


class Indexing(TorchFunctionMode):
    """Square brackets on such tensors, which a torch without CUDA refuses, as the operators that they stand for."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in WRITES and args[0].is_cuda:
            WRITES[function](*args)
            return args[0]
        if function in READS and args[0].is_cuda:
            return READS[function](args[0])
        if function not in (Tensor.__getitem__, Tensor.__setitem__) or not args[0].is_cuda:
            return function(*args, **(kwargs or {}))
        view, places = viewed(*args[:2])
        if function is Tensor.__getitem__:
            return torch.ops.aten.index(view, places) if places else view
        value = args[2] if isinstance(args[2], Tensor) else torch.full((), args[2], dtype=view.dtype, device=CUDA)
        return torch.ops.aten.index_put_(view, places, value) if places else torch.ops.aten.copy(view, value)


def viewed(tensor: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """What ints, slices and None leave of a tensor, and the places that are tensors, dimension by dimension."""
    index = index if isinstance(index, tuple) else (index,)
    if Ellipsis in [each for each in index if not isinstance(each, Tensor)]:
        at = next(i for i, each in enumerate(index) if each is Ellipsis)
        rest = tensor.ndim - sum(each is not None and each is not Ellipsis for each in index)
        index = (*index[:at], *[slice(None)] * rest, *index[at + 1 :])
    places: list[Tensor | None] = []
    for each in index:
        if each is None:
            tensor = tensor.unsqueeze(len(places))
        elif isinstance(each, int):
            tensor = tensor.select(len(places), each)
            continue
        elif isinstance(each, slice):
            start, stop, step = each.indices(tensor.shape[len(places)])
            tensor = torch.ops.aten.slice(tensor, len(places), start, max(start, stop), step)
        else:
            places.append(each if isinstance(each, Tensor) else torch.tensor(each).to(tensor.device))
            continue
        places.append(None)
    return tensor, places if any(each is not None for each in places) else []
