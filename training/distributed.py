"""The ranks of this run: started by torchrun or deepspeed (under Slurm: srun torchrun), or one process alone."""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from inference.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """Which rank this process is, of how many, and where it computes."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over all ranks; the same shape and the same result on each."""
        if self.size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()

    def sum_values(self, values: dict[str, float]) -> dict[str, float]:
        """Sum of named numbers (the same names on each rank), in double precision."""
        total = self.sum(torch.tensor(list(values.values()), dtype=torch.float64))
        return dict(zip(values, total.tolist(), strict=True))

    def gather(self, value: Any) -> list[Any]:
        """One picklable value of each rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def start_ranks(threads: int = 0) -> Ranks:
    """Join the process group. `threads` is for one process; 0 divides the cores among this machine's processes."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = (
        int(os.environ.get("LOCAL_RANK", 0)),
        int(
            os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size  # torchrun, deepspeed, neither
        ),
    )
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_size))
    require_gpus(local_size)
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
    if size == 1:  # no port is opened, so none can be in use
        os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        try:
            dist.init_process_group(backend)
        except dist.DistNetworkError as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UserError(
                f"The processes cannot meet at {where} ({str(error).splitlines()[0][:200]}): set MASTER_PORT "
                f"(torchrun: --master-port) to a port that is free, or leave it out on one machine."
            ) from error
    return Ranks(rank, size, device)


def require_gpus(processes: int) -> None:
    """Raise UserError where this machine has GPUs, but not one for each of its processes."""
    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise UserError(
            f"{processes} processes need {processes} GPUs, and this machine shows {gpus}: use --processes {gpus}, or "
            f"let CUDA_VISIBLE_DEVICES show more."
        )


def stop_ranks() -> None:
    """Leave the process group; without this about one run in eight of two gloo processes aborts at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
