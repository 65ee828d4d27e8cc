"""A run killed at random moments ends like one that is not (long version: benchmarks/kill_and_resume.py)."""

import itertools
import random

from benchmarks.kill_and_resume import Experiment, start_cold
from tests.warm import Command, Forked
from training.steps import METHODS


def test_killed_runs_end_with_the_same_weights_and_metrics(tmp_path, capsys):
    require_survival(tmp_path, 1, capsys)


def require_survival(directory, processes, capsys):
    """One kill a step; the first command that is killed starts cold, the others fork."""
    seed = random.SystemRandom().randrange(10**6)
    with capsys.disabled():
        print(f" [seed {seed}] ", end="", flush=True)
    begun = itertools.count()

    def start(arguments, log_file):
        return start_cold(arguments, log_file) if next(begun) == 1 else Forked(Command(tuple(arguments)), log_file)

    experiment = Experiment(directory, 1, processes, seed, start=start)
    assert experiment.run(list(METHODS["ppo"])), "every step was over before its first kill"
