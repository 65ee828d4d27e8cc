"""Transfers: which rank sends which slice of which weight to which, to bring the weights of a role into another layout.

They are a pure description: `reallocation.py` executes it, the planner adds it up, and tests read it without processes.
A weight is seen as a table: the dimensions before the one along which it is cut are its rows, the others its columns.
Then all that a rank holds, whole, tensor-parallel or divided by ZeRO 3, is a few boxes of the table. What a rank holds
already it receives from nobody; a node receives what it lacks once, and one of its ranks passes it on.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from inference.tensor_parallel.shard import Cut
from training.hybrid_engine.layout import Layout


@dataclass(frozen=True)
class Weight:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_trained: bool
    """Weights that are not trained move once."""
    cuts: Mapping[int, tuple[Cut | None, ...]] = field(default_factory=dict)
    """The part of each tensor rank, None for all of it, by tensor-parallel degree over 1."""
    stages: Mapping[tuple[int, tuple[int, ...]], tuple[int, ...]] = field(default_factory=dict)
    """The stages that have it, by pipeline degree over 1 and `uneven_layers` of a layout."""

    def cut(self, layout: Layout, rank: int) -> Cut | None:
        return None if layout.tensor == 1 else self.cuts[layout.tensor][layout.tensor_rank(rank)]

    def is_on(self, layout: Layout, rank: int) -> bool:
        return layout.pipeline == 1 or layout.pipeline_rank(rank) in self.stages[layout.pipeline, layout.uneven_layers]

    @property
    def value_bytes(self) -> int:
        return self.dtype.itemsize

    @property
    def dim(self) -> int:
        """The dimension that is cut, the same in all degrees."""
        return next((cut.dim for of_ranks in self.cuts.values() for cut in of_ranks if cut is not None), 0)

    @property
    def layer(self) -> str:
        """The name of what moves together: a decoder layer, or a weight outside of the layers alone."""
        match = re.match(r".*?\.\d+\.", self.name)
        return match.group() if match else self.name


class Box(NamedTuple):
    """Bounds rows `top` .. `bottom` - 1 and columns `left` .. `right` - 1 of a weight."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def values(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)

    def common(self, other: "Box") -> "Box | None":
        top, bottom = max(self.top, other.top), min(self.bottom, other.bottom)
        left, right = max(self.left, other.left), min(self.right, other.right)
        return Box(top, bottom, left, right) if top < bottom and left < right else None

    def without(self, other: "Box") -> "list[Box]":
        """Return what remains of this one, in boxes."""
        hole = self.common(other)
        if hole is None:
            return [self]
        around = (
            Box(self.top, hole.top, self.left, self.right),
            Box(hole.top, hole.bottom, self.left, hole.left),
            Box(hole.top, hole.bottom, hole.right, self.right),
            Box(hole.bottom, self.bottom, self.left, self.right),
        )
        return [box for box in around if box.values > 0]


class LocalBox(NamedTuple):
    """Says where a box of a weight lies in a rank's memory: the first value at `offset`, a row every `stride`."""

    box: Box
    offset: int
    stride: int

    def at(self, box: Box) -> int:
        """Return where the first value of a smaller box lies."""
        return self.offset + (box.top - self.box.top) * self.stride + box.left - self.box.left


@dataclass(frozen=True)
class Move:
    """Describes how one box of one weight is copied on its rank (`sender` = `receiver`) or sent."""

    weight: Weight
    box: Box
    sender: int
    receiver: int
    taken: LocalBox
    """Where the box lies with the sender."""
    put: LocalBox
    is_relayed: bool = False
    """The sender has just received it: it lies in its part of the target layout."""

    @property
    def bytes(self) -> int:
        return self.box.values * self.weight.value_bytes


def transfers(
    source: Layout, target: Layout, weights: Sequence[Weight], ranks_per_node: int | None = None
) -> list[list[Move]]:
    """Return the moves of each layer, in the order of the weights. A rank whose part stays as it is has none.

    Each rank of `target` gets each value of its part from one rank that has it. Senders are chosen so that their loads
    are alike, in the receiver's node where one has it. `ranks_per_node` is None where all ranks are on one node.
    """
    senders = _Senders(ranks_per_node)
    staying = {rank for rank in target.mesh if stays(source, target, rank)}
    cells: dict[tuple, list[_Cell]] = {}  # layers are alike
    layers: dict[str, list[Move]] = {}
    for weight in weights:
        ends = (
            (weight.cuts.get(end.tensor), weight.stages.get((end.pipeline, end.uneven_layers)))
            for end in (source, target)
        )
        alike = weight.shape, *ends
        if alike not in cells:
            held = {rank: parts(weight, source, rank) for rank in source.mesh}
            cells[alike] = _cells(held, {rank: parts(weight, target, rank) for rank in target.mesh})
        moves = layers.setdefault(weight.layer, [])
        for cell in cells[alike]:
            moves += senders.serve(weight, cell, staying)
    return list(layers.values())


def stays(source: Layout, target: Layout, rank: int) -> bool:
    """Whether what `rank` holds is the same in both layouts, and with whom it computes."""
    if rank not in source.mesh or rank not in target.mesh:
        return False
    divides = source.zero_stage == 3, target.zero_stage == 3
    return (
        source.tensor_group(rank) == target.tensor_group(rank)
        and (source.pipeline, source.uneven_layers) == (target.pipeline, target.uneven_layers)
        and source.pipeline_rank(rank) == target.pipeline_rank(rank)
        and divides[0] == divides[1]
        and (not divides[0] or source.data_group(rank) == target.data_group(rank))
    )


