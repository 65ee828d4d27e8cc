"""A run killed at random moments ends like one that is not (long version: benchmarks/kill_and_resume.py)."""

import random

from benchmarks.kill_and_resume import experiment
from training.steps import METHODS


def test_killed_runs_end_with_the_same_weights_and_metrics(tmp_path, capsys):
    require_survival(tmp_path, 1, capsys)


def require_survival(directory, processes, capsys):
    """One kill a step."""
    seed = random.SystemRandom().randrange(10**6)
    with capsys.disabled():
        print(f" [seed {seed}] ", end="", flush=True)
    assert experiment(directory, 1, processes, seed, steps=list(METHODS["ppo"])), (
        "every step was over before its first kill"
    )
