"""The loop of PPO on real engines: warm-up, adaptive KL, the end by KL, the gate, and what a resumed run does alike."""

import json
import math
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from tests.ranks import run_ranks
from tests.training.step3_rlhf.test_ppo_updates import make_models
from training.steps import PPO

PROMPTS = 5
"""In the data; iterations take three at a time, so epochs end within iterations."""
BASE = {
    "iterations": 4,
    "prompts_per_iteration": 3,
    "mini_batches": 2,
    "samples_every": 100,
    "sample_prompts": 1,
    "checkpoint_every": 1,
    "missing_end_penalty": 0.5,
    "actor": {"learning_rate": 1e-2, "warmup": 0},
    "critic": {"learning_rate": 1e-3, "warmup": 0},
    "fusion": {"mode": "none"},
}
WARM = {
    **BASE,
    "critic_warmup": 2,
    "rollouts_every": 1,
    "iterations": 5,
    "ema": 0.5,
    "kl": {"coefficient": 0.1, "target": 0.5, "horizon": 10},
    "reward_weights": {"model": 0.5, "function": 2.0},
    "temperature": 0.9,
    "min_response_tokens": 3,
}
FREE = {
    **BASE,
    "iterations": 4,
    "ema": 0.5,
    "kl": {"stop": 1e6},
    "actor": {"learning_rate": 1e-2, "warmup": 0, "schedule": "constant"},
    "critic": {"learning_rate": 1e-3, "warmup": 0, "schedule": "constant"},
    "checkpoint_every": 0,
}
"""Whose KL shows where a bound ends another run."""
POLICY_LOSS = {"ratio": "sequence", "loss_mean": "constant", "clip_high": 0.3}
NO_KL = {**BASE, "iterations": 2, "kl": {"coefficient": 0}, **POLICY_LOSS}
NO_ROLE_SCORES = {
    **NO_KL,
    "advantage": "grpo",
    "samples_per_prompt": 2,
    "reward_weights": {"model": 0},
    "iterations": 1,
    "checkpoint_every": 0,
    "actor": {"learning_rate": 1e-2, "warmup": 0, "lora": {"rank": 2}},
}
BY_NAME = {
    **BASE,
    "advantage": "reinforce++",
    "iterations": 12,
    "samples_per_prompt": 8,
    "mini_batches": 1,
    "missing_end_penalty": 0,
    "kl": {"coefficient": 0},
    "reward_weights": {"model": 0},
    "reward_function": ["regex:[A-Z]=2", "length:..1=0.5"],
    "actor": {"learning_rate": 1e-2, "warmup": 0, "schedule": "constant"},
    "eval_every": 12,
    "eval_prompts": 4,
    "rollouts_every": 12,
    "checkpoint_every": 6,
}
SAMPLING = ("max_tokens", "temperature", "min_tokens")
LOW = {"stop": 1e-3}
TIMES = ("time/", "plan/", "tokens_per_second", "memory/")


class Killed(Exception):
    """In place of a kill."""


