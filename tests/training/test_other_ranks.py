"""Runs of all steps that go on by other ranks, ZeRO stages and plans, against runs that stay as they were begun."""

import contextlib
import json
from typing import Any

import pytest
import torch

from benchmarks import work
from benchmarks.work import Size
from tests.ranks import run_ranks
from tests.supervised_steps import metrics_of, result_of, settings_of
from tests.training.step3_rlhf.test_plans import follow, make_ppo, plan
from training.run_directory import RunDirectory
from training.steps import DPO, REWARD, SFT

SUPERVISED = {
    SFT: ["sft.keep=best", "sft.eval_every=1"],
    REWARD: [
        "reward.optimizer.lora.rank=2",
        "reward.optimizer.lora.learning_rate=5e-3",
        "reward.eval_every=1",
        "reward.epochs=4",
    ],
    DPO: ["dpo.optimizer.lora.rank=2", "dpo.eval_every=1", "dpo.epochs=4"],
}
UPDATES = 4
ALL = {"mesh": "0-2", "data": 3}
STAGES = {"mesh": [0, 2], "pipeline": 2, "micro_batches": 2}
PARTS: list[dict[str, Any]] = [
    {"processes": 1, "zero_stage": 1, "rlhf": {"fusion": {"mode": "inter"}}},
    {"processes": 3, "zero_stage": 3, "rlhf": {"plan": plan(ALL, ALL, {"mesh": 1}, {"mesh": 1}, STAGES, {"mesh": 1})}},
    {
        "processes": 2,
        "zero_stage": 2,
        "rlhf": {"actor": {"zero_stage": 2}, "critic": {"zero_stage": 1}, "fusion": {"mode": "inter"}},
    },
    {"processes": 1, "zero_stage": 0, "rlhf": {}},
]
"""Of a run, each an update long: its processes, the ZeRO stage of supervised steps, where those of PPO lie."""
COMMON = {"iterations": UPDATES, "ema": 0.5, "kl": {"coefficient": 0.05, "stop": 1e9}}


def go_on(ranks, directory):
    """The next part of each run; alone on the first rank, the runs that stay as they are as well. PPO's responses."""
    part = json.loads((directory / "part.json").read_text())
    work.VOCABULARY_SIZE = 512
    work.models = lambda size: work.Models(directory / "models" / "actor", directory / "models" / "reward")
    if part["number"] == 1:
        work.build_models(directory / "models", Size(hidden=32, layers=3, heads=4, ffn=64))
        for step in SUPERVISED:
            train(ranks, directory / f"same {step.command}", step, 0, UPDATES)
        ppo = make_ppo(ranks, directory / "same rlhf", COMMON)
        keep(directory, "same", follow(ppo, range(1, UPDATES + 1), check=True))
    for step in SUPERVISED:
        train(ranks, directory / step.command, step, part["zero_stage"], part["number"])
    go_on_with_ppo(ranks, directory, part)


def train(ranks, place, step, zero_stage: int, until: int) -> None:
    """Go on with a supervised step, which is killed behind optimiser step `until` unless it is the last."""
    from tests.supervised_steps import make_run, stage_of
    from tests.training.step1_sft import test_sft
    from tests.training.step2_reward import test_reward
    from training import supervised
    from training.step1_sft import sft
    from training.step2_dpo import dpo
    from training.step2_reward import reward

    rows, work_of = {SFT: (test_sft, sft), REWARD: (test_reward, reward), DPO: (test_reward, dpo)}[step]
    if ranks.is_first and not place.exists():
        make_run(place, step.rows.name, rows.TRAIN, rows.HELD_OUT)
    ranks.barrier()
    name, model = step.command, place.parent / "models" / "actor"
    ours = [f"model={model}", f"sft_model={model}", "threads=1", *settings_of(name), *SUPERVISED[step]]
    changes = [f"{name}.checkpoint_every=1", f"{name}.optimizer.zero_stage={zero_stage}", f"processes={ranks.size}"]
    changes += ["sft_model="] if step is SFT else []
    train_batch = supervised.train_batch

    def until_killed(stage, task, batch, budget, number):
        if until < number:
            raise KeyboardInterrupt
        return train_batch(stage, task, batch, budget, number)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(supervised, "train_batch", until_killed)
        work_of.train(stage_of(RunDirectory(place), step, [*ours, *changes], ranks))


