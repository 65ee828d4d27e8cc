"""Who sends what to whom, over random pairs of layouts: replayed in arrays, every value arrives, from one that has it.

The expectation comes from the cuts and numpy alone: a rank's part is `Cut` applied to the whole weight, and under ZeRO
3 its run of that part, flattened.
"""

import random
from collections import Counter

import numpy as np
import pytest
import torch

from inference.tensor_parallel.shard import Cut, even, rows_of
from training.hybrid_engine.layout import Layout
from training.hybrid_engine.transfers import Weight, stays, transfers

DEGREES = (2, 4)
LAYERS_OF_STAGES = [(2, ()), (2, (2, 1)), (2, (1, 2)), (3, ())]
PAIRS = 200


def weight(name, shape, cut_of, trained=True):
    """Of three layers, of which even stages have 2 and 1."""
    cuts = {size: tuple(cut_of(rank, size) for rank in range(size)) for size in DEGREES}
    stages = {}
    for degree, layers in LAYERS_OF_STAGES:
        ends = np.cumsum(layers or {2: (2, 1), 3: (1, 1, 1)}[degree])
        layer = int(name.split(".")[1]) if "." in name else None
        stages[degree, layers] = (0, degree - 1) if layer is None else (int(np.searchsorted(ends, layer, "right")),)
    return Weight(name, shape, torch.float32, trained, cuts, stages)


def copied_heads(rank, size):
    """Key heads of 3 for query heads of 12: in 4 parts one each, in 2 parts (0, 0, 1) and (1, 2, 2)."""
    heads = {2: [(0, 0, 1), (1, 2, 2)], 4: [(0,), (0, 1), (1, 2), (2,)]}[size][rank]
    return Cut(0, tuple((2 * head, 2) for head in heads))


WEIGHTS = [
    weight("embed", (11, 4), lambda r, n: Cut(0, *rows_of(11, r, n))),  # tied with the head
    weight("layers.0.column", (8, 3), lambda r, n: Cut(0, even(8, r, n))),
    weight("layers.0.row", (3, 8), lambda r, n: Cut(1, even(8, r, n))),
    weight("layers.0.qkv", (5, 24), lambda r, n: Cut(1, even(24, r, n, blocks=3))),
    weight("layers.0.key", (6, 5), copied_heads),
    weight("layers.0.norm", (7,), lambda r, n: None, trained=False),
    weight("layers.1.row", (3, 8), lambda r, n: Cut(1, even(8, r, n))),
    weight("layers.2.row", (3, 8), lambda r, n: Cut(1, even(8, r, n))),
]
LAYERS = [["embed"], [w.name for w in WEIGHTS if "layers.0" in w.name], ["layers.1.row"], ["layers.2.row"]]


