"""The plan search against itself: one run as the command makes it beside many seeds with ten times the steps.

    python -m benchmarks.plan_search --nodes 8
    python -m benchmarks.plan_search --nodes 16 --out benchmarks/results/plan_search_16x8.json

`--seeds` searches of `--effort` times the usual length show what can be found. Ends with 1 where the search of
`rlhf-chat plan` (seed 0) takes longer than its limit (30 s to 64 GPUs, 60 s beyond), or its plan is more than 2 %
slower than the best one found. One core is enough.
"""

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from applications.plan_request import Request, make_request
from benchmarks.ppo_iteration import machine
from training.planner.search import search
from training.planner.table import PlanTable
from training.run_directory import versions, write_json

SECONDS_LIMIT, LARGE_SECONDS_LIMIT, LARGE = 30, 60, 64
WORSE_LIMIT = 1.02


@dataclass(frozen=True)
class Run:
    """One search."""

    seed: int
    effort: float
    took: float
    """Seconds of the search."""
    iteration_seconds: float
    """Of the best plan."""


def run(request: Request, seed: int, effort: float) -> Run:
    start = time.perf_counter()
    best = search(PlanTable(request.graphs), seed, effort)[0].seconds
    found = Run(seed, effort, time.perf_counter() - start, best)
    print(f"seed {seed:2}, effort {effort:4.0f}: {found.took:6.1f} s, an iteration of {best:.3f} s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="opt-13b")
    parser.add_argument("--reward-model", default="opt-350m")
    parser.add_argument("--gpu", default="a100-80g")
    parser.add_argument("--nodes", type=int, default=8, help="of 8 GPUs")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--effort", type=float, default=10)
    parser.add_argument("--out", type=Path, help="JSON of all searches")
    args = parser.parse_args()
    request = make_request(args.model, args.reward_model, args.nodes, 8, args.gpu, 200, None, None, None)
    ours = run(request, seed=0, effort=1)
    longer = [run(request, seed, args.effort) for seed in range(args.seeds)]
    best, worst = (pick(one.iteration_seconds for one in longer) for pick in (min, max))
    limit = SECONDS_LIMIT if request.cluster.size <= LARGE else LARGE_SECONDS_LIMIT
    ratio = ours.iteration_seconds / best
    print(
        f"{args.nodes} x 8: {ours.took:.1f} s (limit {limit}); its plan {100 * (ratio - 1):.2f} % slower than the best "
        f"of {len(longer)} longer searches (limit {100 * (WORSE_LIMIT - 1):.0f} %), whose worst is "
        f"{100 * (worst / best - 1):.2f} % slower"
    )
    if args.out is not None:
        searches = [asdict(one) for one in (ours, *longer)]
        write_json(args.out, {"machine": machine(), "versions": versions(), "searches": searches})
    sys.exit(ours.took > limit or ratio > WORSE_LIMIT)


if __name__ == "__main__":
    main()
