"""Step 3 by plans that cut layers into pipeline stages, against every call on all ranks, in all three orders."""

import itertools
from dataclasses import replace
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
ADAPTED = {"actor": LORA, "critic": LORA, "critic_warmup": 1}
GROUPED = {
    "advantage": "rloo",
    "samples_per_prompt": 2,
    "old_logprobs": "recompute",
    "actor": {"gradient_checkpointing": True},
    "ptx": {"coefficient": 0.5},
    "mini_batches": 4,
    "ppo_kl_stop": 1e-7,
}
ACTOR_ALONE = {"actor_generate": ALL, "actor_score": UNEVEN, "reference_score": FORWARDS, "reward_score": BACKWARDS}
POLICY_LOSS = {"iterations": 5, "ratio": "sequence", "loss_mean": "sequence", "clip_high": 0.3, "mask_truncated": True}
STOPPED = {"kl": {"coefficient": 0.05, "stop": 1e-6}}
RATES = {"actor": {"learning_rate": 1e-4}, "critic": {"learning_rate": 1e-3}}
"""Those of the preset `tiny`."""
APART = 1e-6
"""Weights at most, relative to their norm; what is found is 1e-8, after five iterations too."""
MOVED = 1000 * APART
"""Weights at least."""


def settings(order: str, plan: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"plan": plan, "fusion": {"training": order}, **others}


ON_TWO: dict[str, dict[str, Any]] = {
    "none": {},
    "long none": POLICY_LOSS,
    "long fused": settings("fused", AGAINST, **POLICY_LOSS),
    **{order: settings(order, AGAINST) for order in ("serial", "1f1b", "auto")},
    "one in stages": settings("1f1b", plan(ALL, ALL, ALL, {"mesh": 0}, BACKWARDS | {"zero_stage": 1}, {"mesh": 0})),
    "adapted none": ADAPTED,
    "adapted fused": settings("fused", AGAINST, **ADAPTED),
    "grouped none": GROUPED,
    "grouped fused": settings("fused", {**ACTOR_ALONE, "actor_train": UNEVEN}, **GROUPED),
    "half none": {"iterations": 1, "exact": False},
    "half fused": settings("fused", AGAINST | {"actor_score": UNEVEN}, iterations=1, exact=False),
    "stopped none": STOPPED,
    "stopped fused": settings("fused", AGAINST, **STOPPED),
}
"""Under "adapted fused" the actor's stages, their adapters off, are the reference; one role alone cannot be fused."""
ON_FOUR: dict[str, dict[str, Any]] = {
    "none": {},
    "lines": settings("fused", plan(FOUR, LINES, FOUR, LINES, LINES, AGAINST_LINES)),
    "copies": settings("fused", plan(FOUR, FOUR, FOUR, FOUR, LINES | {"data": 1, "pipeline": 4}, COPIES)),
}
RESUMED = settings("fused", AGAINST, **RATES, ema=0.5, ppo_kl_stop=1e9, kl={"coefficient": 0.05, "stop": 1e9})


def iterate(ranks, directory):
    """By plan: responses, metrics of updates, weights and how far they moved, the passes of the last optimiser step."""
    from training.merging import merge

    layers, work.VOCABULARY_SIZE = 3 if ranks.size == 2 else 4, 512
    if ranks.is_first:
        work.build_models(directory / "models", Size(hidden=32, layers=layers, heads=4, ffn=64))
    ranks.barrier()
    work.models = lambda size: work.Models(directory / "models" / "actor", directory / "models" / "reward")
    found = {}
    for name, asked in (ON_TWO if ranks.size == 2 else ON_FOUR).items():
        write_demonstrations(ranks, directory / name)
        asked_for = merge(RATES | {"rollouts_every": 1}, asked)
        ppo = make_ppo(ranks, directory / name, asked_for, "bf16" if name.startswith("half") else "fp32")
        if name != "auto":  # schedules must not hang on what a busy machine measures
            ppo.roles.staged.learn = dict
        if name.startswith("long"):
            ppo.reward = half_ended(ppo.reward)
        start = {role: engine.trained_weights() for role, engine in ppo.roles._engines.items()}
        responses, rows = follow(ppo, range(1, asked.get("iterations", ITERATIONS) + 1), check=True)
        if name.startswith("stopped"):
            ppo.end_inside(ppo.inside, ITERATIONS, stopped=True)
        weights = {role: trained(ppo, role) for role in ("actor", "critic")}
        moved = {role: distance(ppo.roles._engines[role].trained_weights(), each) for role, each in start.items()}
        newest = ppo.roles.staged.newest
        passes = [event.operation[:2] for event in newest.events] if newest else []
        found[name] = {"responses": responses, "rows": rows, "moved": moved, "weights": weights, "passes": passes}
        found[name]["samples"] = ppo.sample_lines.read() if ranks.is_first else []
        if name == "auto":
            found["choices"] = choices(ppo.roles.staged)
    chosen = found.pop("choices", None)
    return {"plans": found, "chosen": chosen, "resumed": go_on(ranks, directory, RESUMED) if chosen else None}


def half_ended(reward):
    """With every other sample truncated."""

    def other(experience, *given):
        return reward([replace(each, ended=each.index % 2 == 0) for each in experience], *given)

    return other