def run_step(
    ranks, directory, models, settings: dict, killed_in: int = 0, terminated_in: int = 0, dtype: str = "fp32"
) -> SimpleNamespace:
    """All of step 3 in `directory`, up to the middle of iteration `killed_in`, or to SIGTERM in one; what is left."""
    from tests.training.planner.test_machine import PROFILE
    from training.config import RunConfig
    from training.run_directory import RunDirectory
    from training.stage import make_stage
    from training.step3_rlhf import ppo, roles, timing
    from training.step3_rlhf.rollout import Rollout
    from training.termination import TERMINATION, Terminated

    sft, reward, _ = models
    config = RunConfig.model_validate(
        {
            "model": str(sft),
            "sft_model": str(sft),
            "trained_reward_model": str(reward),
            "dtype": dtype,
            "threads": 1,
            "data": {"max_prompt_tokens": 24, "max_response_tokens": 6},
            "rlhf": settings,
        }
    )
    run = RunDirectory(directory)
    run.step(PPO).path.mkdir(parents=True, exist_ok=True)
    run.write_config(config, {})
    stage = make_stage(run, PPO, config, ranks)
    prompts = [[{"role": "user", "content": f"{'very ' * n}short?"}] for n in range(PROMPTS)]
    rows = [{"prompt": prompt, "extra": {"number": n}} for n, prompt in enumerate(prompts)]
    stage.rows = lambda chat_format: (rows, rows)
    stage.said = []
    stage.display.say = stage.said.append
    seen = SimpleNamespace(stage=stage, weights=[], averages=[], averaged=[], values=[], scorers={})
    iterate, score, ask = ppo.PPO.iterate, Rollout.score, roles.Roles.score

    def noted(self, experience):
        experience = score(self, experience)
        seen.values.append(float(torch.cat([each.values for each in experience]).mean()))
        return experience

    def watched(trainer, number, check):
        if number == killed_in:
            raise Killed
        TERMINATION.is_asked = number == terminated_in
        seen.trainer = trainer
        updates = [0]
        if trainer.roles.ema is not None:
            average = trainer.roles.ema.update
            trainer.roles.ema.update = lambda: (updates.__setitem__(0, updates[0] + 1), average())
        found = iterate(trainer, number, check)
        seen.mini_batches = found.mini_batches
        if trainer.roles.ema is not None:
            del trainer.roles.ema.update
            seen.averaged.append(norms(trainer.roles.ema.weights()))
        seen.averages.append(updates[0])
        seen.weights.append(norms(trainer.roles.actor.trained_weights()))
        return found

    def asked(self, role, batch):
        seen.scorers[role] = True
        return ask(self, role, batch)

    with (
        patch.object(ppo.PPO, "iterate", watched),
        patch.object(Rollout, "score", noted),
        patch.object(roles.Roles, "score", asked),
        patch.object(roles, "load_causal_lm", wraps=roles.load_causal_lm) as loads,
        patch.object(timing, "cluster_here", lambda *_: (PROFILE.cluster, "a test")),
    ):
        try:
            ppo.train(stage)
        except (Killed, Terminated):
            TERMINATION.is_asked = False
            return seen
    seen.loaded = loads.call_count
    if ranks.is_first:
        seen.metrics = [json.loads(line) for line in (run.step(PPO).path / "metrics.jsonl").read_text().splitlines()]
        seen.result = run.step(PPO).read_result()
        seen.model = norms(saved(run.step(PPO).model))
        seen.ema_model = norms(saved(run.step(PPO).ema_model)) if settings.get("ema") else None
    return seen


def saved(directory) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def of_checkpoint(directory, number: int) -> dict[str, float]:
    from training.checkpoints import checkpoint_of

    return norms(saved(checkpoint_of(f"{directory}@{number}").model()))


def norms(weights: dict[str, torch.Tensor]) -> dict[str, float]:
    """Numbers that tell two sets of weights apart."""
    return {name: float(weight.double().sum() + weight.double().norm()) for name, weight in sorted(weights.items())}


def told(seen: SimpleNamespace) -> dict:
    """What goes back to the test."""
    names = (
        "metrics",
        "result",
        "model",
        "ema_model",
        "weights",
        "averages",
        "averaged",
        "values",
        "scorers",
        "loaded",
    )
    return {name: getattr(seen, name, None) for name in names} | {
        "said": seen.stage.said,
        "sampling": [getattr(seen.trainer.rollouts.sampling, name) for name in SAMPLING],
        "rollouts": rollouts.read_text() if (rollouts := seen.stage.directory.rollouts_file).exists() else "",
        "updates": [json.loads(line) for line in open(seen.stage.directory.path / "updates.jsonl", encoding="utf-8")],
        "numbers": [len(seen.mini_batches), seen.trainer.roles.critic_scale],
    }