def parts(weight: Weight, layout: Layout, rank: int) -> list[LocalBox]:
    """Return what `rank` holds of `weight`: if its stage has it, its tensor-parallel part; under ZeRO 3 of the values
    of that, row by row, an equal run for each data rank in the order of rank numbers, the last ones shorter."""
    if not weight.is_on(layout, rank):
        return []
    rows, columns = math.prod(weight.shape[: weight.dim]), math.prod(weight.shape[weight.dim :])
    inner = columns // weight.shape[weight.dim] if columns and weight.shape else 1
    cut = weight.cut(layout, rank)
    ranges = ((0, columns),) if cut is None else tuple((start * inner, length * inner) for start, length in cut.ranges)
    width = columns if cut is None else cut.length * inner
    start, end = 0, rows * width
    if layout.zero_stage == 3:
        group = sorted(layout.data_group(rank))
        share = -(-end // len(group))
        start, end = min(end, group.index(rank) * share), min(end, (group.index(rank) + 1) * share)
    held = []
    for run in _boxes(start, end, width):
        column = 0
        for first, length in ranges:
            local = run.common(Box(0, rows, column, column + length))
            if local is not None:
                shift = first - column
                box = Box(local.top, local.bottom, local.left + shift, local.right + shift)
                held.append(LocalBox(box, local.top * width + local.left - start, width))
            column += length
    return held


def _boxes(start: int, end: int, width: int) -> list[Box]:
    """Return values `start` .. `end` - 1 of rows of `width`: the end of a row, whole rows, the beginning of one."""
    if start == end:
        return []
    (top, left), (bottom, right) = divmod(start, width), divmod(end, width)
    if top == bottom:
        return [Box(top, top + 1, left, right)]
    begun = [Box(top, top + 1, left, width)] if left else []
    boxes = [*begun, Box(top + len(begun), bottom, 0, width), Box(bottom, bottom + 1, 0, right)]
    return [box for box in boxes if box.values > 0]


@dataclass(frozen=True)
class _Cell:
    """Describes a box that is contiguous for all ranks that hold it and for all that want it."""

    box: Box
    holders: Mapping[int, LocalBox]
    wanted: Sequence[tuple[int, LocalBox]]


def _cells(held: Mapping[int, list[LocalBox]], wanted: Mapping[int, list[LocalBox]]) -> list[_Cell]:
    tiles = _tiles(held)
    return [
        _Cell(common, dict(holders), wanting)
        for tile, wanting in _tiles(wanted)
        for box, holders in tiles
        if (common := tile.common(box)) is not None
    ]


def _tiles(of_ranks: Mapping[int, list[LocalBox]]) -> list[tuple[Box, list[tuple[int, LocalBox]]]]:
    """Return boxes that do not overlap, each with the parts that it lies in, perhaps several of one rank."""
    tiles: list[tuple[Box, list[tuple[int, LocalBox]]]] = []
    for rank, part in ((rank, part) for rank, held in of_ranks.items() for part in held):
        left, finer = [part.box], []
        for box, owners in tiles:
            common = box.common(part.box)
            if common is None:
                finer.append((box, owners))
                continue
            finer.append((common, [*owners, (rank, part)]))
            finer += [(rest, owners) for rest in box.without(common)]
            left = [rest for one in left for rest in one.without(common)]
        tiles = [*finer, *((box, [(rank, part)]) for box in left)]
    return tiles


class _Senders:
    """Chooses who sends, so that ranks and nodes send alike."""

    def __init__(self, ranks_per_node: int | None):
        self.ranks_per_node = ranks_per_node
        self.sent: defaultdict[int, int] = defaultdict(int)
        """Bytes of each rank."""
        self.exported: defaultdict[int, int] = defaultdict(int)
        """Bytes of each node, to other nodes."""

    def node(self, rank: int) -> int:
        return 0 if self.ranks_per_node is None else rank // self.ranks_per_node

    def serve(self, weight: Weight, cell: _Cell, staying: set[int]) -> Iterable[Move]:
        size = cell.box.values * weight.value_bytes
        lacking: defaultdict[int, dict[int, LocalBox]] = defaultdict(dict)
        for rank, put in cell.wanted:
            if rank in cell.holders:
                if rank not in staying:
                    yield Move(weight, cell.box, rank, rank, cell.holders[rank], put)
            elif (before := lacking[self.node(rank)].setdefault(rank, put)) is not put:
                yield Move(weight, cell.box, rank, rank, before, put, is_relayed=True)  # it wants the box twice
        for node, wanting in lacking.items():
            near = {rank: part for rank, part in cell.holders.items() if self.node(rank) == node}
            relay = None
            if not near:
                sender = min(cell.holders, key=lambda rank: (self.exported[self.node(rank)], self.sent[rank], rank))
                relay = min(wanting, key=lambda rank: (self.sent[rank], rank))
                self.exported[self.node(sender)] += size
                self.sent[sender] += size
                yield Move(weight, cell.box, sender, relay, cell.holders[sender], wanting[relay])
                near = {relay: wanting[relay]}
            for rank, put in wanting.items():
                if rank != relay:
                    sender = min(near, key=lambda rank: (self.sent[rank], rank))
                    self.sent[sender] += size
                    yield Move(weight, cell.box, sender, rank, near[sender], put, is_relayed=relay is not None)
