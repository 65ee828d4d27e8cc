"""Training of actor and critic side by side, each on a process of its own, against both on all processes.

    python -m benchmarks.side_by_side --size m --lengths skew --rounds 7

Two processes with one core each; models, prompts and forced lengths of `work.py`, fp32. All three ways live in the same
processes and take turns on the samples of one iteration, so that a machine that is busy slows all of them alike. Prints
the seconds of the slower rank, and the ratios, turn by turn. Ends with 1 where a target is missed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import our_ppo, work
from benchmarks.work import LENGTHS, SIZES
from training.config import RunConfig

PROCESSES = 2
ALL, FIRST, SECOND = {"mesh": "0-1", "data": 2}, {"mesh": 0}, {"mesh": 1}
WAYS = {"side by side": (FIRST, SECOND), "ZeRO 0": (ALL, ALL), "ZeRO 3": (ALL | {"zero_stage": 3},) * 2}
TARGETS = {"ZeRO 0": 1.1, "ZeRO 3": 1.5}
"""Times as fast that side by side should be."""


def config_of(size: str, lengths: str, actor: dict[str, Any], critic: dict[str, Any]) -> RunConfig:
    values = our_ppo.make_config(size, LENGTHS[lengths], "fp32", "fp32", 100, 1).model_dump()
    values["processes"] = PROCESSES
    scoring = dict.fromkeys(("actor_generate", "reference_score", "reward_score", "critic_score"), ALL)
    values["rlhf"]["plan"] = {**scoring, "actor_train": actor, "critic_train": critic}
    return RunConfig.model_validate(values)


def run_rank(size: str, lengths: str, rounds: int) -> None:
    """The first rank prints the seconds of the slower one, by way and round."""
    from training.distributed import start_ranks, stop_ranks

    ranks = start_ranks(1)
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as own:
        directory, updates, batches = Path(ranks.gather(own)[0]), {}, {}
        for way, trains in WAYS.items():
            ppo = our_ppo.make_ppo(config_of(size, lengths, *trains), LENGTHS[lengths], directory / way, ranks)
            updates[way] = ppo.updates
            run = ppo.updates.run
            ppo.updates.run = lambda batch, *of_calls, way=way, run=run: batches.setdefault(way, batch) and run(batch)
            ppo.iterate(1, check=False)
            ppo.updates.run = run
        for number in range(rounds):
            for way in list(WAYS)[number % 3 :] + list(WAYS)[: number % 3]:
                ranks.barrier()
                begun = time.perf_counter()
                updates[way].run(batches[way])
                taken[way].append(max(ranks.gather(time.perf_counter() - begun)))
    if ranks.is_first:
        print("FOUND " + json.dumps(taken))
    stop_ranks()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="m")
    parser.add_argument("--lengths", choices=list(LENGTHS), default="skew")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        run_rank(given.size, given.lengths, given.rounds)
        return 0
    work.models(given.size)  # built once, before ranks read them
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    command = [*launcher, "-m", "benchmarks.side_by_side", *sys.argv[1:], "--rank"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if not found:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    taken: dict[str, list[float]] = json.loads(found[0].removeprefix("FOUND "))
    for way, seconds in taken.items():
        print(f"{way}: {', '.join(f'{each:.2f}' for each in seconds)} s")
    missed = False
    for way, target in TARGETS.items():
        ratios = [other / ours for other, ours in zip(taken[way], taken["side by side"], strict=True)]
        ratio = statistics.median(ratios)
        between = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"side by side is {ratio:.2f} times as fast as {way} ({between} in {len(ratios)} turns; target {target})")
        missed = missed or ratio < target
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