def distance(ours, theirs) -> float:
    """Of all weights together, relative to the norm of theirs; 0 where there are none."""
    norms = [
        torch.cat([torch.zeros(1), *(each[key].flatten() for key in theirs)]).norm()
        for each in ({key: ours[key].flatten() - theirs[key].flatten() for key in theirs}, theirs)
    ]
    return float(norms[0] / norms[1].clamp_min(1e-30))


def write_demonstrations(ranks, run) -> None:
    from training.data.rows import write_rows
    from training.run_directory import RunDirectory

    if ranks.is_first:
        answers = ("word9", "word8 " * 4, "word7 " * 6)
        rows = [{"prompt": [{"role": "user", "content": answer}], "response": answer} for answer in answers]
        file = RunDirectory(run).data / "sft_train.jsonl"
        file.parent.mkdir(parents=True)
        write_rows(file, rows)
    ranks.barrier()


def choices(staged) -> dict[str, str]:
    """The order that is chosen, by what passes are said to take."""
    from training.pipelines.orders import Pipelines
    from training.pipelines.staged import Measurement

    def choose(of_critic: float, micro_batches: int = 4, activation: float = 1.0) -> str:
        roles = {role: Pipelines.of(staged.layouts[f"{role}_train"], micro_batches) for role in ("actor", "critic")}
        seconds = {"actor": 1.0, "critic": of_critic}
        keys = itertools.product(seconds, (0, 1), (0, 1))
        staged.measured = {key: Measurement(seconds[key[0]] * (1 + key[2]), 10, 1) for key in keys}
        staged.activations, staged.spare = dict.fromkeys(seconds, activation), 0.0
        staged._orders.clear()
        return staged._order(roles)[0]

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


def whole(name: str) -> str:
    """The run on whole models that one by a plan is compared with."""
    return name.replace("fused", "none") if " " in name and name != "one in stages" else "none"


def test_stages_learn_what_whole_models_do(outcome):
    for name in outcome[0]:
        expected = whole(name)
        for rank in outcome:
            assert rank[name]["responses"] == outcome[0][expected]["responses"], name
            assert rank[name]["rows"] == outcome[0][name]["rows"], name
        pairs = zip(*(itertools.chain(*outcome[0][each]["rows"]) for each in (name, expected)), strict=True)
        in_bf16 = name.startswith("half")
        for row, other in pairs:
            assert row == pytest.approx(other, **({"rel": 0.1, "abs": 1e-2} if in_bf16 else {"rel": 1e-3, "abs": 1e-5}))
        for role in ("actor",) if name.startswith("grouped") else ("actor", "critic"):
            ours, theirs = (weights_of(outcome, each, role) for each in (name, expected))
            assert ours.keys() == theirs.keys() and ours
            moved = max(rank[name]["moved"].get(role, 0.0) for rank in outcome)
            if (name.split()[0], role) == ("stopped", "actor"):
                assert moved == 0, name  # the model before the update that went too far
            else:
                assert moved > MOVED, (name, role)
            assert distance(ours, theirs) <= (0.03 * moved if in_bf16 else APART), (name, role)


def test_what_is_written_of_every_sample_is_what_whole_models_write(outcome):
    for name in outcome[0].keys() - {"half none", "half fused"}:
        lines, others = (outcome[0][each]["samples"] for each in (name, whole(name)))
        drawn = [response for responses in outcome[0][name]["responses"] for response in responses]
        assert [line["response_ids"] for line in lines] == drawn, name
        assert ("values" in lines[0]) != name.startswith("grouped")
        for line, other in zip(lines, others, strict=True):
            assert line.keys() == other.keys() and any(line["advantages"])
            for key, value in line.items():
                is_number = key in ("logprobs", "kl", "values", "advantages") or isinstance(value, float)
                assert value == (pytest.approx(other[key], rel=1e-3, abs=3e-5) if is_number else other[key]), (
                    name,
                    key,
                )


def test_runs_that_stop_by_their_kl_stop_in_stages_too(outcome):
    for rank in outcome:
        if "stopped fused" in rank:
            assert [len(rows) for rows in rank["stopped fused"]["rows"]] == [2, 0]
            assert [len(rows) for rows in rank["grouped fused"]["rows"]] == [2, 2]  # of four mini-batches
            assert rank["grouped fused"]["rows"][0][0]["ptx/loss"] > 1


def test_orders_change_no_bit(outcome):
    for rank in outcome:
        if "serial" in rank:
            for order in ("1f1b", "auto"):
                assert [rank[order][key] for key in ("rows", "weights")] == [
                    rank["serial"][key] for key in ("rows", "weights")
                ]


def test_each_order_is_the_one_asked_for(outcome):
    for name in outcome[0].keys() - {"auto", "one in stages", "grouped fused"}:
        if name.endswith("none"):
            continue
        passes = [rank[name]["passes"] for rank in outcome]
        changes = [sum(a[0] != b[0] for a, b in itertools.pairwise(each)) for each in passes]
        assert set(changes) == {1} if name in ("serial", "1f1b") else max(changes) > 1, (name, passes)
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