def run_alone(ranks, directory):
    """One process, ZeRO 0: whole runs, and such that were killed and went on."""
    sft, reward, chat_format = make_models(ranks, directory)
    foreign = without_scale(reward, directory / "foreign")
    scorer = directory / "scorer.py"
    scorer.write_text("def score(prompts, responses, rows):\n    return [100 + 7 * len(r) for r in responses]\n")
    warm = {**WARM, "reward_function": f"{scorer}:score"}
    found = {}
    models = sft, foreign, chat_format
    found["warm"] = told(run_step(ranks, directory / "warm", models, warm))
    found["warm"] |= {f"model {number}": of_checkpoint(directory / "warm", number) for number in (4, 5)}
    ended = run_step(ranks, directory / "killed", models, {**warm, "checkpoint_every": 0}, terminated_in=2)
    kept = ended.stage.checkpoints.numbers()
    halted = run_step(ranks, directory / "killed", models, warm, killed_in=4)
    with open(halted.stage.directory.rollouts_file, "a", encoding="utf-8") as later:
        later.write('{"number": 4, "sample": 0}\n{"number": 4, "sam')
    found["warm, killed"] = told(run_step(ranks, directory / "killed", models, warm)) | {"terminated": kept}
    models = sft, reward, chat_format
    run_step(ranks, directory / "no-kl", models, NO_KL, killed_in=2)
    found["no kl, killed"] = told(run_step(ranks, directory / "no-kl", models, NO_KL))
    measured = {**NO_KL, "kl": {"coefficient": 0, "measure": True}, "checkpoint_every": 0}
    found["kl measured"] = told(run_step(ranks, directory / "measured", models, measured))
    none_scores = {**NO_ROLE_SCORES, "reward_function": f"{scorer}:score"}
    found["no role scores"] = told(run_step(ranks, directory / "no-scores", models, none_scores))
    found["free"] = told(run_step(ranks, directory / "free", models, FREE))
    stopped, bound = bound_of(found["free"]["metrics"])
    found["bound"] = told(run_step(ranks, directory / "bound", models, bound))
    shorter = {**bound, "iterations": stopped - 1}
    found["shorter"] = told(run_step(ranks, directory / "shorter", models, shorter))
    kept = {**bound, "checkpoint_every": 1}
    run_step(ranks, directory / "bound-killed", models, kept, killed_in=stopped)
    found["bound, killed"] = told(run_step(ranks, directory / "bound-killed", models, kept))
    return found


def run_by_name(ranks, directory):
    """One process: rewards by name, without a reward model."""
    models = make_models(ranks, directory)
    found = {"whole": told(run_step(ranks, directory / "whole", models, BY_NAME))}
    run_step(ranks, directory / "killed", models, BY_NAME, killed_in=8)
    return found | {"killed": told(run_step(ranks, directory / "killed", models, BY_NAME))}


def bound_of(metrics: list[dict]) -> tuple[int, dict]:
    """The first iteration from the third on whose KL is higher than all before, and settings that end there."""
    kls = [line["kl/reference"] for line in metrics]
    number = next(n for n in range(3, len(kls) + 1) if kls[n - 1] > 1.05 * max(kls[: n - 1]))
    return number, {**FREE, "kl": {"stop": (max(kls[: number - 1]) + kls[number - 1]) / 2}}


