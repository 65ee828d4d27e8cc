"""Reading DeepSpeed's checkpoints without running what a pickle asks for: a run may have come from somebody else."""

import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from training.hybrid_engine.deepspeed_setup import deepspeed
from training.private_surfaces import classes_in_checkpoints

FORCED = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}


@contextmanager
def tensors_only() -> Iterator[None]:
    """Inside, torch.load builds tensors, plain values and what DeepSpeed puts beside them, and raises
    UnpicklingError for all else.

    By the environment, because DeepSpeed calls it with `weights_only=False`, which nothing else overrides.
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
