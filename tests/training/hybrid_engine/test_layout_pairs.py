"""From layouts on four ranks to others: the parts are those of the whole weights, bitwise; the bytes are those that the
description says; the extra memory is at most two layers and a half."""

import itertools
import random

import pytest
import torch

from tests.ranks import run_ranks

FAMILY, MODEL_LAYERS = "llama tied, 2 key heads", 3
SHAPES = [  # mesh, data, tensor, ZeRO stage, pipeline, layers
    ((0, 1, 2, 3), 4, 1, 0),
    ((0, 1, 2, 3), 4, 1, 3),
    ((0, 1, 2, 3), 2, 2, 0),
    ((0, 1, 2, 3), 2, 2, 3),
    ((0, 1, 2, 3), 1, 4, 0),
    ((0, 1), 2, 1, 3),
    ((0, 1), 1, 2, 0),
    ((1, 2, 3), 3, 1, 3),
    ((0, 3), 1, 2, 0),
    ((2,), 1, 1, 0),
    ((0, 1, 2, 3), 2, 1, 0, 2),
    ((2, 3, 0, 1), 2, 1, 1, 2, (1, 2)),
    ((3, 1, 0), 1, 1, 0, 3),
    ((1, 2), 1, 1, 1, 2, (1, 2)),
]
TARGETS = 6
"""Of each layout, drawn once, so that each way of cutting meets each; `benchmarks.layout_pairs` has all."""
TIMES = ("first", "again")


def layouts():
    from training.hybrid_engine.layout import Layout

    return [
        Layout(mesh, data, tensor, *pipeline[:1] or [1], stage, *pipeline[1:])
        for mesh, data, tensor, stage, *pipeline in SHAPES
    ]


def pairs():
    draw, all_ = random.Random(7), layouts()
    return {source: draw.sample(all_, TARGETS) for source in all_}


def dividers(ranks):
    """By layout under ZeRO 3: divides an empty model in place over this rank's data group; all ranks call it."""
    from training.deepspeed_config import deepspeed_config
    from training.hybrid_engine.deepspeed_setup import divide
    from training.role_settings import OptimizerSettings

    config = deepspeed_config(OptimizerSettings(zero_stage=3), torch.float32, trained=False)

    def over(group):
        def divide_over_group(model):
            with group.as_world():
                divide(model, config, torch.float32, group)

        return divide_over_group

    found = {}
    for layout in layouts():
        if layout.zero_stage == 3:
            groups = [group for of_data in layout.data_groups if (group := ranks.part(of_data)) is not None]
            if groups:
                found[layout] = over(*groups)
    return found


