"""Plans drawn at random, run on this machine, beside what the planner says of them; and what `--plan auto` would take.

    python -m benchmarks.random_plans --out benchmarks/results/random_plans_m_skew.json
    python -m benchmarks.random_plans --out FILE --show      # the table of a file again, nothing is run

Two processes with one core each; models, prompts and forced lengths of `work.py`, fp32. The machine is profiled first
(`rlhf-chat profile`), and predicts. With `--fitted` its four constants are fitted to plans of their own, drawn like the
others, and what the profile alone says is printed too. Every plan is started anew in every round, the order of
plans turned by one: one iteration warms up, `--iterations` are measured, and the slowest rank counts. Ends with 1 where
a target is missed. Runs that are in the file already are not made again.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from applications.launch import run_on_ranks
from applications.plan import searched
from applications.plan_request import Request
from benchmarks import our_ppo, work
from benchmarks.ppo_iteration import machine
from benchmarks.realhf_table import fit
from benchmarks.turns import wait_until_quiet
from benchmarks.work import LENGTHS, PROMPT_TOKENS, SAMPLES, SIZES
from training.config import RunConfig
from training.plan import Plan, from_blocks, mesh_text, to_blocks
from training.planner import profile
from training.planner.hardware import Calibration, MachineProfile
from training.planner.options import Options, Space, meshes
from training.run_directory import versions, write_json
from training.step3_rlhf.timing import Forecast, predicted_seconds

PROCESSES, AUTO, FITTED = 2, "auto", "fitted "
PULL = 0.02
"""To what the profile measured: a constant five times as large weighs as much as a run predicted 8 % off."""
OVERHEAD = 0.02
"""Seconds of a call to start from, which no profile knows."""
MEAN_ERROR, CORRELATION, SPREAD, BEHIND = 0.12, 0.8, 1.5, 1.05
"""Targets: mean error of an iteration's seconds, rank correlation, slowest over fastest, auto over fastest."""


@dataclass(frozen=True)
class Work:
    """What every run does; only the plans differ."""

    size: str
    lengths: str

    def config(self, iterations: int, plan: dict[str, Any] | None = None) -> RunConfig:
        config = our_ppo.make_config(self.size, LENGTHS[self.lengths], "fp32", "fp32", iterations, 1)
        values = config.model_dump()
        values["processes"] = PROCESSES
        values["rlhf"]["fusion"]["mode"] = "none"
        values["rlhf"]["plan"] = plan or {}
        return RunConfig.model_validate(values)

    def request(self, measured: MachineProfile) -> Request:
        return Request.of(self.config(1), measured.cluster)

    def forecast(self, plan: Plan, measured: MachineProfile) -> dict[str, float]:
        """Predicted seconds by call, and of the iteration."""
        graphs = self.request(measured).graphs
        schedule = Forecast(graphs, plan).schedule([PROMPT_TOKENS] * SAMPLES, LENGTHS[self.lengths].of(0))
        return predicted_seconds(schedule) | {"iteration": schedule.makespan + graphs.controller_seconds}

    def fitted(self, plans: list[Plan], seconds: list[float], measured: MachineProfile) -> MachineProfile:
        """The profile with constants that come near to measured seconds of an iteration of these plans."""
        prior = replace(measured.calibration, controller_seconds=OVERHEAD)

        def predict(calibration: Calibration) -> list[float]:
            return [self.forecast(plan, replace(measured, calibration=calibration))["iteration"] for plan in plans]

        return replace(measured, calibration=fit(predict, seconds, prior, PULL))


def drawn(request: Request, count: int, seed: int) -> list[Plan]:
    """Different plans that run and fit: first the meshes of a plan, then of each call one of them, a cut, and its
    micro-batches."""
    draw, options = random.Random(seed), Options(request.graphs, Space(runs=request.runs))
    all_meshes = list(meshes(request.cluster, options.space))
    found: dict[str, Plan] = {}
    while len(found) < count:
        assignments, some = {}, draw.sample(all_meshes, draw.randint(1, len(all_meshes)))
        for call in request.graphs.graph.calls:
            mesh = draw.choice(some)
            candidates = [one for one in options.candidates(call, mesh) if request.runs(call, one)]
            if not candidates:
                break
            assignments[call.name] = draw.choice(candidates)
        else:
            plan = Plan(assignments)
            if request.outcome("", plan).runs:
                found[json.dumps(to_blocks(plan))] = plan
    return list(found.values())


