"""One PPO iteration of ours, against the floor or TRL on the same work: paired medians of each phase.

    python -m benchmarks.ppo_iteration --against floor --size m --lengths skew --dtype fp32
    python -m benchmarks.ppo_iteration --against trl --trl DIR --size s --lengths skew --dtype bf16 --out FILE.json

Each system is a process of its own, and they take turns (ours, peer, ours, peer, ...), so that a change of the machine
meets both. The ratio of a phase is the median over the pairs of peer time / our time: against the floor the share of
the limit that we reach, against TRL how many times faster we are.

In fp32 ours trains plain fp32 weights. In bf16 ours runs with fp32 master weights (the default of every run) and
without them; the floor runs twice too, with attention in bf16 and in fp32. The floor keeps the log-probabilities of
generation as PPO's old ones, which ours computes anew in bf16 where training does not equal generation; so against the
floor ours runs a third time, told to keep them too.
"""

import argparse
import contextlib
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import work
from benchmarks.trl_peer import TRL_VERSION
from benchmarks.turns import PHASES, QUIET, Failed, System, Worker, wait_until_quiet
from benchmarks.work import LENGTHS, SAMPLES, SIZES
from training.run_directory import processor, versions, write_json

Row = dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Iterations of one of ours and one of the peer's, pair by pair."""

    ours: list[Row]
    peer: list[Row]

    def calm(self) -> "Comparison":
        """Only the pairs that no other process disturbed; all of them where fewer than two are left."""
        pairs = list(zip(self.ours, self.peer, strict=True))
        calm = [pair for pair in pairs if max(row["others"] for row in pair) < QUIET]
        if len(calm) < 2:
            return self
        return Comparison([ours for ours, _ in calm], [peer for _, peer in calm])

    @property
    def disturbed(self) -> int:
        """Pairs during which other processes used more than QUIET of the machine."""
        pairs = zip(self.ours, self.peer, strict=True)
        return sum(max(row["others"] for row in pair) >= QUIET for pair in pairs)

    def ratios(self, phase: str) -> list[float]:
        """Peer time / our time of each pair."""
        return [peer[phase] / ours[phase] for ours, peer in zip(self.ours, self.peer, strict=True)]

    def figures(self) -> dict[str, dict[str, float]]:
        """By phase: median seconds of both, median ratio and its range."""
        return {
            phase: {
                "ours": statistics.median(row[phase] for row in self.ours),
                "peer": statistics.median(row[phase] for row in self.peer),
                "ratio": statistics.median(self.ratios(phase)),
                "lowest": min(self.ratios(phase)),
                "highest": max(self.ratios(phase)),
            }
            for phase in PHASES
            if all(row[phase] for row in self.ours)  # supervised steps generate nothing
        }


def systems(arguments: argparse.Namespace) -> tuple[list[System], list[System]]:
    """Ours and the peer's, for the dtype that was asked for."""
    common = ["--size", arguments.size, "--lengths", arguments.lengths, "--dtype", arguments.dtype, "--turns"]
    common += ["--threads", str(arguments.threads), "--iterations", str(arguments.iterations)]

    def system(name: str, module: str, *more: str) -> System:
        return System(name, [sys.executable, "-m", f"benchmarks.{module}", *common, *more])

    both = arguments.dtype == "bf16"
    ours = [system("ours", "our_ppo")]
    if both:
        ours.append(system("ours, no fp32 weights", "our_ppo", "--master", "none"))
    if arguments.against == "trl":
        return ours, [system("TRL", "trl_peer", "--trl", str(arguments.trl))]
    if both:
        ours.append(system("ours, log-probabilities of generation", "our_ppo", "--old-logprobs", "generation"))
    peers = [system("floor", "floor")]
    if both:
        peers.append(system("floor, fp32 attention", "floor", "--attention", "fp32"))
    return ours, peers