def without_scale(reward, directory):
    """A reward model that somebody else trained: no word of its scale in config.json."""
    import shutil

    shutil.copytree(reward, directory)
    config = json.loads((directory / "config.json").read_text())
    del config["score_shift"], config["score_scale"]
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def run_together(ranks, directory):
    """Two processes: the end by KL at every ZeRO stage, and with adapters."""
    from transformers import AutoModelForCausalLM

    from training.step3_rlhf.timing import Clock

    models = make_models(ranks, directory)
    found = {}
    free = run_step(ranks, directory / "free", models, FREE)
    _, bound = bound_of(ranks.gather(getattr(free, "metrics", None))[0])
    for zero, lora in ((1, 0), (3, 0), (3, 4)):  # stage 2 keeps weights as 1 does
        actor = {**FREE["actor"], "zero_stage": zero, "lora": {"rank": lora}}
        place = directory / f"bound{zero}{lora}"
        seen = run_step(ranks, place, models, {**bound, "actor": actor, **({"kl": LOW} if lora else {})})
        with torch.no_grad():  # what the engine answers with now, beside what was saved of it
            rollout = seen.trainer.rollouts.start(seen.trainer.prompts[:4], [0, 1, 2, 3], 1, Clock())
            batch = rollout.score(rollout.generate())
        if ranks.is_first:
            model = AutoModelForCausalLM.from_pretrained(place / "step3_rlhf" / "model").eval()
            apart = 0.0
            for each in batch:
                logits = model(torch.cat([each.prompt, each.response])[None]).logits[0, len(each.prompt) - 1 : -1]
                logprobs = logits.log_softmax(-1)[torch.arange(len(each.response)), each.response]
                apart = max(apart, float((logprobs - each.logprobs).detach().abs().max()))
            found[f"{zero} {lora}"] = told(seen) | {"apart": apart}
    for zero, dtype, exact in (
        (0, "fp32", True),
        (3, "fp32", True),
        (1, "bf16", True),
        (3, "bf16", True),
        (2, "bf16", False),
    ):
        lora = {"rank": 3 if zero in (1, 3) else 0}
        settings = {**FREE, "kl": {}, "ema": 0, "iterations": 2, "mini_batches": 1, "exact": exact}
        settings["checkpoint_every"] = 1
        settings["actor"] = {**FREE["actor"], "zero_stage": zero, "lora": lora}
        place = directory / f"exact{zero}{dtype}{exact}"
        seen = run_step(ranks, place, models, settings, dtype=dtype)
        if ranks.is_first:
            checked = json.loads((place / "step3_rlhf" / "first_update.json").read_text())
            found[f"{dtype} {zero} {exact}"] = told(seen) | {"checked": checked}
            found[f"{dtype} {zero} {exact}"] |= {f"model {number}": of_checkpoint(place, number) for number in (1, 2)}
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_ranks(__file__, "run_alone", 1, tmp_path_factory.mktemp("loop"))[0]


@pytest.fixture(scope="module")
def by_name(tmp_path_factory):
    return run_ranks(__file__, "run_by_name", 1, tmp_path_factory.mktemp("loop"))[0]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    return run_ranks(__file__, "run_together", 2, tmp_path_factory.mktemp("loop"))[0]


def learning(metrics: list[dict]) -> list[dict]:
    """Without what depends on the machine."""
    return [{name: value for name, value in line.items() if not name.startswith(TIMES)} for line in metrics]


def test_the_actor_rests_in_the_warm_up_and_learns_after_it(alone):
    warm = alone["warm"]
    first, second, third, *_, last = warm["weights"]
    assert first == second != third != last
    assert warm["averages"] == [0, 0, 2, 2, 2]  # an average a step of the actor, none before
    assert [("policy/loss" in line, "value/loss" in line) for line in warm["metrics"]] == [(False, True)] * 2 + [
        (True, True)
    ] * 3
    assert warm["model"] != warm["ema_model"]


def test_samples_are_drawn_as_asked_and_the_ratio_starts_at_one(alone):
    """With a least length, generation draws from another distribution: its log-probabilities are computed anew."""
    assert alone["warm"]["sampling"] == [6, 0.9, 3]
    assert alone["free"]["sampling"] == [6, 1.0, 0]
    for run in ("warm", "free"):
        lines = [line for line in alone[run]["updates"] if "kl/old_k3" in line]
        first = [line["kl/old_k3"] for line in lines if line["mini_batch"] == 0]
        second = [line["kl/old_k3"] for line in lines if line["mini_batch"] == 1]
        assert max(first) < 1e-6 < min(second), run


