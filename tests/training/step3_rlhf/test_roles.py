"""The roles of step 3, on real DeepSpeed engines."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from applications.preset_store import load_preset
from benchmarks import work
from benchmarks.work import Lengths, Size
from inference.families import config_of
from inference.generation.cpu import BlockedWeights
from tests.ranks import run_ranks
from training.config_files import load_config
from training.data.batching import TokenBatch
from training.step3_rlhf.roles import settled, starting_scorer

SCORED = ("reference", "critic", "reward")


def score_inside_and_outside(ranks, directory):
    """Largest differences by call, and the layers that had blocked weights; called in a process of its own."""
    from benchmarks import our_ppo

    work.build_models(directory / "models", Size(hidden=32, layers=2, heads=4, ffn=64))
    work.models = lambda size: work.Models(directory / "models" / "actor", directory / "models" / "reward")
    lengths = Lengths(longest=5, spread=0.0)
    config = our_ppo.make_config("tiny", lengths, "fp32", "fp32", iterations=2, threads=1)
    ppo = our_ppo.make_ppo(config, lengths, directory / "run", ranks)
    roles = ppo.roles
    batch = TokenBatch.of(
        [(torch.tensor([5, 6, 7]), torch.tensor([8, 9])), (torch.tensor([4]), torch.tensor([3]))], ranks.device
    )
    blocked = []
    in_use = BlockedWeights.in_use

    def count(weights):
        blocked.append(len(weights.forwards))
        return in_use(weights)

    found = {}
    for state in ("fresh", "updated"):  # the critic's blocked weights must follow its updates
        plain = [*roles.logprobs([batch]), *(roles.score(role, [batch])[0] for role in SCORED)]
        with patch.object(BlockedWeights, "in_use", count), roles.scoring():
            inside = [*roles.logprobs([batch]), *(roles.score(role, [batch])[0] for role in SCORED)]
        found[state] = [float((a - b).abs().max()) for a, b in zip(plain, inside, strict=True)]
        ppo.iterate(1, check=False)
    return found, blocked


def test_scoring_on_blocked_weights_gives_what_the_plain_ones_give(tmp_path):
    found, blocked = run_ranks(__file__, "score_inside_and_outside", 1, tmp_path)[0]
    for actor, *others in found.values():
        assert actor == 0  # old log-probabilities come from the weights as training uses them
        assert max(others) < 1e-5
    linear = 2 * 6  # of a layer: query, key, value, output, two of the feed-forward part
    assert blocked == 2 * [
        linear + 1,
        linear + 1,
        linear + 1,
    ]  # reference (output head), reward and critic (score head)


LAYOUTS = {
    "whole": {},
    "generation, reference and reward in parts": {
        "generation_tensor_parallel": 2,
        "scoring_tensor_parallel": {"reference": 2, "reward": 2},
    },
    "critic in parts": {"scoring_tensor_parallel": {"critic": 2}},
    "critic in parts, trained under ZeRO 3": {
        "scoring_tensor_parallel": {"reference": 2, "reward": 2, "critic": 2},
        "critic": {"zero_stage": 3},
    },
}


def score_in_layouts(ranks, directory):
    """By layout: what each role makes of all ranks' rows before and after an iteration."""
    from benchmarks import our_ppo
    from training.config import RunConfig
    from training.merging import merge

    if ranks.is_first:
        work.build_models(directory / "models", Size(hidden=32, layers=2, heads=4, ffn=64))
    ranks.barrier()
    work.models = lambda size: work.Models(directory / "models" / "actor", directory / "models" / "reward")
    lengths = Lengths(longest=5, spread=0.0)
    of_ranks = [[([5, 6, 7], [8, 9]), ([4], [3])], [([9, 8], [7, 6, 5, 4])]]  # unlike, so that a mix-up shows
    ours, together = (
        TokenBatch.of([(torch.tensor(a), torch.tensor(b)) for a, b in rows], ranks.device)
        for rows in (of_ranks[ranks.rank], [*of_ranks[0], *of_ranks[1]])
    )
    found = {}

    def scored(roles, role: str, in_parts: bool) -> list[float]:
        if in_parts:  # ranks of a tensor-parallel group have the same rows
            return roles.score(role, [together])[0].tolist()
        return [score for scores in ranks.gather(roles.score(role, [ours])[0].tolist()) for score in scores]

    for number, (name, settings) in enumerate(LAYOUTS.items()):
        config = our_ppo.make_config("tiny", lengths, "fp32", "fp32", iterations=2, threads=1)
        config = RunConfig.model_validate(merge(config.model_dump(), {"processes": 2, "rlhf": settings}))
        ppo = our_ppo.make_ppo(config, lengths, directory / f"run{number}", ranks)
        roles, states = ppo.roles, []
        for _ in range(2):
            with roles.scoring():
                in_parts = settings.get("scoring_tensor_parallel", {})
                states.append([scored(roles, role, role in in_parts) for role in ("reference", "reward", "critic")])
            metrics = ppo.iterate(1, check=False).metrics
        whole = sum(p.numel() for p in ppo.roles.actor.module.parameters())
        held = sum(p.numel() for p in roles._scoring["reference"].parameters())
        found[name] = states, metrics["value/loss"], held / whole
    return found


