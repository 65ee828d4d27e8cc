"""DeepSpeed, imported the way this project needs it: every module takes it from here."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.utils.tensor_fragment import fragment_address

# DeepSpeed compiles a shared-memory all-reduce on first use on a CPU: half a minute and a C++ compiler that a laptop
# may not have. gloo does the same work.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

__all__ = ["deepspeed", "fragment_address"]
