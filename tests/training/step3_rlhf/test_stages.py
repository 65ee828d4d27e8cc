"""Step 3 by plans that cut layers into pipeline stages, against every call on all ranks, in all three orders."""

import itertools
from typing import Any

import pytest
import torch

from benchmarks import work
from benchmarks.work import Size
from tests.ranks import run_ranks
from tests.training.step3_rlhf.test_plans import ALL, ITERATIONS, follow, go_on, make_ppo, plan, trained, weights_of

FORWARDS = {"mesh": "0-1", "pipeline": 2, "micro_batches": 3}
BACKWARDS = {"mesh": [1, 0], "pipeline": 2, "micro_batches": 2}
UNEVEN = FORWARDS | {"layers": [1, 2]}
AGAINST = plan(ALL, UNEVEN, BACKWARDS, BACKWARDS, UNEVEN, BACKWARDS)
FOUR = {"mesh": "0-3", "data": 4}
LINES = {"mesh": "0-3", "data": 2, "pipeline": 2, "micro_batches": 2}
AGAINST_LINES = LINES | {"mesh": [2, 3, 0, 1], "zero_stage": 1}
COPIES = {"mesh": [1, 3, 0, 2], "data": 2, "pipeline": 2, "micro_batches": 2}
LORA = {"lora": {"rank": 2}}
ADAPTED = {"actor": LORA, "critic": LORA}


def settings(order: str, plan: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"plan": plan, "fusion": {"training": order}, **others}


ON_TWO: dict[str, dict[str, Any]] = {
    "none": {},
    **{order: settings(order, AGAINST) for order in ("serial", "1f1b", "fused", "auto")},
    "one in stages": settings("1f1b", plan(ALL, ALL, ALL, {"mesh": 0}, BACKWARDS | {"zero_stage": 1}, {"mesh": 0})),
    "warmed none": {"critic_warmup": 1},
    "warmed fused": settings("fused", AGAINST, critic_warmup=1),
    "adapted none": ADAPTED,
    "adapted fused": settings("fused", AGAINST, **ADAPTED),
}
"""In the last one the actor's stages, their adapters off, are the reference."""
ON_FOUR: dict[str, dict[str, Any]] = {
    "none": {},
    "lines": settings("fused", plan(FOUR, LINES, FOUR, LINES, LINES, AGAINST_LINES)),
    "copies": settings("fused", plan(FOUR, FOUR, FOUR, FOUR, LINES | {"data": 1, "pipeline": 4}, COPIES)),
}
RESUMED = settings("fused", AGAINST, ema=0.5, ppo_kl_stop=1e9, kl={"coefficient": 0.05, "stop": 1e9})


def iterate(ranks, directory):
    """By plan: responses, metrics of updates, weights, the passes of the last optimiser step."""
    layers, work.VOCABULARY_SIZE = 3 if ranks.size == 2 else 4, 512
    if ranks.is_first:
        work.build_models(directory / "models", Size(hidden=32, layers=layers, heads=4, ffn=64))
    ranks.barrier()
    work.models = lambda size: work.Models(directory / "models" / "actor", directory / "models" / "reward")
    found = {}
    for name, asked in (ON_TWO if ranks.size == 2 else ON_FOUR).items():
        ppo = make_ppo(ranks, directory / name, asked)
        responses, rows = follow(ppo, range(1, ITERATIONS + 1), check=True)
        weights = {role: trained(ppo, role) for role in ("actor", "critic")}
        newest = ppo.roles.staged.newest
        passes = [event.operation[:2] for event in newest.events] if newest else []
        found[name] = {"responses": responses, "rows": rows, "weights": weights, "passes": passes}
        if name == "auto":
            found["choices"] = choices(ppo.roles.staged)
    chosen = found.pop("choices", None)
    return {"plans": found, "chosen": chosen, "resumed": go_on(ranks, directory, RESUMED) if chosen else None}


