"""The ranks of this run: started by torchrun or deepspeed (under Slurm: srun torchrun), or one process alone.

A rank that waits long says in the log for whom, and in which phase; it does not wait for one that has died.
"""

import atexit
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from inference.errors import UserError
from training.launchers import adopt, processes_option, wait_until_seen
from training.private_surfaces import default_group, default_store, wait_at_most

LONG = 60.0  # seconds of waiting that are worth a line; the next lines come at twice the time of the last one
SILENCE = 1800.0
"""Seconds without a sign of life after which a rank counts as dead. A process that dies is noticed at once, by its
connections or its launcher; a machine that loses power is not."""
EXIT_LOST = 71


@dataclass
class Waiting:
    missing: Callable[[], list[int]]  # the ranks that have not come yet
    phase: str
    begun: float = field(default_factory=time.monotonic)
    due: float = LONG


class RollCall:
    """Who has come to where all ranks meet, and who is alive, as the ranks' store knows."""

    def __init__(self, rank: int, size: int, store: dist.Store, long: float = LONG, silence: float = SILENCE):
        self.rank, self.size, self.store = rank, size, dist.PrefixStore("roll call", store)
        self.long, self.silence = long, silence
        self.now: Waiting | None = None
        self.heard: dict[int, tuple[int, float]] = {}
        """Signs of life of others: how many, and when the last one was heard."""
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="roll-call", daemon=True)
        self.thread.start()
        atexit.register(self.stop)  # a thread that is in the store when Python ends aborts the process

    def stop(self) -> None:
        self.over.set()
        self.thread.join(timeout=5.0)

    @contextmanager
    def meeting(self, phase: str, mesh: tuple[int, ...] = ()) -> Iterator[None]:
        """Meet the ranks of the run, or of `mesh`: what runs inside returns when all have come."""
        met = f"met/{mesh}" if mesh else "met"
        number = self.store.add(f"{met}/{self.rank}", 1)

        def missing() -> list[int]:
            return [rank for rank in mesh or range(self.size) if self.store.add(f"{met}/{rank}", 0) < number]

        with self.waiting(missing, phase):
            yield

    @contextmanager
    def waiting(self, missing: Callable[[], list[int]], phase: str) -> Iterator[None]:
        """Wait for other ranks inside."""
        self.now = Waiting(missing, phase, due=self.long)
        try:
            yield
        finally:
            self.now = None

    def _watch(self) -> None:
        """Watch in a thread of its own, as the main one sits in a collective."""
        with suppress(dist.DistError):  # the store has gone with the first rank
            while not self.over.wait(self.long / 20):
                self.store.add(f"alive/{self.rank}", 1)
                if (now := self.now) is not None and time.monotonic() - now.begun >= self.long:
                    self._look(now)

    def _look(self, now: Waiting) -> None:
        missing, waited = now.missing(), time.monotonic() - now.begun
        if self.now is not now or not missing:
            return
        if waited >= now.due:
            now.due = 2 * waited
            self._say(f"has waited {waited:.0f} s for {named(missing)} ({now.phase})")
        if dead := [rank for rank in missing if self._is_silent(rank)]:
            self._say(f"ends: {named(dead)} gave no sign of life; the same command goes on")
            os._exit(EXIT_LOST)

    def _is_silent(self, rank: int) -> bool:
        signs, at = self.store.add(f"alive/{rank}", 0), time.monotonic()
        known, since = self.heard.get(rank, (-1, at))
        if signs != known:
            self.heard[rank] = signs, at
            return False
        return at - since > self.silence

    def _say(self, what: str) -> None:
        """Print to stderr, which the command and launchers write to the log."""
        print(f"rank {self.rank} {what}", file=sys.stderr, flush=True)


def named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


PATIENCE = timedelta(days=1)
"""How long ranks wait for each other: the first one may download, tokenise or save for hours. A rank that has died ends
the others sooner, by its connections or its launcher."""