def test_what_was_predicted_of_each_call_is_told_beside_what_it_took(alone):
    run = alone["warm"]
    for line in run["metrics"]:
        told = {key: value for key, value in line.items() if key.startswith("plan/")}
        calls = ["actor_generate", "actor_score", "reference_score", "reward_score", "critic_score", "critic_train"]
        calls += ["actor_train"] * (line["number"] > 2)  # it rests in the warm-up
        assert set(told) == {f"plan/{c}/{k}" for c in [*calls, "iteration"] for k in ("predicted", "achieved")}
        assert all(value > 0 for value in told.values())
        parts = sum(told[f"plan/{call}/achieved"] for call in calls)
        assert parts < told["plan/iteration/achieved"]
        parts = sum(told[f"plan/{call}/predicted"] for call in calls)  # one after the other on one rank
        assert parts == pytest.approx(told["plan/iteration/predicted"])


def test_the_schedules_end_with_the_run(alone):
    """Linear to 0: the actor's over 3 iterations of 2 optimiser steps, the critic's over 5."""
    actor = [line["policy/lr"] for line in alone["warm"]["metrics"][2:]]
    critic = [line["value/lr"] for line in alone["warm"]["metrics"]]
    assert actor == pytest.approx([1e-2 * (1 - step / 6) for step in (1, 3, 5)])
    assert critic == pytest.approx([1e-3 * (1 - step / 10) for step in (1, 3, 5, 7, 9)])


def test_the_coefficient_follows_the_kl_of_each_iteration(alone):
    metrics, expected = alone["warm"]["metrics"], 0.1
    for line in metrics:
        assert line["kl/coefficient"] == pytest.approx(expected)
        error = max(-0.2, min(0.2, line["kl/reference"] / 0.5 - 1))
        expected *= 1 + error * 3 / 10
    assert alone["warm"]["result"]["kl_coefficient"] == pytest.approx(expected)
    assert len({line["kl/coefficient"] for line in metrics}) == len(metrics)


def test_a_line_for_every_sample_says_what_came_of_it(alone):
    lines = [json.loads(line) for line in alone["warm"]["rollouts"].splitlines()]
    assert [(line["number"], line["sample"]) for line in lines] == [(n, i) for n in range(1, 6) for i in range(3)]

    def means(of) -> list[float]:
        """Of each iteration's lines, or of all their tokens."""
        found = [[of(line) for line in lines if line["number"] == number] for number in range(1, 6)]
        flat = [[x for each in values for x in (each if isinstance(each, list) else [each])] for values in found]
        return [sum(each) / len(each) for each in flat]

    for metric, of in {
        "reward/total": lambda line: line["reward/total"],
        "reward/model_mean": lambda line: line["reward/model"],
        "reward/function_mean": lambda line: line["reward/function"],
        "kl/reference_k1": lambda line: sum(line["kl"]),
        "value/mean": lambda line: line["values"],
        "advantage/mean": lambda line: line["advantages"],
        "response/ended_fraction": lambda line: not line["truncated"],
        "response/length_mean": lambda line: len(line["response_ids"]),
    }.items():
        assert means(of) == pytest.approx([row[metric] for row in alone["warm"]["metrics"]], abs=1e-4), metric
    for line in lines:
        parts = [line[f"reward/{part}"] for part in ("score", "missing_end", "kl")]
        assert line["reward/total"] == pytest.approx(sum(parts), abs=2e-5)
        assert line["reward/missing_end"] == -0.5 * line["truncated"]
        assert "".join(line["tokens"]) == line["response"] and "short?" in line["prompt"]
        assert {len(line[name]) for name in ("tokens", "logprobs", "kl", "values", "advantages")} == {
            len(line["response_ids"])
        }


def test_a_run_that_was_killed_ends_as_one_that_was_not(alone):
    """To the bit: weights, average, coefficient, and the statistics that bring rewards onto one scale."""
    whole, resumed = alone["warm"], alone["warm, killed"]
    assert resumed["rollouts"] == whole["rollouts"]
    assert resumed["terminated"] == [2]
    assert learning(resumed["metrics"]) == learning(whole["metrics"])
    assert (resumed["model"], resumed["ema_model"]) == (whole["model"], whole["ema_model"])
    assert resumed["result"]["kl_coefficient"] == whole["result"]["kl_coefficient"]
    assert resumed["numbers"] == whole["numbers"]