def choices(staged) -> dict[str, str]:
    """The order that is chosen, by what passes are said to take."""
    from training.pipelines.orders import Pipelines
    from training.pipelines.staged import Taken

    def choose(of_critic: float, micro_batches: int = 4, activation: float = 1.0) -> str:
        roles = {role: Pipelines.of(staged.layouts[f"{role}_train"], micro_batches) for role in ("actor", "critic")}
        seconds = {"actor": 1.0, "critic": of_critic}
        keys = itertools.product(seconds, (0, 1), (0, 1))
        staged.taken = {key: Taken(seconds[key[0]] * (1 + key[2]), 10, 1) for key in keys}
        staged.activations, staged.spare = dict.fromkeys(seconds, activation), 0.0
        staged._found.clear()
        return staged._orders(roles)[0]

    return {
        "alike": choose(1.0),
        "a small critic": choose(0.001),
        "no room for both": choose(1.0, micro_batches=1),
        "no activations": choose(1.0, micro_batches=1, activation=0.0),
    }


@pytest.fixture(scope="module", params=[2, 4])
def ran(request, tmp_path_factory):
    return run_ranks(__file__, "iterate", request.param, tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def outcome(ran):
    return [rank["plans"] for rank in ran]


def test_stages_learn_what_whole_models_do(outcome):
    for name in outcome[0]:
        expected = name.replace("fused", "none") if " " in name and name != "one in stages" else "none"
        for rank in outcome:
            assert rank[name]["responses"] == outcome[0][expected]["responses"], name
            assert rank[name]["rows"] == outcome[0][name]["rows"], name
        pairs = zip(*(itertools.chain(*outcome[0][each]["rows"]) for each in (name, expected)), strict=True)
        for row, other in pairs:
            assert row == pytest.approx(other, rel=1e-3, abs=1e-5), name
        for role in ("actor", "critic"):
            ours, theirs = (weights_of(outcome, each, role) for each in (name, expected))
            assert ours.keys() == theirs.keys() and ours
            for key, weight in ours.items():
                assert torch.allclose(weight, theirs[key], rtol=0, atol=1e-5), (name, role, key)


def test_orders_change_no_bit(outcome):
    for rank in outcome:
        if "serial" in rank:
            for order in ("1f1b", "fused", "auto"):
                assert [rank[order][key] for key in ("rows", "weights")] == [
                    rank["serial"][key] for key in ("rows", "weights")
                ]


def test_each_order_is_the_one_asked_for(outcome):
    for rank in outcome:
        for name in rank.keys() - {"none", "warmed none", "adapted none", "one in stages"}:
            passes = rank[name]["passes"]
            changes = sum(before[0] != after[0] for before, after in itertools.pairwise(passes))
            assert changes == 1 if name in ("serial", "1f1b") else changes > 1, (name, passes)
    if "serial" in outcome[0]:
        assert [kind for _, kind in outcome[0]["serial"]["passes"]] == [0, 1] * 5
        assert [kind for _, kind in outcome[0]["1f1b"]["passes"]] == [0, 0, 1, 0, 1, 1, 0, 1, 0, 1]


def test_auto_fuses_where_it_pays_and_there_is_room(ran):
    if ran[0]["chosen"] is None:
        pytest.skip("two ranks show it")
    for rank in ran:
        assert rank["chosen"] == {
            "alike": "fused", "a small critic": "1f1b", "no room for both": "1f1b", "no activations": "fused"
        }  # fmt: skip


def test_a_run_in_stages_goes_on_to_the_same_bits_and_leaves_its_models(ran):
    if len(ran) > 2:
        pytest.skip("two ranks show it")
    for rank in (each["resumed"] for each in ran):
        straight, resumed = rank["states"]
        assert rank["number"] == 1 and straight == resumed
    (_, actor, critic, ema, kept), left = ran[0]["resumed"]["states"][1], ran[0]["resumed"]["left"]
    assert actor and critic and ema and kept
    assert left == {"actor": actor, "ema": {key: torch.tensor(each).flatten().tolist() for key, each in ema.items()}}