@dataclass(frozen=True)
class Ranks:
    """Which rank this process is, of how many, and where it computes.

    What they say to each other here goes over the CPU (gloo), so that no rank waits inside of a GPU's kernel.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None  # the group that talks over the CPU; None: the process group
    roll_call: RollCall | None = None
    mesh: tuple[int, ...] = ()  # their numbers in the run, where these are a part of its ranks
    members: dist.ProcessGroup | None = None  # the group in which such a part computes

    def part(self, mesh: Sequence[int]) -> "Ranks | None":
        """Return the ranks of `mesh`, counted from 0 in their order; None outside of it. All ranks call it."""
        mesh = tuple(sorted(mesh))
        if mesh == tuple(range(self.size)):
            return self
        members = dist.new_group(list(mesh), timeout=PATIENCE)
        group = members if self.device.type == "cpu" else dist.new_group(list(mesh), timeout=PATIENCE, backend="gloo")
        if self.rank not in mesh:
            return None
        return Ranks(mesh.index(self.rank), len(mesh), self.device, group, self.roll_call, mesh, members)

    def as_world(self) -> AbstractContextManager[None]:
        """Make these all the ranks that torch and DeepSpeed know of, inside."""
        return nullcontext() if self.members is None else default_group(self.members)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_first_of_node(self) -> bool:
        return int(os.environ.get("LOCAL_RANK", 0)) == 0

    def sum(self, values: Tensor, phase: str = "a sum over the ranks") -> Tensor:
        """Sum elementwise over all ranks; shape and result are the same on every rank."""
        values = values.cpu()
        if self.size > 1:
            with self._meeting(phase):
                dist.all_reduce(values, group=self.group)
        return values

    def sum_values(self, values: dict[str, float]) -> dict[str, float]:
        """Sum named numbers (the same names on every rank) in double precision."""
        total = self.sum(torch.tensor(list(values.values()), dtype=torch.float64))
        return dict(zip(values, total.tolist(), strict=True))

    def gather(self, value: Any, phase: str = "what each rank found") -> list[Any]:
        """Gather one small picklable value a rank, in rank order, on every rank. For tensors: `gather_flat`."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        with self._meeting(phase):
            dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def gather_on_first(self, value: Any, phase: str) -> list[Any]:
        """Gather one small picklable value a rank, in rank order, on the first rank; empty on the others."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size if self.is_first else []
        with self._meeting(phase):
            dist.gather_object(value, gathered or None, group=self.group, group_dst=0)
        return gathered

    def gather_flat(self, values: Tensor, phase: str) -> list[Tensor]:
        """Gather a tensor (n) a rank, n its own, on the CPU and in rank order, on every rank."""
        if self.size == 1:
            return [values]
        with self._meeting(phase):
            return gather_flat(values, self.size, self.group)

    def pool(self, tensors: dict[str, Tensor], phase: str) -> dict[str, Tensor]:
        """Pool named tensors on the CPU: the first rank gets those of all, whose names differ, the others none."""
        of_ranks = self.gather({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}, phase)
        if not self.is_first:
            with self._meeting(phase):
                for tensor in tensors.values():
                    dist.send(tensor, group=self.group, group_dst=0)
            return {}
        pooled = dict(tensors)
        with self._meeting(phase):
            for rank, coming in enumerate(of_ranks[1:], 1):
                for name, (shape, dtype) in coming.items():
                    pooled[name] = torch.empty(shape, dtype=dtype)
                    dist.recv(pooled[name], group=self.group, group_src=rank)
        return pooled

    def tell(self, value: Any, phase: str) -> Any:
        """Return the first rank's small picklable value on every rank."""
        if self.size == 1:
            return value
        told = [value]
        with self._meeting(phase):
            dist.broadcast_object_list(told, group=self.group, group_src=0)
        return told[0]

    def see(self, *paths: Path) -> None:
        """Return once this rank sees those of `paths` that the first one sees now; all ranks call it with the same.

        Raises UserError where they do not show.
        """
        there = self.tell([path.exists() for path in paths] if self.is_first else None, "a look at the run directory")
        for path, is_there in zip(paths, there, strict=True):
            if is_there:
                wait_until_seen(path)

    def barrier(self, phase: str = "before going on together") -> None:
        if self.size > 1:
            with self._meeting(phase):
                dist.barrier(group=self.group)

    def _meeting(self, phase: str) -> AbstractContextManager[None]:
        return self.roll_call.meeting(phase, self.mesh) if self.roll_call else nullcontext()


def gather_flat(values: Tensor, size: int, group: dist.ProcessGroup | None) -> list[Tensor]:
    """Gather a tensor (n) of each rank of `group`, n its own, in rank order: two collectives, no pickle."""
    lengths = values.new_empty(size, dtype=torch.int64)
    dist.all_gather(list(lengths.split(1)), lengths.new_tensor([len(values)]), group=group)
    gathered = values.new_empty(size, int(lengths.max()))
    padded = torch.nn.functional.pad(values, (0, gathered.shape[1] - len(values)))
    dist.all_gather(list(gathered.unbind(0)), padded, group=group)
    return [row[:length] for row, length in zip(gathered, lengths.tolist(), strict=True)]


def share_cores(threads: int = 0) -> None:
    """Compute with so many threads in this process; 0 divides the cores among this machine's processes."""
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_size()))


def local_size() -> int:
    variables = "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"  # of torchrun, of deepspeed, of neither
    return int(next(filter(None, map(os.environ.get, variables)), 1))


def start_ranks(threads: int = 0) -> Ranks:
    """Join the process group. `threads` are those of `share_cores`."""
    adopt()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    share_cores(threads)
    require_gpus(local_size())
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
    wait_at_most(PATIENCE)
    if size == 1:  # no port is opened, so none can be in use
        os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
        require_loopback()
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        try:
            dist.init_process_group(backend, timeout=PATIENCE)
        except dist.DistNetworkError as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UserError(
                f"The processes cannot meet at {where} ({str(error).splitlines()[0][:200]}): set MASTER_PORT "
                f"(torchrun: --master-port) to a port that is free, or leave it out on one machine."
            ) from error
    if size == 1:
        return Ranks(rank, size, device)
    group = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=PATIENCE)
    return Ranks(rank, size, device, group, RollCall(rank, size, default_store()))


LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error only says that another process is gone."""
    is_ours = isinstance(error, dist.DistNetworkError | dist.DistStoreError | dist.DistBackendError)
    return is_ours or (isinstance(error, RuntimeError) and any(text in str(error) for text in LOST))


def require_gpus(processes: int) -> None:
    """Raise UserError where this machine has GPUs, but not one for each of its processes."""
    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise UserError(
            f"{processes} processes need {processes} GPUs, and this machine shows {gpus}: use "
            f"{processes_option(gpus)}, or let CUDA_VISIBLE_DEVICES show more."
        )


def require_loopback() -> None:
    """Raise UserError where the processes of this machine cannot reach each other: gloo would fail, torchrun wait."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"This machine has no loopback interface (127.0.0.1: {error.strerror or error}), over which its processes "
            f"meet: bring it up, `ip link set lo up`, or let the container have a network."
        ) from None


def stop_ranks() -> None:
    """Leave the process group; without this about one run in eight of two gloo processes aborts at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