def measure(
    chosen: list[System], iterations: int, patience: float, seconds: float = math.inf
) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Turns of all systems: the iterations of each by its name, and what each says that it is. After so many `seconds`
    no turn begins, but there is one."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as logs, contextlib.ExitStack() as running:
        workers = [
            running.enter_context(Worker(system, Path(logs) / f"{place}.log")) for place, system in enumerate(chosen)
        ]
        what = {worker.system.name: worker.notes["what"] for worker in workers}  # they began together
        rows: dict[str, list[Row]] = {system.name: [] for system in chosen}
        for number in range(iterations + 1):
            if number > 1 and time.monotonic() - began > seconds:
                break
            for worker in workers:
                wait_until_quiet(patience)
                row = worker.iterate(number)
                if number:  # the first one warms up
                    rows[worker.system.name].append(row)
        return rows, what


def table(names: tuple[str, str], compared: Comparison) -> str:
    """Markdown: a row a phase."""
    ours, peer = names
    lines = [f"| | {ours}, s | {peer}, s | {peer} / {ours} | range |", "|---|---|---|---|---|"]
    for phase, found in compared.figures().items():
        lines.append(
            f"| {phase} | {found['ours']:.3f} | {found['peer']:.3f} | {found['ratio']:.2f} "
            f"| {found['lowest']:.2f}-{found['highest']:.2f} |"
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Model and cores of the processor."""
    return {"cpu": processor()[0], "cores": os.cpu_count()}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", choices=["floor", "trl"], required=True)
    parser.add_argument("--trl", type=Path, help=f"where TRL {TRL_VERSION} is installed (README.md here says how)")
    parser.add_argument("--size", choices=list(SIZES), default="s")
    parser.add_argument("--lengths", choices=list(LENGTHS), default="skew")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--iterations", type=int, default=5, help="pairs, after one that warms up")
    parser.add_argument("--threads", type=int, default=2, help="of each system")
    parser.add_argument("--patience", type=float, default=20, help="seconds to wait for an idle machine before a turn")
    parser.add_argument("--out", type=Path, help="JSON file for machine, versions and all figures")
    arguments = parser.parse_args()
    if arguments.against == "trl" and arguments.trl is None:
        parser.error(f"--against trl needs --trl DIR: pip install --no-deps --target DIR trl=={TRL_VERSION}")
    if arguments.iterations < 1:
        parser.error("--iterations must be at least 1")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    ours, peers = systems(arguments)
    work.models(arguments.size)  # built here once, not by several processes at a time
    try:
        rows, what = measure([*ours, *peers], arguments.iterations, arguments.patience)
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    tokens = LENGTHS[arguments.lengths].tokens
    print(f"{arguments.size} {arguments.lengths} {arguments.dtype}: {SAMPLES} samples, {tokens} response tokens\n")
    comparisons = []
    for our in ours:
        for peer in peers:
            pairs = Comparison(rows[our.name], rows[peer.name])
            calm = pairs.calm()
            print(table((our.name, peer.name), calm) + "\n")
            print(f"{len(calm.ours)} of {len(pairs.ours)} pairs counted, {calm.disturbed} of them disturbed\n")
            counted = {"pairs": len(calm.ours), "disturbed": calm.disturbed}
            comparisons.append({"ours": our.name, "peer": peer.name, **counted, "phases": calm.figures()})
    for name, description in what.items():
        others = statistics.median(row["others"] for row in rows[name])
        peak = max(row["peak_gb"] for row in rows[name])
        print(f"{name}: {description}; peak memory {peak:.2f} GB; others used {others:.0%} of the machine")
    used = {**versions(), "trl": TRL_VERSION if arguments.against == "trl" else "not used", "psutil": version("psutil")}
    print(f"{machine()['cpu']}, {machine()['cores']} cores, {arguments.threads} threads; ", end="")
    print(", ".join(f"{name} {number}" for name, number in used.items()))
    if arguments.out:
        asked = {name: getattr(arguments, name) for name in ("size", "lengths", "dtype", "iterations", "threads")}
        found = {"systems": what, "comparisons": comparisons, "iterations": rows}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out, {"machine": machine(), "versions": used, "work": asked, "tokens": tokens} | found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
