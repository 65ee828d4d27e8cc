"""Seconds from the command to the first iteration of PPO: a fork with another seed of step 3, and a copy of the run
that goes on from its last checkpoint but one, in turn.

    python -m benchmarks.fork_start runs/demo --pairs 3

The run needs two checkpoints of step 3. Both work beside it, and leave nothing. What an iteration itself takes is not
counted; answers and an evaluation before the first iteration of the fork are. Ends with 1 where the median fork begins
more than 10 s later.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from training.run_directory import RunDirectory, numbered
from training.steps import PPO

ALLOWED = 10.0
"""Seconds that a fork may begin later."""


def seconds_until_first(run: RunDirectory, words: list[str]) -> float:
    """From the command to the beginning of the first iteration that it makes; it is stopped then."""
    begun = time.time()
    command = [sys.executable, "-m", "rlhf_chat", "run", *words, "--trust"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            for row in iterations_since(run.step(PPO).metrics_file, begun):
                process.terminate()
                spent = sum(value for key, value in row.items() if key.startswith("time/") and key != "time/unix")
                return row["time/unix"] - spent - begun
            time.sleep(0.05)
    raise SystemExit(f"{' '.join(command)} ended with {process.returncode} before an iteration")


def iterations_since(file: Path, begun: float) -> list[dict[str, Any]]:
    """Whole lines of iterations."""
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    return [row for row in map(json.loads, lines) if "reward/total" in row and row["time/unix"] > begun]


def go_on(parent: RunDirectory, place: Path) -> float:
    run = RunDirectory(Path(shutil.copytree(parent.path, place)))
    step = run.step(PPO)
    shutil.rmtree(step.checkpoints / str(numbered(step.checkpoints)[-1]))
    step.result_file.unlink(missing_ok=True)
    return seconds_until_first(run, ["--name", str(place)])


def fork(parent: RunDirectory, place: Path) -> float:
    seed = str(parent.read_config().seed_of(PPO) + 1)
    words = ["--from", str(parent.path), "--fork", "--name", str(place), "--steps", PPO.command, "--seed", seed]
    return seconds_until_first(RunDirectory(place), words)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    parent = RunDirectory(arguments.run)
    later = []
    for pair in range(arguments.pairs):
        found = {}
        for way in (go_on, fork) if pair % 2 else (fork, go_on):
            place = parent.path.with_name(f"{parent.path.name}-{way.__name__}-{pair}")
            try:
                found[way] = way(parent, place)
            finally:
                shutil.rmtree(place, ignore_errors=True)
        later.append(found[fork] - found[go_on])
        print(f"resumed {found[go_on]:.1f} s, fork {found[fork]:.1f} s: {later[-1]:+.1f} s", flush=True)
    median = statistics.median(later)
    print(f"A fork begins {median:+.1f} s later (median of {len(later)} pairs)")
    return int(median > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
