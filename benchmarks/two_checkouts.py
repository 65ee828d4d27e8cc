"""This checkout's PPO iteration against another one's, in turn on the same work.

    git worktree add ../before 66393ea
    python -m benchmarks.two_checkouts ../before --size m --lengths skew --pairs 7

Each is `our_ppo.py` of its checkout, with the packages of this interpreter. Pairs begin with either in turn. Prints the
seconds of every pair, and how many times as long this checkout takes, by phase.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.turns import PHASES, System, Worker
from benchmarks.work import LENGTHS, SIZES

HERE = Path(__file__).resolve().parent.parent


def system(name: str, checkout: Path, given: argparse.Namespace) -> System:
    place = ["env", "-C", str(checkout), f"PYTHONPATH={checkout}"]
    asked = ["--size", given.size, "--lengths", given.lengths, "--dtype", given.dtype]
    counted = ["--iterations", str(given.pairs + 1), "--turns"]
    return System(name, [*place, sys.executable, "-m", "benchmarks.our_ppo", *asked, *counted])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("--size", choices=list(SIZES), default="m")
    parser.add_argument("--lengths", choices=list(LENGTHS), default="skew")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--pairs", type=int, default=7)
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as logs:
        with (
            Worker(system("before", given.other.resolve(), given), Path(logs) / "before") as before,
            Worker(system("now", HERE, given), Path(logs) / "now") as now,
        ):
            for number in range(given.pairs + 1):
                order = (before, now) if number % 2 else (now, before)
                taken = {each.system.name: each.iterate(number) for each in order}
                if number:  # the first pair warms up
                    rows.append(taken)
                    print(f"before {taken['before']['total']:.2f} s, now {taken['now']['total']:.2f} s", flush=True)
    for phase in PHASES:
        ratios = [row["now"][phase] / row["before"][phase] for row in rows]
        print(f"{phase}: {statistics.median(ratios):.3f} times as long ({min(ratios):.3f} to {max(ratios):.3f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