def random_layout(draw):
    size = draw.choice((1, 2, 3, 4, 6, 8))
    tensor = draw.choice([t for t in (1, *DEGREES) if size % t == 0])
    degrees = [(p, layers) for p, layers in LAYERS_OF_STAGES if size // tensor % p == 0]
    pipeline, layers = draw.choice([*degrees, *[(1, ())] * max(1, len(degrees))])
    stage = size // pipeline
    mesh = draw.sample(range(8), size)
    mesh = [rank for first in range(0, size, stage) for rank in sorted(mesh[first : first + stage])]
    return Layout(tuple(mesh), stage // tensor, tensor, pipeline, draw.choice((0, 3)), layers)


def pairs():
    draw = random.Random(7)
    return [(random_layout(draw), random_layout(draw), draw.choice((None, 2, 4))) for _ in range(PAIRS)]


def part_of(values, weight, layout, rank):
    """What the rank holds, flat."""
    if layout.pipeline > 1 and layout.pipeline_rank(rank) not in weight.stages[layout.pipeline, layout.uneven_layers]:
        return np.zeros(0)
    cut = weight.cut(layout, rank)
    held = torch.from_numpy(values) if cut is None else cut(torch.from_numpy(values))
    held = held.flatten().numpy()
    if layout.zero_stage < 3:
        return held
    group = layout.data_group(rank)
    share = -(-len(held) // len(group))
    return held[group.index(rank) * share : (group.index(rank) + 1) * share]


def place(part, box, size):
    rows = part.at(box) + np.arange(box.bottom - box.top)[:, None] * part.stride
    found = rows + np.arange(box.right - box.left)
    assert found.min() >= 0 and found.max() < size
    return found


@pytest.mark.parametrize("chunk", range(4))
def test_every_value_arrives_once_from_a_rank_that_has_it(chunk):
    values = {w.name: np.arange(1.0, 1 + np.prod(w.shape)).reshape(w.shape) for w in WEIGHTS}
    for source, target, per_node in pairs()[chunk::4]:
        layers = transfers(source, target, WEIGHTS, per_node)
        assert [list(dict.fromkeys(move.weight.name for move in layer)) for layer in layers if layer] == [
            names for names, layer in zip(LAYERS, layers, strict=True) if layer
        ]
        held = {(w.name, r): part_of(values[w.name], w, source, r) for w in WEIGHTS for r in source.mesh}
        wanted = {(w.name, r): part_of(values[w.name], w, target, r) for w in WEIGHTS for r in target.mesh}
        got = {key: np.zeros_like(part) for key, part in wanted.items()}
        moves = [move for layer in layers for move in layer]
        for again in ((False, False), (True, False), (True, True)):  # sent, passed on, copied from what arrived
            arrived = {key: part.copy() for key, part in got.items()}
            for move in moves:
                is_copy = move.sender == move.receiver
                if (move.is_relayed, is_copy and move.is_relayed) != again:
                    continue
                taken = (arrived if move.is_relayed else held)[move.weight.name, move.sender]
                put = got[move.weight.name, move.receiver]
                at = place(move.put, move.box, len(put))
                assert not put[at].any()  # the first that comes
                put[at] = taken[place(move.taken, move.box, len(taken))]
                assert put[at].all()  # the sender had it
        for (name, rank), part in wanted.items():
            if stays(source, target, rank):
                assert np.array_equal(part, held[name, rank]) and not got[name, rank].any()
            else:
                assert np.array_equal(part, got[name, rank]), (source, target, per_node, name, rank)


def test_what_a_rank_has_it_does_not_receive_and_a_node_receives_once():
    numbered = {w.name: np.arange(1.0, 1 + np.prod(w.shape)).reshape(w.shape) for w in WEIGHTS}
    for source, target, per_node in pairs():
        moves = [move for layer in transfers(source, target, WEIGHTS, per_node) for move in layer]

        def values(ranks, layout, weight):
            found = [part_of(numbered[weight.name], weight, layout, rank) for rank in ranks if rank in layout.mesh]
            return set(np.concatenate([*found, [0.0]])) - {0.0}

        for w in WEIGHTS:
            sent = [move for move in moves if move.weight is w and move.sender != move.receiver]
            received = Counter({rank: 0 for rank in target.mesh})
            for move in sent:
                received[move.receiver] += move.box.values
            for rank in target.mesh:
                lacking = values([rank], target, w) - values([rank], source, w)
                assert received[rank] == len(lacking), (source, target, w.name, rank)
            for node in range(8 // (per_node or 8)):
                ranks = range(node * (per_node or 8), (node + 1) * (per_node or 8))
                imported = sum(m.box.values for m in sent if m.receiver in ranks and m.sender not in ranks)
                assert imported == len(values(ranks, target, w) - values(ranks, source, w))


def test_senders_share_the_load():
    big = [weight(f"layers.{i}.w", (64, 64), lambda r, n: Cut(0, even(64, r, n))) for i in range(12)]
    whole = sum(4 * 64 * 64 for _ in big)

    def sent(source, target, per_node=None):
        moves = [m for layer in transfers(source, target, big, per_node) for m in layer if m.sender != m.receiver]
        return {rank: sum(m.bytes for m in moves if m.sender == rank) / whole for rank in range(8)}

    four = (0, 1, 2, 3)
    assert sent(Layout(four, 4), Layout((4,))) == {r: 0.25 if r < 4 else 0 for r in range(8)}
    assert sent(Layout(four, 4, zero_stage=3), Layout(four, 4)) == {r: 0.75 if r < 4 else 0 for r in range(8)}
    assert sent(Layout(four, 4), Layout(four, tensor=4)) == {r: 0 for r in range(8)}
    over_nodes = sent(Layout((0,)), Layout((4, 5, 6, 7), 4), 4)
    assert over_nodes == {0: 1.0, 1: 0, 2: 0, 3: 0, 4: 0.75, 5: 0.75, 6: 0.75, 7: 0.75}


def test_what_stays():
    four = (0, 1, 2, 3)
    assert stays(Layout((0, 1), 2), Layout(four, 4, zero_stage=2), 1)  # whole here and there
    assert not stays(Layout((0, 1), 2), Layout(four, 4), 2)
    assert stays(Layout((0, 1), tensor=2), Layout(four, 2, 2), 1) and not stays(
        Layout(four, tensor=4), Layout(four, 2, 2), 1
    )
    assert not stays(Layout((0, 1), 2, zero_stage=3), Layout(four, 4, zero_stage=3), 0)
    assert stays(Layout((0, 1), 2, zero_stage=3), Layout((0, 1), 2, zero_stage=3), 0)
    in_two = Layout(four, 2, pipeline=2, layers=(2, 1))
    assert stays(in_two, Layout((1, 2), pipeline=2, layers=(2, 1)), 2)  # the last stage here and there
    assert not stays(in_two, Layout((2, 1), pipeline=2, layers=(2, 1)), 2)
    assert not stays(in_two, Layout(four, 2, pipeline=2, layers=(1, 2)), 2)
    assert not stays(in_two, Layout(four, 4), 2)
    assert stays(in_two, Layout(four, 2, pipeline=2), 2)  # as even as can be, in so many words