def expected(whole, weight, layout, rank):
    """By the cut alone, and the run of a data rank under ZeRO 3; flat. None where another stage has it."""
    if layout.pipeline > 1 and layout.pipeline_rank(rank) not in stages_by_name(weight.name, layout):
        return None
    cut = weight.cut(layout, rank)
    part = (whole if cut is None else cut(whole)).flatten()
    if layout.zero_stage < 3:
        return part
    group = layout.data_group(rank)
    share = -(-part.numel() // len(group))
    return part[group.index(rank) * share :][:share]


def stages_by_name(name, layout):
    """Of the tied Llama."""
    if "embed_tokens" in name:
        return {0, layout.pipeline - 1}
    runs = layout.layers or {2: (2, 1), 3: (1, 1, 1)}[layout.pipeline]
    return (
        {[stage for stage, run in enumerate(runs) for _ in range(run)][int(name.split(".")[2])]}
        if ("layers" in name)
        else {layout.pipeline - 1}
    )


def described(moves, rank, moves_again):
    """Bytes that the rank sends and receives."""
    moves = [m for layer in moves for m in layer if m.sender != m.receiver and (m.weight.is_trained or not moves_again)]
    return [sum(m.bytes for m in moves if end(m) == rank) for end in (lambda m: m.sender, lambda m: m.receiver)]


def all_pairs(ranks, directory):
    """Of weights that the first rank has: into each layout, and from there into each other one; then once more, after
    those that are trained have changed."""
    from tests.inference.tensor_parallel.families import build, randomise
    from training.hybrid_engine.reallocation import Reallocation, on_rank, tensor_parallel_of, weights_of
    from training.hybrid_engine.transfers import transfers

    parts = {layout: tensor_parallel_of(layout) for layout in layouts()}
    divide, first = dividers(ranks), type(layouts()[0])((0,))
    model, later = (build(FAMILY, layers=MODEL_LAYERS) for _ in range(2))
    randomise(later, seed=2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    after = {
        name: parameter.detach() if "mlp" in name else before[name] for name, parameter in later.named_parameters()
    }
    if ranks.rank > 0:
        randomise(model, seed=3)  # nobody may read them
    sizes = {}
    for weight in weights_of(model):
        sizes[weight.layer] = sizes.get(weight.layer, 0) + before[weight.name].numel() * weight.value_bytes
    results = []
    for source, targets in pairs().items():
        into = Reallocation(model, first, source, parts[source], ranks, divide=divide.get(source))
        from_there = {
            target: Reallocation(model, source, target, parts[target], ranks, into, divide.get(target))
            for target in targets
        }
        weights_to = {target: weights_of(model, (source, target)) for target in targets}
        moves_to = {target: transfers(source, target, weights) for target, weights in weights_to.items()}
        for time, wholes in zip(TIMES, (before, after), strict=True):
            if ranks.rank == 0:
                for name, parameter in model.named_parameters():
                    parameter.data.copy_(wholes[name])
            into.run()
            for target, reallocation in from_there.items():
                module, held = reallocation.run(), reallocation.weights
                is_target = ranks.rank in target.mesh
                assert (module is None) == (not is_target) == (not held)
                equal = {
                    weight.name: torch.equal(on_rank(held[weight.name]).flatten()[: len(part)], part)
                    for weight in weights_to[target]
                    if is_target
                    for part in [expected(wholes[weight.name], weight, target, ranks.rank)]
                    if part is not None
                }
                moved = reallocation.moved
                results.append(
                    {
                        "name": f"{source} -> {target}, {time}",
                        "equal": all(equal.values()) and equal.keys() == held.keys(),
                        "bytes": [moved.sent, moved.received],
                        "described": described(moves_to[target], ranks.rank, time == "again"),
                        "layers": moved.buffer / max(sizes.values()),
                    }
                )
    return {"pairs": results, "in a part": within_a_part(ranks), "from stages": from_trained_stages(ranks)}


def from_trained_stages(ranks) -> dict[str, bool]:
    """Stages with adapters, in bf16, as an engine has them: by target, whether this rank's part is right, also after
    the adapters have changed, and whether those alone moved then."""
    import copy

    from tests.inference.tensor_parallel.families import build, randomise
    from training.hybrid_engine.layout import Layout
    from training.hybrid_engine.reallocation import Reallocation, tensor_parallel_of, weights_of
    from training.models.policy import Policy
    from training.pipelines.stage_model import held_weights, keep_stage
    from training.role_settings import LoRASettings

    source = Layout((2, 3, 0, 1), 2, pipeline=2, layers=(1, 2))
    targets = [Layout((0, 1, 2, 3), 4), Layout((0, 2), tensor=2), Layout((0, 1, 2, 3), 2, pipeline=2, layers=(1, 2))]
    whole = Policy(build(FAMILY, layers=MODEL_LAYERS), LoRASettings(rank=2)).model.to(torch.bfloat16)
    stage = copy.deepcopy(whole)
    keep_stage(stage, source.stage_cut(ranks.rank, MODEL_LAYERS))
    found = {}
    for target in targets:
        moving = Reallocation(whole, source, target, tensor_parallel_of(target), ranks, stage=stage)
        for seed in (1, 2):
            randomise(whole, seed)
            for name, weight in held_weights(stage).items():
                weight.data.copy_(whole.get_parameter(name))
            module, held = moving.run(), moving.weights
            right = (module is None) == (ranks.rank not in target.mesh)
            for weight in weights_of(whole, (target,)) if held else []:
                part = expected(whole.get_parameter(weight.name), weight, target, ranks.rank)
                if weight.is_trained or seed == 1:
                    right &= weight.name not in held if part is None else torch.equal(held[weight.name].flatten(), part)
            found[f"{target}, {seed}"] = right
        found[f"{target}, adapters"] = (
            moving.moved.received < 10_000 < sum(w.numel() for w in held.values()) or not held
        )
    return found


def within_a_part(ranks) -> bool | None:
    """Ranks 1 and 3, by their own numbers: 1 has the weights, both get them whole. Whether they are right."""
    from inference.tensor_parallel.shard import TensorParallel
    from tests.inference.tensor_parallel.families import build, randomise
    from training.hybrid_engine.layout import Layout
    from training.hybrid_engine.reallocation import Reallocation

    if (inside := ranks.part((1, 3))) is None:
        return None
    model, expected = build(FAMILY), build(FAMILY)
    randomise(model, seed=10 + ranks.rank)
    randomise(expected, seed=11)
    there = Reallocation(model, Layout((0,)), Layout((0, 1), data=2), TensorParallel(), inside).run()
    return all(torch.equal(a, b) for a, b in zip(there.parameters(), expected.parameters(), strict=True))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(__file__, "all_pairs", 4, tmp_path_factory.mktemp("pairs"))


def cases(results):
    for of_rank in results:
        assert len(of_rank["pairs"]) == len(SHAPES) * TARGETS * len(TIMES)
        yield from of_rank["pairs"]


def test_each_layout_is_a_target_and_each_way_of_cutting_meets_each():
    def way(layout):
        return layout.tensor > 1, layout.pipeline > 1, layout.zero_stage == 3

    found = [(source, target) for source, targets in pairs().items() for target in targets]
    assert {target for _, target in found} == set(layouts())
    ways = {way(layout) for layout in layouts()}
    assert len(ways) == 5
    assert {(way(source), way(target)) for source, target in found} == set(itertools.product(ways, repeat=2))


def test_each_part_is_that_of_the_whole_weights_bitwise(results):
    for case in cases(results):
        assert case["equal"], case["name"]


def test_bytes_are_those_of_the_description(results):
    for case in cases(results):
        assert case["bytes"] == case["described"], case["name"]
    for of_ranks in zip(*(of_rank["pairs"] for of_rank in results), strict=True):
        sent, received = (sum(case["bytes"][end] for case in of_ranks) for end in (0, 1))
        assert sent == received


def test_the_buffer_is_no_more_than_two_layers_and_a_half(results):
    layers = [case["layers"] for case in cases(results)]
    assert 0.9 < max(layers) <= 2.5


def test_a_part_of_the_ranks_moves_weights_by_numbers_of_its_own(results):
    assert [of_rank["in a part"] for of_rank in results] == [None, True, None, True]


def test_stages_that_train_give_other_layouts_what_they_have_learnt(results):
    for of_rank in results:
        assert len(of_rank["from stages"]) == 9
        assert all(of_rank["from stages"].values()), of_rank["from stages"]
