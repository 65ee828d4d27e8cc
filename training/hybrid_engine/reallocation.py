"""Reallocation of one role's present weights into another layout: other ranks, degrees or stages, ZeRO 0-3.

Any model will do: a training engine's model, a frozen module, a frozen module under ZeRO 3. Where a rank's part stays
as it is nothing is copied. Elsewhere the weights move layer by layer as `transfers` says, through one buffer, so that
the peak extra memory is the new part and at most two layers and a half. Nothing is gathered: what ZeRO 3 has divided is
sent from where it lies.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from inference.families import text_config
from inference.private_surfaces import is_divided, whole_shape
from inference.tensor_parallel.shard import ShardParameter, TensorParallel, cuts_of, empty_shard, join_groups
from training.distributed import Ranks, local_size
from training.hybrid_engine.layout import Layout, StageCut
from training.hybrid_engine.transfers import Box, LocalBox, Move, Weight, stays, transfers
from training.pipelines.stage_model import held_weights, keep_stage, stages_of
from training.private_surfaces import forget_whole, own_part

ALIGNMENT = 16
"""A message in the buffer starts at a multiple of so many bytes."""


@dataclass(frozen=True)
class Moved:
    """Counts the bytes that one reallocation moved on this rank."""

    sent: int = 0
    received: int = 0
    copied: int = 0
    """Bytes from this rank's part of the source to its part of the target."""
    buffer: int = 0
    """Bytes of extra memory while it ran."""
    seconds: float = 0.0


class Reallocation:
    """Brings the weights that a role has in the layout `source` to this rank's part of the layout `target`.

    All of `ranks` make it, and the layouts count in their numbers. `model` is the whole model of transformers, on ranks
    of `source` with its weights, or divided by ZeRO 3; elsewhere only its structure is read, and its weights may be
    uninitialised. Where `source` has stages, a rank's stage of the model is its `stage`, and of `model` only the
    structure is read on all ranks. If `source` is tensor-parallel, its weights are those of `before`, the reallocation
    that led there. `part` is this rank's in `target` (`tensor_parallel_of`), None outside of it. If `target` has ZeRO
    stage 3, `divide` divides an empty module in place over the data ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Layout,
        target: Layout,
        part: TensorParallel | None,
        ranks: Ranks,
        before: "Reallocation | None" = None,
        divide: Callable[[nn.Module], None] | None = None,
        stage: nn.Module | None = None,
    ):
        assert part is None or (divide is not None) == (target.zero_stage == 3)
        self.model, self.source_model = model, model if stage is None else stage
        self.part, self.ranks, self.before, self.divide = part, ranks, before, divide
        self.is_source = ranks.rank in source.mesh
        self.stays = stays(source, target, ranks.rank)
        self.moved = Moved()
        """The bytes of the last run."""
        self._copy: nn.Module | None = None
        self._pieces: list[ShardParameter] = []
        self._shapes: dict[str, torch.Size] = {}
        self.is_filled = False
        """Whether it has run since the last release; the same on all ranks of both meshes."""
        self._cut = None
        if part is not None and target.pipeline > 1:
            self._cut = target.stage_cut(ranks.rank, layers_of(model))
        weights = weights_of(model, (source, target))
        require_agreement(weights, ranks)
        if ranks.device.type == "cuda" and ranks.size > 1:  # NCCL wants all ranks in what a group does first
            dist.all_reduce(torch.zeros(1, device=ranks.device), group=ranks.members)
        moves = transfers(source, target, weights, local_size())
        trained = [[move for move in layer if move.weight.is_trained] for layer in moves]
        self._layers = [LayerTransfer.of(layer, ranks.rank) for layer in moves]
        self._layers_again = [LayerTransfer.of(layer, ranks.rank) for layer in trained]

    @property
    def module(self) -> nn.Module | None:
        """The result of `run`: this rank's part in the target."""
        if not self.stays:
            return self._copy
        return self.source_model if self.before is None else self.before.module

    @property
    def weights(self) -> dict[str, Tensor]:
        """This rank's parts in the target, by the names of the whole model's parameters; under ZeRO 3 divided."""
        return self._held() if self.stays else {piece.name: piece.local for piece in self._pieces}

    @torch.no_grad()
    def run(self) -> nn.Module | None:
        """Return the model with the source's present weights, the same module each time; None outside of the target.

        All ranks of both meshes call it. Frozen parameters move the first time only.
        """
        start = time.perf_counter()
        if not self.is_filled and self.part is not None and not self.stays:
            self._allocate()
        layers = self._layers_again if self.is_filled else self._layers
        size = max((layer.bytes for layer in layers), default=0)
        buffer = torch.empty(size, dtype=torch.uint8, device=self.ranks.device)
        held = {name: on_rank(weight).detach().reshape(-1) for name, weight in self._held().items()}
        own = {name: weight.detach().view(-1) for name, weight in self._own().items()}
        counts = [layer.run(held, own, buffer, self.ranks.members) for layer in layers]
        if self.divide is not None:
            for piece in self._pieces:
                forget_whole(piece.local)
        self.is_filled = True
        sent, received, copied = (sum(numbers) for numbers in zip((0, 0, 0), *counts, strict=True))
        self.moved = Moved(sent, received, copied, buffer.numel(), time.perf_counter() - start)
        return self.module

    def release(self) -> None:
        """Give the memory of the copy back until the next run. All ranks of both meshes call it."""
        for own in self._own().values():
            own.data = own.data.new_empty(0)
        self.is_filled = False

    def _allocate(self) -> None:
        if self._copy is None:
            assert self.part is not None
            device = self.ranks.device if self.divide is None else torch.device("cpu")  # untouched, it takes no room
            self._copy, self._pieces = empty_part(self.model, self.part, self._cut, device)
            if self.divide is not None:
                self.divide(self._copy)
            self._copy.to(self.ranks.device)  # its buffers too
            self._shapes = {name: own.shape for name, own in self._own().items()}
        padded = {piece.name for piece in self._pieces if piece.cut is not None and piece.cut.padding}
        for name, own in self._own().items():
            if own.shape != self._shapes[name]:
                own.data = own.data.new_empty(self._shapes[name])
            if name in padded:
                own.data.zero_()

    def _own(self) -> dict[str, Tensor]:
        """Return what lies on this rank of the copy, by the names of the whole model."""
        return {piece.name: on_rank(piece.local) for piece in self._pieces}

    def _held(self) -> dict[str, Tensor]:
        """Return what lies on this rank of the source, by the names of the whole model."""
        if not self.is_source:
            return {}
        return dict(held_weights(self.source_model)) if self.before is None else self.before.weights


