"""One rank in this process: DeepSpeed without the start of another interpreter."""

import os

import pytest
import torch

from training.distributed import start_ranks, stop_ranks


@pytest.fixture(scope="module")
def one_rank():
    """DeepSpeed forgets its groups in the end, for the next module begins a process group of its own."""
    from training.hybrid_engine.deepspeed_setup import deepspeed

    kept = [(module, dict(vars(module))) for module in (deepspeed.utils.groups, deepspeed.comm.comm)]
    environment, threads = dict(os.environ), torch.get_num_threads()
    yield start_ranks(threads=1)
    stop_ranks()
    for module, values in kept:
        vars(module).update(values)
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)