def test_a_checkpoint_opens_as_the_model_that_the_step_would_have_left_there(alone, together):
    """With adapters and without, in fp32 and bf16, at each ZeRO stage, whole and in parts of two ranks."""
    warm = alone["warm"]
    assert warm["model 5"] == warm["model"] and warm["model 4"] == warm["weights"][3]
    for run in ("fp32 0 True", "fp32 3 True", "bf16 1 True", "bf16 3 True", "bf16 2 False"):
        assert together[run]["model 2"] == together[run]["model"] != together[run]["model 1"], run


def test_training_equals_generation_to_the_bit(together):
    """At every iteration, on two ranks, with adapters and without; then nothing is scored anew."""
    for run in ("fp32 0 True", "fp32 3 True", "bf16 1 True", "bf16 3 True"):
        found = together[run]
        assert [line["policy/generation_gap"] for line in found["metrics"]] == [0, 0], run
        assert found["checked"]["generation_logprob_difference"] == found["checked"]["ratio_error"] == 0, run
        assert found["metrics"][0]["kl/reference"] == 0 < found["metrics"][1]["kl/reference"], run
        assert "actor" not in found["scorers"] and any("equal to the bit" in line for line in found["said"]), run
    today = together["bf16 2 False"]
    assert all("policy/generation_gap" in line for line in today["metrics"]) and "actor" in today["scorers"]


OF_KL = {"kl/reference", "kl/reference_k1", "kl/reference_per_token", "kl/coefficient"}
OF_KL |= {"warning/kl", "warning/kl_far", "warning/kl_drift"}


def test_a_reference_that_nothing_needs_is_neither_loaded_nor_asked(alone):
    for name in ("no kl, killed", "no role scores"):
        run = alone[name]
        assert run["loaded"] == 1 and "reference" not in run["scorers"], name
        assert not any(OF_KL & line.keys() for line in run["metrics"]), name
        assert sum("no reference is loaded" in line for line in run["said"]) == 1, name
    assert set(alone["no kl, killed"]["scorers"]) == {"reward", "critic"} and not alone["no role scores"]["scorers"]


def test_kl_can_be_measured_where_nothing_needs_it_and_changes_nothing(alone):
    run, without = alone["kl measured"], alone["no kl, killed"]
    assert run["loaded"] == 2 and "reference" in run["scorers"]
    assert not any("no reference is loaded" in line for line in run["said"])
    for line, other in zip(learning(run["metrics"]), learning(without["metrics"]), strict=True):
        assert line.keys() - other.keys() == OF_KL
        assert {name: line[name] for name in other} == other
    assert run["metrics"][-1]["kl/reference"] > 0
    assert run["model"] == without["model"]


def test_scores_are_reported_as_given_and_learned_from_on_one_scale(alone):
    for line in alone["warm"]["metrics"]:
        assert 107 <= line["reward/function_mean"] <= 100 + 7 * 80
        expected = 2.0 * line["reward/function_mean"] + 0.5 * line["reward/model_mean"]
        assert line["reward/score_mean"] == pytest.approx(expected)
        assert abs(line["reward/total"]) < 10 and line["reward/clipped_fraction"] == 0
    (_, (shift, scale)) = alone["warm"]["numbers"]  # the critic starts as the reward model, on the scale of its scores
    first = alone["warm"]["metrics"][0]
    assert shift == pytest.approx(first["reward/model_mean"], abs=1e-6) and scale != 1
    assert first["value/mean"] == pytest.approx((alone["warm"]["values"][0] - shift) / scale, rel=1e-4)
    assert alone["warm"]["metrics"][1]["value/mean"] == pytest.approx(alone["warm"]["values"][1], rel=1e-4)


def test_a_reward_by_name_is_learned_in_seconds(by_name):
    first, *iterations, last = by_name["whole"]["metrics"]  # the first and the last are evaluations
    means = [line["reward/regex_mean"] for line in iterations]
    assert sum(means[-3:]) / 3 > sum(means[:3]) / 3 + 0.3
    assert last["eval/reward/regex"] > first["eval/reward/regex"] + 0.3