def run_rank(what: Work, blocks: dict[str, Any], iterations: int) -> None:
    """One rank of one run; the first prints the seconds of all ranks by phase and call."""
    from training.distributed import start_ranks, stop_ranks

    ranks = start_ranks(1)
    with tempfile.TemporaryDirectory() as own:
        directory = Path(ranks.gather(own)[0])
        ppo = our_ppo.make_ppo(what.config(iterations + 1, blocks), LENGTHS[what.lengths], directory, ranks)
        rows = []
        for number in range(iterations + 1):
            ranks.barrier()
            clock = ppo.iterate(number + 1, check=False).clock
            calls = {span.kind: clock.calls.seconds(span.kind) for span in clock.calls.spans}
            rows.append({**calls, "iteration": clock.elapsed()})
        shares = ranks.gather(rows[1:])
        ranks.barrier()
    if ranks.is_first:
        print("FOUND " + json.dumps(shares))
    stop_ranks()


def measure(what: Work, plan: Plan, iterations: int) -> list[dict[str, float]]:
    """Seconds of each iteration by call, of the slowest rank."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    asked = ["--one", json.dumps({"work": asdict(what), "plan": to_blocks(plan)}), "--iterations", str(iterations)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, "-m", "benchmarks.random_plans", *asked]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if not found:
        sys.exit(f"{to_blocks(plan)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    ranks: list[list[dict[str, float]]] = json.loads(found[0].removeprefix("FOUND "))
    return [
        {name: max(row.get(name, 0.0) for row in rows) for name in dict.fromkeys(key for row in rows for key in row)}
        for rows in zip(*ranks, strict=True)
    ]


def report(found: dict[str, Any]) -> list[str]:
    """Prints the table and the summary; returns the targets that are missed."""
    what, measured = Work(**found["work"]), MachineProfile.from_values(found["profile"])
    names = [name for name in found["plans"] if found["runs"].get(name)]
    plans = {name: from_blocks(found["plans"][name]) for name in names}
    seconds = {}
    for name in names:
        rows = [row for round_ in found["runs"][name] for row in round_]
        seconds[name] = {key: statistics.median(row.get(key, 0.0) for row in rows) for key in rows[0]}
    to_fit = [name for name in names if name.startswith(FITTED)]
    drawn_ones = [name for name in names if name not in to_fit and name != AUTO]
    achieved = [seconds[name]["iteration"] for name in drawn_ones]
    alone = [what.forecast(plans[name], measured)["iteration"] for name in drawn_ones]
    unfitted = statistics.mean(abs(b / a - 1) for a, b in zip(achieved, alone, strict=True))
    if to_fit:
        fitted = what.fitted([plans[n] for n in to_fit], [seconds[n]["iteration"] for n in to_fit], measured)
        print(f"profiled: {measured.calibration}\nfitted:   {fitted.calibration}\n")
        measured = fitted
    predicted = {name: what.forecast(plans[name], measured) for name in names}
    calls = list(found["plans"][names[0]])
    print(f"| plan | {' | '.join(call.replace('_', ' ') for call in calls)} | measured, s | predicted, s | error |")
    print("|---" * (len(calls) + 4) + "|")
    for name in names:
        cells = [
            f"{cut(plans[name], call)} {seconds[name].get(call, 0):.2f} ({predicted[name][call]:.2f})" for call in calls
        ]
        taken, said = seconds[name]["iteration"], predicted[name]["iteration"]
        print(f"| {name} | {' | '.join(cells)} | {taken:.2f} | {said:.2f} | {said / taken - 1:+.0%} |")
    said_of = [predicted[name]["iteration"] for name in drawn_ones]
    error = statistics.mean(abs(b / a - 1) for a, b in zip(achieved, said_of, strict=True))
    correlation = statistics.correlation(places(achieved), places(said_of)) if len(achieved) > 1 else 0.0
    spread = max(achieved) / min(achieved)
    print(
        f"\nseed {found['seed']}, {len(drawn_ones)} plans, slowest over fastest {spread:.2f} (at least {SPREAD}): mean "
        f"error {error:.1%} (at most {MEAN_ERROR:.0%}; by the profile alone {unfitted:.1%}), rank correlation "
        f"{correlation:.2f} (at least {CORRELATION})"
    )
    missed = ["mean error"] * (error > MEAN_ERROR) + ["rank correlation"] * (correlation < CORRELATION)
    missed += ["spread"] * (spread < SPREAD)
    if AUTO in names:
        behind = seconds[AUTO]["iteration"] / min(achieved)
        print(f"auto's plan takes {behind:.2f} times the fastest of them (at most {BEHIND})")
        missed += ["auto"] * (behind > BEHIND)
    print("MISSED: " + ", ".join(missed) if missed else "all targets met")
    return missed


def cut(plan: Plan, call: str) -> str:
    """Ranks, then what is not 1 or 0."""
    assignment = plan[call]
    layout = assignment.layout
    marks = [f"tp{layout.tensor}"] * (layout.tensor > 1) + [f"z{layout.zero_stage}"] * (layout.zero_stage > 0)
    if call.endswith("generate"):
        return " ".join([f"[{mesh_text(layout.mesh)}]", *marks, f"{assignment.micro_batch_limit} slots"])
    return " ".join([f"[{mesh_text(layout.mesh)}]", *marks, f"x{assignment.micro_batches}"])


def places(values: list[float]) -> list[float]:
    """Of each value among all, in order."""
    order = sorted(values)
    return [float(order.index(value)) for value in values]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="m")
    parser.add_argument("--lengths", choices=list(LENGTHS), default="skew")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--plans", type=int, default=12)
    parser.add_argument("--fitted", type=int, default=0, help="further plans, to fit the constants to")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--patience", type=float, default=20, help="seconds to wait for an idle machine before a run")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", action="store_true", help="run nothing: the table of the file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        asked = json.loads(arguments.one)
        run_rank(Work(**asked["work"]), asked["plan"], arguments.iterations)
        return 0
    what = Work(arguments.size, arguments.lengths)
    work.models(what.size)  # made before the ranks look for them
    if arguments.out and arguments.out.exists():
        found = json.loads(arguments.out.read_text(encoding="utf-8"))
    else:
        wait_until_quiet(arguments.patience)
        measured = MachineProfile.from_values(run_on_ranks(profile.__file__, [], PROCESSES, "measurement"))
        request = what.request(measured)
        best = searched(request).estimate
        assert best is not None
        both = drawn(request, arguments.plans + arguments.fitted, arguments.seed)
        plans = {str(i): to_blocks(plan) for i, plan in enumerate(both[: arguments.plans], 1)}
        plans |= {f"{FITTED}{i}": to_blocks(plan) for i, plan in enumerate(both[arguments.plans :], 1)}
        found = {"machine": machine(), "versions": versions(), "work": asdict(what), "seed": arguments.seed}
        found |= {"profile": asdict(measured), "plans": plans | {AUTO: to_blocks(best.plan)}, "runs": {}}
    if not arguments.show:
        names = list(found["plans"])
        for turn in range(arguments.rounds):
            for name in names[turn:] + names[:turn]:
                if len(found["runs"].setdefault(name, [])) > turn:
                    continue
                wait_until_quiet(arguments.patience)
                found["runs"][name].append(measure(what, from_blocks(found["plans"][name]), arguments.iterations))
                print(f"round {turn + 1}, plan {name}: {found['runs'][name][-1][-1]['iteration']:.2f} s", flush=True)
                if arguments.out:
                    write_json(arguments.out, found)
    return 1 if report(found) else 0


if __name__ == "__main__":
    sys.exit(main())