def test_roles_score_alike_in_layouts_of_their_own(tmp_path):
    for found in run_ranks(__file__, "score_in_layouts", 2, tmp_path):
        (before, after), loss, _ = found["whole"]
        assert before[2] != after[2]  # the critic has learned in between
        for name in LAYOUTS:
            states, loss_there, held = found[name]
            for there, whole in zip(states, (before, after), strict=True):
                for values, expected in zip(there, whole, strict=True):
                    assert values == pytest.approx(expected, abs=1e-5), name
            assert loss_there == pytest.approx(loss, rel=1e-4)
            assert (held < 0.75) == ("reference" in LAYOUTS[name].get("scoring_tensor_parallel", {}))


FUNCTION = ["rlhf.reward_function=a.py:f", "rlhf.reward_weights.model=0"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], "step 2"),
        (["trained_reward_model=t", "rlhf.reward_function=a.py:f"], "step 2"),  # which is t then
        (["rlhf.advantage=reinforce++"], "step 2"),
        (FUNCTION, "base"),
        ([*FUNCTION, "reward.initialize_from=sft"], "step 1"),
        ([*FUNCTION, "trained_reward_model=t"], "step 2"),
        ([*FUNCTION, "rlhf.advantage=reinforce++"], "None"),
        ([*FUNCTION, "rlhf.advantage=reinforce++", "trained_reward_model=t"], "None"),
    ],
)
def test_what_reward_model_and_critic_start_as(given, expected):
    config = load_config([], ["model=m", "reward_model=base", *given])
    stage = SimpleNamespace(config=config, earlier_model=lambda step: Path(f"step {step.number}"), model_directory=Path)
    assert str(starting_scorer(stage)) == expected


def test_slots_follow_the_gpu_with_the_least_free_memory(tmp_path, monkeypatch):
    for name, preset in (("actor", "opt-13b"), ("scorer", "opt-350m")):
        config_of(load_preset(preset)["architecture"]["model"]).save_pretrained(tmp_path / name)
    config = load_config([], ["model=any", "rlhf.prompts_per_iteration=4096", "rlhf.actor.lora.rank=8"])

    def slots_with(*free_gib: int, device: str = "cuda") -> int | str:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_gib[0] * 2**30, 200 * 2**30))
        others = [gib * 2**30 for gib in free_gib[1:]]
        ranks = SimpleNamespace(device=torch.device(device), size=2, gather=lambda value, phase: [value, *others])
        stage: Any = SimpleNamespace(config=config, ranks=ranks, dtype=torch.bfloat16)
        models = tmp_path / "actor", tmp_path / "scorer", tmp_path / "actor"
        return settled(stage, config.rlhf.calls, *models).rlhf.generation_batch

    assert 1 < slots_with(120, 80) == slots_with(80, 120) < slots_with(120, 120) < 2048
    assert slots_with(120, 120, device="cpu") == "auto"