def test_several_rewards_are_told_apart_wherever_their_sum_is(by_name):
    for line in by_name["whole"]["metrics"]:
        if "eval/reward" in line:
            parts, total = [line[f"eval/reward/{name}"] for name in ("regex", "length")], line["eval/reward"]
        else:
            parts, total = [line[f"reward/{name}_mean"] for name in ("regex", "length")], line["reward/score_mean"]
        assert total == pytest.approx(2 * parts[0] + 0.5 * parts[1])
    for sample in map(json.loads, by_name["whole"]["rollouts"].splitlines()):
        text = sample["response"].removesuffix("<|end|>")
        assert sample["reward/regex"] == any("A" <= sign <= "Z" for sign in text)
        assert sample["reward/length"] == min(0, 1 - len(text.split()))


def test_a_run_with_several_rewards_that_was_killed_ends_as_one_that_was_not(by_name):
    whole, resumed = by_name["whole"], by_name["killed"]
    assert learning(resumed["metrics"]) == learning(whole["metrics"]) and resumed["model"] == whole["model"]


def test_no_model_outside_the_bound_is_left(alone):
    bound, stopped = alone["bound"], bound_of(alone["free"]["metrics"])[0]
    assert len(bound["metrics"]) == stopped  # whose samples show the KL of what the update before made
    assert "policy/loss" not in bound["metrics"][-1]
    assert bound["weights"][-1] == bound["weights"][-2]  # no update is made there
    assert bound["model"] == bound["weights"][stopped - 3] != bound["weights"][stopped - 2]
    assert f"stopped after iteration {stopped}: " in bound["said"][-1]
    assert f"the model is that of iteration {stopped - 2}" in bound["said"][-1]
    assert bound["result"]["iterations"] == stopped


def test_the_last_update_of_a_run_is_measured_too(alone):
    """Ending one iteration earlier, the run has made the same updates; its samples would have shown the KL."""
    bound, shorter, free = alone["bound"], alone["shorter"], alone["free"]
    assert shorter["weights"] == bound["weights"][:-1] and "policy/loss" in shorter["metrics"][-1]
    assert shorter["model"] == shorter["weights"][-2] == bound["model"] and "is undone: KL" in shorter["said"][-1]
    assert free["model"] == free["weights"][-1] != free["weights"][-2] and "within rlhf.kl.stop" in free["said"][-1]


def test_a_run_that_was_killed_before_the_end_by_kl_keeps_the_same_model(alone):
    bound, killed = alone["bound"], alone["bound, killed"]
    assert killed["model"] == bound["model"] and killed["ema_model"] == bound["ema_model"]
    assert learning(killed["metrics"]) == learning(bound["metrics"])


def test_the_average_goes_back_with_the_weights(alone):
    for run, updated in (("bound", -1), ("shorter", 0)):  # the last iteration of `bound` makes no update
        averaged = alone[run]["averaged"]
        assert alone[run]["ema_model"] == averaged[updated - 2] != averaged[updated - 1], run


@pytest.mark.parametrize("case", ["1 0", "3 0", "3 4"])
def test_two_ranks_go_back_at_every_zero_stage(together, case):
    found = together[case]
    stopped = len(found["metrics"])
    assert stopped >= 2 and "the model is that of iteration" in found["said"][-1]
    assert found["apart"] < 1e-4  # the engine has gone back with what was saved
    if case.endswith(" 0"):  # an adapter is saved merged, and seen apart
        same = {name: pytest.approx(value, abs=1e-5) for name, value in found["weights"][stopped - 3].items()}
        assert found["model"] == same
        assert found["model"] != {
            name: pytest.approx(value, abs=1e-5) for name, value in found["weights"][stopped - 2].items()
        }


def test_without_held_out_pairs_that_is_said(alone):
    assert any("hold out no pairs" in line for line in alone["warm"]["said"])


def test_numbers_stay_finite(alone):
    for run in alone.values():
        assert all(math.isfinite(value) for line in run["metrics"] for value in line.values())
