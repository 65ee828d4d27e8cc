"""Real PPO iterations on this machine, over sizes, lengths, processes, ZeRO stages and tensor-parallel degrees.

    python -m benchmarks.machine_runs --out benchmarks/results/machine_runs.json

Each run is started anew: one process with all threads, or several with an equal share each. Seconds are medians over
`--iterations` after one that warms up, of the slowest rank. The profile of the machine (`rlhf-chat profile`) comes
first. Runs that are in the file already are not made again. `benchmarks.this_machine` compares the planner with them.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from applications.launch import run_on_ranks
from benchmarks import our_ppo, work
from benchmarks.ppo_iteration import machine
from benchmarks.turns import wait_until_quiet
from benchmarks.work import LENGTHS, SIZES
from training.config import RunConfig
from training.planner import profile
from training.planner.machine import MachineProfile
from training.run_directory import write_json
from training.versions import versions

PHASES = ("reallocate", "generate", "gather", "score", "train")
LAYOUTS = ((1, 0, 1), (2, 0, 1), (2, 2, 1), (2, 3, 1), (2, 0, 2), (2, 3, 2))
"""Processes, ZeRO stage of actor and critic, tensor-parallel degree of generation."""


@dataclass(frozen=True)
class MachineRun:
    """What one run is."""

    size: str
    lengths: str
    processes: int
    zero_stage: int
    tensor: int

    def __str__(self) -> str:
        ranks = f"{self.processes} process{'es' * (self.processes > 1)}"
        return f"{self.size} {self.lengths}, {ranks}, ZeRO {self.zero_stage}, tensor-parallel {self.tensor}"

    @property
    def threads(self) -> int:
        return max(1, (os.cpu_count() or 1) // self.processes)

    def config(self, iterations: int) -> RunConfig:
        """fp32, without fusion."""
        config = our_ppo.make_config(self.size, LENGTHS[self.lengths], "fp32", "fp32", iterations, self.threads)
        values = config.model_dump()
        values["processes"] = self.processes
        values["rlhf"]["generation_tensor_parallel"] = self.tensor
        values["rlhf"]["fusion"]["mode"] = "none"
        for role in ("actor", "critic"):
            values["rlhf"][role]["zero_stage"] = self.zero_stage
        return RunConfig.model_validate(values)


def all_runs(sizes: list[str], lengths: list[str]) -> list[MachineRun]:
    return [MachineRun(size, length, *layout) for size, length, layout in itertools.product(sizes, lengths, LAYOUTS)]


def run_rank(run: MachineRun, iterations: int) -> None:
    """One rank of one run; the first prints the seconds of all."""
    from training.distributed import start_ranks, stop_ranks

    ranks = start_ranks(run.threads)
    with tempfile.TemporaryDirectory() as own:
        directory = Path(ranks.gather(own)[0])
        ppo = our_ppo.make_ppo(run.config(iterations + 1), LENGTHS[run.lengths], directory, ranks)
        rows = []
        for number in range(iterations + 1):
            ranks.barrier()
            metrics = ppo.iterate(number + 1, check=False).metrics
            rows.append({phase: metrics.get(f"time/{phase}", 0.0) for phase in PHASES})
        shares = ranks.gather(rows[1:])
        ranks.barrier()
    if ranks.is_first:
        print("FOUND " + json.dumps(shares))
    stop_ranks()


def profiled(processes: int) -> MachineProfile:
    """The machine as so many ranks find it: `rlhf-chat profile`."""
    return MachineProfile.from_values(run_on_ranks(profile.__file__, [], processes, "measurement"))


def measure(run: MachineRun, iterations: int) -> dict[str, float]:
    """Seconds by phase and in all."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    what = ["--one", json.dumps(asdict(run)), "--iterations", str(iterations)]
    command = [*launcher, "--nproc-per-node", str(run.processes), "-m", "benchmarks.machine_runs", *what]
    environment = {**os.environ, "OMP_NUM_THREADS": str(run.threads), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if not found:
        sys.exit(f"{run} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    ranks: list[list[dict[str, float]]] = json.loads(found[0].removeprefix("FOUND "))
    totals = [[sum(row.values()) for row in rank] for rank in ranks]
    seconds = {
        phase: statistics.median(max(rank[number][phase] for rank in ranks) for number in range(iterations))
        for phase in PHASES
    }
    return seconds | {"total": statistics.median(map(max, zip(*totals, strict=True)))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["s", "m"])
    parser.add_argument("--lengths", nargs="+", choices=list(LENGTHS), default=["skew", "fixed"])
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--patience", type=float, default=20, help="seconds to wait for an idle machine before a run")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run_rank(MachineRun(**json.loads(arguments.one)), arguments.iterations)
        return
    for size in arguments.sizes:
        work.models(size)  # made before the ranks look for them
    rows: list[dict[str, Any]] = []
    print("| run | " + " | ".join((*PHASES, "total")) + " |\n" + "|---" * (len(PHASES) + 2) + "|")
    if arguments.out and arguments.out.exists():  # go on with what an earlier start left
        found = json.loads(arguments.out.read_text())
        profiles, rows = found["profiles"], found["runs"]
    else:
        profiles = {str(processes): asdict(profiled(processes)) for processes in sorted({one[0] for one in LAYOUTS})}
    done = [MachineRun(**row["run"]) for row in rows]
    for run in all_runs(arguments.sizes, arguments.lengths):
        if run in done:
            continue
        wait_until_quiet(arguments.patience)
        seconds = measure(run, arguments.iterations)
        rows.append({"run": asdict(run), "seconds": seconds})
        print(f"| {run} | " + " | ".join(f"{seconds[phase]:.3f}" for phase in (*PHASES, "total")) + " |", flush=True)
        if arguments.out:
            write_json(
                arguments.out, {"machine": machine(), "versions": versions(), "profiles": profiles, "runs": rows}
            )


if __name__ == "__main__":
    main()
