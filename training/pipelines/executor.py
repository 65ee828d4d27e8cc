"""Computes what orders say: stages in operation, and messages between them while they compute."""

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from training.distributed import PATIENCE, Ranks
from training.pipelines.orders import Event, Operation, Orders, Pipelines
from training.planner.schedules.problem import FORWARD

POLLED = 0.001
"""Seconds between two looks at a GPU's message."""


class PipelineWork(Protocol):
    """Computes one role's stage on this rank, in one optimiser step or one scoring pass.

    It must not meet the role's other data ranks before all of it is done: orders know of no such waiting.
    """

    count: int
    """Micro-batches."""

    def room(self, micro_batch: int) -> Tensor:
        """Return an empty tensor for the hidden states that this stage receives, or the gradient of those that it
        sent."""

    def forward(self, micro_batch: int, received: Tensor | None) -> Tensor | None:
        """Return what the next stage receives; None on the last. `received` is None on the first."""

    def backward(self, micro_batch: int, gradient: Tensor | None) -> Tensor | None:
        """Return the gradient of what `forward` received; None on the first. `gradient` is None on the last."""


@dataclass(frozen=True)
class Link:
    """Carries messages in one direction: nothing else goes through the process group."""

    group: dist.ProcessGroup
    peer: int
    """Its rank in the group."""


@dataclass(frozen=True)
class Links:
    """Holds a stage's links by kind of operation; none where nothing is received or sent."""

    sources: Mapping[int, Link]
    targets: Mapping[int, Link]


def connect(ranks: Ranks, pipelines: Pipelines) -> Links:
    """Make the links of a role's stage on this rank; all ranks of the run call it, also those without the role.

    Two neighbours have a process group for each kind of operation, and those of every role are their own: in each the
    messages come in the same sequence at both ends, whatever the orders are.
    """
    sources, targets = {}, {}
    first = torch.zeros(1, device=ranks.device)  # opens a connection, for which NCCL makes both ends wait
    for line in pipelines.ranks:
        for kind in pipelines.kinds:
            for source, target in pairwise(line if kind == FORWARD else line[::-1]):
                group = dist.new_group([source, target], timeout=PATIENCE)
                if ranks.rank == source:
                    targets[kind] = Link(group, dist.get_group_rank(group, target))
                    dist.send(first, group=group, group_dst=targets[kind].peer)
                elif ranks.rank == target:
                    sources[kind] = Link(group, dist.get_group_rank(group, source))
                    dist.recv(first, group=group, group_src=sources[kind].peer)
    return Links(sources, targets)


def execute(
    orders: Orders,
    rank: int,
    works: Mapping[str, PipelineWork],
    links: Mapping[str, Links],
    events: list[Event] | None = None,
) -> None:
    """Run all operations of this rank; their times are added to `events`.

    Receives are posted one operation ahead. Training waits for no send before its end, so that ranks cannot wait for
    each other; one role's forward passes alone run one way, and a stage that is ahead of the next waits for it.
    """
    order = orders.by_rank.get(rank, ())
    for role, work in works.items():
        needed = orders.roles[role].micro_batches
        if work.count != needed:
            raise ValueError(f"rank {rank} has {work.count} micro-batches of {role}, and its orders are of {needed}")

    def post(operation: Operation) -> Callable[[], Tensor | None]:
        link = links[operation.role].sources.get(operation.kind)
        if link is None:
            return lambda: None
        room = works[operation.role].room(operation.micro_batch)
        arrival = dist.irecv(room, group=link.group, group_src=link.peer)
        assert arrival is not None

        def receive() -> Tensor:
            arrival.wait()
            return room

        return receive

    def compute(operation: Operation, received: Tensor | None) -> None:
        work = works[operation.role]
        start = _now(events)
        result = (work.forward if operation.kind == FORWARD else work.backward)(operation.micro_batch, received)
        if events is not None:
            events.append(Event(rank, operation, start, _now(events)))
        if link := links[operation.role].targets.get(operation.kind):
            assert result is not None, f"{operation} has given nothing to send"
            sends.send(result, link)

    with _Sends(_most_sends(orders, len(order))) as sends:
        receive = post(order[0]) if order else None
        for index, operation in enumerate(order):
            assert receive is not None
            received = receive()
            receive = post(order[index + 1]) if index + 1 < len(order) else None
            compute(operation, received)


def _most_sends(orders: Orders, operations: int) -> int:
    """Return how many sends may be under way at one time from a rank with so many operations."""
    only = next(iter(orders.roles.values()))
    return only.stages + 1 if len(orders.roles) == 1 and only.kinds == (FORWARD,) else operations


def _now(events: Sequence[Event] | None) -> float:
    """Return the time; where events are wanted, wait for a GPU's stream, never for the device, on which a receive may
    wait."""
    if events is not None and torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
    return time.perf_counter()


class _Sends:
    """Holds tensors until they are sent: a thread waits, since only waiting tells which of gloo's sends are done."""

    def __init__(self, most: int) -> None:
        """`send` waits while so many are under way."""
        self._slots = threading.Semaphore(most)
        self._under_way: queue.SimpleQueue[tuple[dist.Work, Tensor] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._waiter = threading.Thread(target=self._wait, daemon=True)

    def __enter__(self) -> "_Sends":
        self._waiter.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Return when all is sent; raises what went wrong with one of them. After an error nobody may receive."""
        self._under_way.put(None)
        if error is None:
            self._waiter.join()
            if self._error is not None:
                raise self._error

    def send(self, tensor: Tensor, link: Link) -> None:
        self._slots.acquire()
        tensor = tensor.detach().contiguous()
        work = dist.isend(tensor, group=link.group, group_dst=link.peer)
        assert work is not None
        self._under_way.put((work, tensor))

    def _wait(self) -> None:
        while (sent := self._under_way.get()) is not None:
            work, tensor = sent
            try:
                while tensor.is_cuda and not work.is_completed():  # `wait` would hold up the stream that computes
                    time.sleep(POLLED)
                if self._error is None:
                    work.wait()
            except BaseException as error:
                self._error = error
            del sent, work, tensor
            self._slots.release()
