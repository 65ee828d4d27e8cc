"""The roles of step 3, on real DeepSpeed engines."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from benchmarks import work
from benchmarks.work import Lengths, Size
from inference.generation.cpu_weights import BlockedWeights
from tests.ranks import run_ranks
from training.config_files import load_config
from training.data.batching import TokenBatch
from training.step3_rlhf.roles import starting_scorer


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
        plain = [call(batch) for call in (roles.logprobs, roles.reference_logprobs, roles.values, roles.scores)]
        with patch.object(BlockedWeights, "in_use", count), roles.scoring():
            inside = [call(batch) for call in (roles.logprobs, roles.reference_logprobs, roles.values, roles.scores)]
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
    stage = SimpleNamespace(config=config, earlier_model=lambda step: Path(f"step {step}"), model_directory=Path)
    assert str(starting_scorer(stage)) == expected
