"""A run killed at random moments ends like one that is not (long version: benchmarks/kill_and_resume.py)."""

import random

import pytest

from benchmarks.kill_and_resume import experiment


@pytest.mark.parametrize(("processes", "kills"), [(1, 1), (2, 1)])
def test_killed_runs_end_with_the_same_weights_and_metrics(tmp_path, processes, kills, capsys):
    seed = random.SystemRandom().randrange(10**6)
    with capsys.disabled():
        print(f" [seed {seed}] ", end="", flush=True)
    done = experiment(tmp_path, kills, processes, seed, steps=[1, 2, 3])
    assert done, "every step was over before its first kill"