def go_on_with_ppo(ranks, directory, part: dict[str, Any]) -> None:
    from training.merging import merge

    number = part["number"]
    ppo = make_ppo(ranks, directory / "rlhf", merge(COMMON, part["rlhf"]))
    if number > 1:
        ppo.resume()
        keep_weights(directory, f"{number} kept", ppo)
        ppo.inside.put_back()
        keep_weights(directory, f"{number} inside", ppo)
        assert ppo.resume() == (number - 1, False)
    keep_weights(directory, f"{number} begun", ppo)
    found = follow(ppo, range(number, number + 1), check=True)
    keep_weights(directory, f"{number} ended", ppo)
    ppo.save(number, stopped=False)
    if ranks.is_first:
        keep(directory, f"{number}", found)


def keep(directory, name: str, found: Any) -> None:
    (directory / f"{name}.json").write_text(json.dumps(found))


def keep_weights(directory, name: str, ppo) -> None:
    """Of actor, critic and average, by the rank that gets them."""
    found = {role: engine.trained_weights() for role, engine in ppo.roles._engines.items()}
    found |= {"ema": ppo.roles.ema.weights()} if ppo.roles.ema is not None else {}
    for role, weights in found.items():
        if weights:
            torch.save(weights, directory / f"{name} {role}.pt")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("elsewhere")
    for number, part in enumerate(PARTS, 1):
        (directory / "part.json").write_text(json.dumps({**part, "number": number}))
        run_ranks(__file__, "go_on", part["processes"], directory)
    return directory


@pytest.mark.parametrize("step", SUPERVISED, ids=lambda step: step.command)
def test_supervised_steps_go_on_by_other_ranks_and_zero_stages(directory, step):
    (ours, evaluations), (theirs, others) = (
        metrics_of(RunDirectory(directory / name), step) for name in (step.command, f"same {step.command}")
    )
    assert len(ours) == len(theirs) == UPDATES
    for row, other in zip((*ours, *evaluations), (*theirs, *others), strict=True):
        assert row == pytest.approx(other, rel=1e-5, abs=1e-6)
    for row, other in zip(ours[:2], theirs[:2], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-6)
    results = [result_of(RunDirectory(directory / name), step) for name in (step.command, f"same {step.command}")]
    ours, theirs = ({k: v for k, v in result.items() if isinstance(v, float | int)} for result in results)
    assert ours == pytest.approx(theirs | {"seconds": ours["seconds"]}, rel=1e-5, abs=1e-7)


def test_ppo_goes_on_by_other_ranks_and_plans(directory):
    responses, rows = json.loads((directory / "same.json").read_text())
    for number in range(1, UPDATES + 1):
        found, (updates,) = json.loads((directory / f"{number}.json").read_text())
        assert found == [responses[number - 1]], number
        for update, other in zip(updates, rows[number - 1], strict=True):
            assert update == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_all_that_ppo_has_learned_is_there_to_the_bit_elsewhere(directory):
    def weights(name: str, role: str) -> dict[str, torch.Tensor]:
        return torch.load(directory / f"{name} {role}.pt")

    for number in range(2, UPDATES + 1):
        for role in ("actor", "critic", "ema"):
            before, ended = (weights(f"{number - 1} {when}", role) for when in ("begun", "ended"))
            require_equal(ended, weights(f"{number} kept", role))
            require_equal(ended, weights(f"{number} begun", role))
            if role != "critic":
                require_equal(before, weights(f"{number} inside", role))
            assert any(not torch.equal(weight, ended[name]) for name, weight in before.items())


def require_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
