"""A run killed at random moments ends like one that is not (long version: benchmarks/kill_and_resume.py)."""

import random

import pytest

from benchmarks.kill_and_resume import experiment


@pytest.mark.parametrize(("processes", "steps"), [(1, [1, 2, 3]), (2, [3])])
def test_killed_runs_end_with_the_same_weights_and_metrics(tmp_path, processes, steps, capsys):
    seed = random.SystemRandom().randrange(10**6)
    with capsys.disabled():
        print(f" [seed {seed}] ", end="", flush=True)
    done = experiment(tmp_path, 1, processes, seed, steps=steps)
    assert done, "every step was over before its first kill"