@dataclass(frozen=True)
class RankMessage:
    """Describes what one rank sends to one or several others, or gets from one."""

    peers: tuple[int, ...]
    moves: tuple[Move, ...]
    """Wider values first, so that each lies at a multiple of its width."""

    @property
    def bytes(self) -> int:
        return sum(move.bytes for move in self.moves)

    @property
    def room(self) -> int:
        return -(-self.bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class MessageRound:
    """Describes what a rank sends and receives at one time; others wait for messages in the same order."""

    rank: int
    sends: tuple[RankMessage, ...]
    receives: tuple[RankMessage, ...]

    @classmethod
    def of(cls, moves: Sequence[Move], rank: int) -> "MessageRound":
        """Make that of a rank from the moves between all ranks."""
        to: dict[int, list[Move]] = {}
        by: dict[int, list[Move]] = {}
        for move in sorted(moves, key=lambda move: -move.weight.value_bytes):
            if move.sender == rank:
                to.setdefault(move.receiver, []).append(move)
            elif move.receiver == rank:
                by.setdefault(move.sender, []).append(move)
        same: dict[tuple, list[int]] = {}
        for receiver in sorted(to):
            same.setdefault(tuple((m.weight.name, m.box, m.taken) for m in to[receiver]), []).append(receiver)
        sends = tuple(RankMessage(tuple(receivers), tuple(to[receivers[0]])) for receivers in same.values())
        return cls(rank, sends, tuple(RankMessage((sender,), tuple(by[sender])) for sender in sorted(by)))

    @property
    def bytes(self) -> int:
        return sum(message.room for message in (*self.sends, *self.receives))

    def run(
        self,
        source: Mapping[str, Tensor],
        target: Mapping[str, Tensor],
        buffer: Tensor,
        group: dist.ProcessGroup | None,
    ) -> tuple[int, int]:
        """Send and receive; returns the bytes of both. `source` and `target` are flat, by name."""

        def operation(kind: Callable, tensor: Tensor, peer: int) -> dist.P2POp:
            return dist.P2POp(kind, tensor, group=group, group_peer=peer)

        offset = 0
        operations: list[tuple[int, int, dist.P2POp]] = []
        arriving = []
        for message in self.sends:
            sent = buffer[offset : offset + message.bytes]
            for move, room in boxes_in(sent, message.moves):
                room.copy_(view(source, move, move.taken))
            operations += [(self.rank, peer, operation(dist.isend, sent, peer)) for peer in message.peers]
            offset += message.room
        for message in self.receives:
            received = buffer[offset : offset + message.bytes]
            operations += [(peer, self.rank, operation(dist.irecv, received, peer)) for peer in message.peers]
            arriving.append((received, message))
            offset += message.room
        if operations:
            in_order = sorted(operations, key=lambda operation: operation[:2])
            for work in dist.batch_isend_irecv([p2p for *_, p2p in in_order]):
                work.wait()
        for received, message in arriving:
            for move, room in boxes_in(received, message.moves):
                view(target, move, move.put).copy_(room)
        sent_bytes = sum(p2p.tensor.numel() for sender, _, p2p in operations if sender == self.rank)
        return sent_bytes, sum(received.numel() for received, _ in arriving)


@dataclass(frozen=True)
class LayerTransfer:
    """Describes what a rank copies, sends and receives for one layer."""

    copies: tuple[Move, ...]
    first: MessageRound
    relayed: MessageRound
    """Sends on what was received in the first round."""
    copies_again: tuple[Move, ...]
    """Copies of what was received."""

    @classmethod
    def of(cls, moves: Sequence[Move], rank: int) -> "LayerTransfer":
        copies = [move for move in moves if move.sender == move.receiver == rank]
        first, relayed = (
            MessageRound.of([m for m in moves if m.sender != m.receiver and m.is_relayed == again], rank)
            for again in (False, True)
        )
        return cls(
            tuple(m for m in copies if not m.is_relayed), first, relayed, tuple(m for m in copies if m.is_relayed)
        )

    @property
    def bytes(self) -> int:
        return max(self.first.bytes, self.relayed.bytes)

    def run(
        self,
        held: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
        buffer: Tensor,
        group: dist.ProcessGroup | None,
    ) -> tuple[int, int, int]:
        """Move the layer; returns the bytes sent, received and copied. `held` is what the rank has in the source, `own`
        in the target."""
        for move in self.copies:
            view(own, move, move.put).copy_(view(held, move, move.taken))
        sent, received = self.first.run(held, own, buffer, group)
        sent_on, received_late = self.relayed.run(own, own, buffer, group)
        for move in self.copies_again:
            view(own, move, move.put).copy_(view(own, move, move.taken))
        return sent + sent_on, received + received_late, sum(m.bytes for m in (*self.copies, *self.copies_again))


def on_rank(weight: Tensor) -> Tensor:
    """Return what lies on this rank of a weight: under ZeRO 3 a run of the values."""
    return own_part(weight) if isinstance(weight, nn.Parameter) and is_divided(weight) else weight


def view(flat_weights: Mapping[str, Tensor], move: Move, part: LocalBox) -> Tensor:
    """Return a view (rows, columns) of the box that moves, where it lies in `part`."""
    whole, box = flat_weights[move.weight.name], move.box
    return whole.as_strided(shape_of(box), (part.stride, 1), whole.storage_offset() + part.at(box))


def boxes_in(message: Tensor, moves: Iterable[Move]) -> Iterable[tuple[Move, Tensor]]:
    """Yield the moves, one behind the other in `message` (uint8), each with its view in the format of the weight,
    (rows, columns)."""
    offset = 0
    for move in moves:
        room = message[offset : offset + move.bytes]
        offset += move.bytes
        yield move, room.view(move.weight.dtype).view(shape_of(move.box))


def shape_of(box: Box) -> tuple[int, int]:
    return box.bottom - box.top, box.right - box.left


def layers_of(model: nn.Module) -> int:
    return text_config(cast(PreTrainedModel, model).config).num_hidden_layers


def empty_part(
    model: nn.Module, part: TensorParallel, cut: StageCut | None, device: torch.device
) -> tuple[nn.Module, list[ShardParameter]]:
    """Do as `empty_shard`; with a `cut` only for this stage's layers, whose pieces have the whole model's names."""
    if cut is None:
        return empty_shard(model, part, device)
    whole, _ = empty_shard(model, part, torch.device("meta"))
    keep_stage(cast(PreTrainedModel, whole), cut)
    stage, pieces = empty_shard(whole, part, device)
    names = {id(parameter): name for name, parameter in held_weights(stage).items()}
    return stage, [replace(piece, name=names[id(piece.local)]) for piece in pieces]


def weights_of(model: nn.Module, layouts: Sequence[Layout] = ()) -> list[Weight]:
    """Describe the weights of a whole model of transformers, with their parts in those layouts. Raises UserError if it
    cannot be cut so."""
    cuts = {
        degree: [cuts_of(model, TensorParallel(rank, degree)) for rank in range(degree)]
        for degree in sorted({layout.tensor for layout in layouts} - {1})
    }
    staged = {(layout.pipeline, layout.uneven_layers): layout for layout in layouts if layout.pipeline > 1}
    stages = {
        key: stages_of(cast(PreTrainedModel, model), layout.runs(layers_of(model)))
        for key, layout in sorted(staged.items())
    }
    return [
        Weight(
            name,
            whole_shape(parameter),
            parameter.dtype,
            parameter.requires_grad,
            {degree: tuple(of_rank.get(id(parameter)) for of_rank in of_ranks) for degree, of_ranks in cuts.items()},
            {key: holders[name] for key, holders in stages.items()},
        )
        for name, parameter in model.named_parameters()
    ]


def require_agreement(described: object, ranks: Ranks) -> None:
    """Raise RuntimeError where ranks were given unlike models: they would wait for each other forever."""
    digest = hashlib.sha256(repr(described).encode()).hexdigest()
    if len(set(ranks.gather(digest, "what a role's weights are"))) > 1:
        raise RuntimeError("The ranks were given models of unlike structure, formats or trained parameters.")


def tensor_parallel_of(layout: Layout) -> TensorParallel | None:
    """Return this process's part in a layout, None outside of its mesh. All ranks call it, as it makes process
    groups."""
    return join_groups(layout.tensor_groups)
