"""DeepSpeed, imported the way this project needs it: every module takes it from here.

What ZeRO 3 divides never lies whole on a device: only the first rank reads the weights, into main memory and in the
number format that is computed with. The other ranks build the same model with uninitialised ones (memory that nobody
touches takes no room); each parameter travels from the first rank, and every rank keeps its part.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops  # noqa: F401  # what imports `deepspeed` from here asks it for its optimisers

from training.distributed import Ranks
from training.private_surfaces import (
    classes_in_checkpoints,
    count_zero_3_from,
    numbers_of_zero_3,
    without_shared_memory,
)

without_shared_memory(deepspeed)

__all__ = ["deepspeed", "divide", "loads", "tensors_only"]
FORCED = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}


def loads(zero_stage: int, dtype: torch.dtype, ranks: Ranks) -> tuple[torch.dtype, bool]:
    """Return the number format in which this rank loads a model that is trained in `dtype`, and whether it reads the
    weights."""
    return (dtype, ranks.is_first) if zero_stage == 3 else (torch.float32, True)


def divide(model: nn.Module, config: dict[str, Any], dtype: torch.dtype, ranks: Ranks) -> None:
    """Divide `model`, which lies in main memory, in place, as DeepSpeed's `config` says; its parameters are in `dtype`
    then, its buffers as they were. All ranks call it, inside `ranks.as_world()`."""
    parameters, modules = zip(*ranks.gather(numbers_of_zero_3(), "dividing a model"), strict=True)
    count_zero_3_from(max(parameters), max(modules))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(ranks.device)
    deepspeed.zero.Init(module=model, config_dict_or_path=config, data_parallel_group=ranks.members)


@contextmanager
def tensors_only() -> Iterator[None]:
    """Read DeepSpeed's checkpoints without running what a pickle asks for: a run may have come from somebody else.

    Inside, torch.load builds tensors, plain values and what DeepSpeed puts beside them, and raises UnpicklingError for
    all else. By the environment, because DeepSpeed calls it with `weights_only=False`, which nothing else overrides.
    """
    before = {name: os.environ.get(name) for name in FORCED}
    os.environ.update(FORCED)
    try:
        with torch.serialization.safe_globals([OrderedDict, *classes_in_checkpoints(deepspeed)]):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
