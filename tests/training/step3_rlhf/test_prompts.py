"""Which prompts an iteration takes, and which demonstrations an optimiser step: functions of (seed, number) alone."""

import random
import time
from types import SimpleNamespace

import pytest
import torch

from training.data.rows import Epochs
from training.rlhf_settings import RLHFSettings
from training.step3_rlhf.ppo import PPO
from training.step3_rlhf.update import Demonstrations, Updates

SEED = 3


def choose(prompts: int, numbers: range, **settings: int) -> list[list[int]]:
    ppo = SimpleNamespace(
        settings=RLHFSettings(**{"mini_batches": 1, **settings}), order=Epochs(prompts, f"{SEED}/prompts")
    )
    return [PPO.choose_prompts(ppo, number) for number in numbers]


def shuffled(size: int, salt: str) -> list[int]:
    order = list(range(size))
    random.Random(f"{SEED}/{salt}").shuffle(order)
    return order


def test_prompts_come_in_epochs_each_shuffled_anew():
    """The order of runs that were made so far: they go on with the same prompts."""
    found = [seat for chosen in choose(5, range(1, 6), prompts_per_iteration=3) for seat in chosen]
    assert found == [seat for epoch in range(3) for seat in shuffled(5, f"prompts/{epoch}")]
    assert found[:5] != sorted(found[:5]) and found[:5] != found[5:10]


def test_the_samples_of_a_group_answer_one_prompt():
    for chosen in choose(7, range(1, 9), prompts_per_iteration=4, samples_per_prompt=3):
        assert len(chosen) == 12
        assert all(chosen[place : place + 3] == [chosen[place]] * 3 for place in range(0, 12, 3))
        assert len(set(chosen)) > 1


def test_a_resumed_run_chooses_the_same():
    whole = choose(6, range(1, 8), prompts_per_iteration=4)
    assert choose(6, range(5, 8), prompts_per_iteration=4) == whole[4:]


def test_of_a_million_prompts_those_of_an_iteration_are_chosen_at_once():
    ppo = SimpleNamespace(settings=RLHFSettings(prompts_per_iteration=256), order=Epochs(1_000_000, "3/prompts"))
    PPO.choose_prompts(ppo, 1)  # shuffles the epoch: once in some 4,000 iterations
    begun = time.process_time()
    for number in range(2, 102):
        PPO.choose_prompts(ppo, number)
    assert (time.process_time() - begun) / 100 < 0.005


def draws(samples: int, updates: int, **settings) -> list[list[int]]:
    """The rows that each optimiser step sees, of eleven."""
    ptx = object.__new__(Demonstrations)
    ptx.rows = [(torch.tensor([row]), torch.tensor([row])) for row in range(11)]
    ptx.order = Epochs(11, f"{SEED}/demonstrations")
    self = SimpleNamespace(settings=RLHFSettings(**settings))
    found = []
    for update in range(updates):
        drawn = ptx.draw(*Updates.demonstrations_of(self, update, samples))
        found.append([int(prompt[0]) for prompt, _ in drawn.rows])
    return found


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"mini_batches": 4}, [3, 3, 2, 2]),  # ten samples: as many demonstrations as a mini-batch has of them
        ({"mini_batches": 2}, [5, 5]),
        ({"mini_batches": 4, "ptx": {"rows": 3}}, [3, 3, 3, 3]),
        ({"mini_batches": 3, "ppo_epochs": 2}, [4, 3, 3]),
    ],
)
def test_no_demonstration_comes_again_before_all_have_come(settings, sizes):
    found = draws(10, 3 * len(sizes), **settings)
    assert [len(rows) for rows in found] == sizes * 3
    together = [row for rows in found for row in rows]
    epochs = [row for epoch in range(4) for row in shuffled(11, f"demonstrations/{epoch}")]
    assert together == epochs[: len(together)]
