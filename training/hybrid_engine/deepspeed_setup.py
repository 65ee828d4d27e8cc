"""DeepSpeed, imported the way this project needs it: every module takes it from here."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops  # noqa: F401  # what imports `deepspeed` from here asks it for its optimisers

from training.private_surfaces import without_shared_memory

without_shared_memory(deepspeed)

__all__ = ["deepspeed"]
