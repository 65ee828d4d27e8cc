"""GRPO, RLOO, SFT and DPO of ours against those of today's TRL: the same work, in turns, into one JSON file.

    pip install --no-deps --target DIR trl==1.16.0
    python -m benchmarks.against_trl --trl DIR --out benchmarks/results/trl_1_16.json

TRL stands in the table three times. *Mended* is not what it ships: on a CPU too its output layer then goes over the
scored positions alone (trl_trainers.py says how). *Strongest* is the fastest of its own forms that were tried, *as it
comes* its defaults, but for what would weaken it (gradient checkpointing) or change the work. A ratio is TRL's time /
ours, the median over the turns. In bf16 ours keeps fp32 weights beside fp32 weights under autocast, and none beside
bf16 weights.

The command may be stopped and called again, or piece by piece (`--only`): turns are added to those in the file, until
there are five that no other process disturbed.
"""

import argparse
import itertools
import math
import statistics
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import work
from benchmarks.ppo_iteration import Comparison, Row, machine, measure
from benchmarks.trl_trainers import TRL_NOW
from benchmarks.turns import PHASES, Failed, System
from benchmarks.work import KL, MINI_BATCHES
from training.run_directory import read_json, versions, write_json

FLOOR = "floor"
MENDED = ", mended"
AS_IT_COMES = "as it comes"
FORMS: dict[str, list[str]] = {
    AS_IT_COMES: [],
    "continuous batching": ["--continuous"],
    "bf16 weights": ["--master", "none"],
    "bf16 weights, continuous batching": ["--master", "none", "--continuous"],
    "sorted": ["--batching", "sorted"],
    "one by one": ["--batch", "1"],
    "one by one, bf16 weights": ["--batch", "1", "--master", "none"],
    "padding-free": ["--batching", "padding-free", "--batch", "4"],
    "packed": ["--batching", "packed", "--batch", "1"],
    "packed, bf16 weights": ["--batching", "packed", "--batch", "1", "--master", "none"],
}
"""What trl_trainers.py is told, by the form of TRL; each also mended."""


@dataclass(frozen=True)
class Work:
    """What both do; `lengths` of responses, `rows` for those of the supervised work."""

    method: str
    lengths: str = "rows"
    dtype: str = "fp32"
    steps: int = MINI_BATCHES
    kl: float = KL

    @property
    def is_online(self) -> bool:
        return self.method in ("grpo", "rloo")

    @property
    def title(self) -> str:
        if not self.is_online:
            return f"{self.method} {self.dtype}"
        steps = "4 steps" if self.steps == MINI_BATCHES else "1 step"
        return f"{self.method} {self.lengths} {self.dtype} {steps} {'KL' if self.kl else 'no KL'}"

    @property
    def asked(self) -> list[str]:
        """Arguments of our_ppo.py and trl_trainers.py alike."""
        online = ["--lengths", self.lengths, "--mini-batches", str(self.steps), "--kl", str(self.kl)]
        return ["--dtype", self.dtype, *(online if self.is_online else ())]


@dataclass(frozen=True)
class Piece:
    """Forms of TRL that take turns with ours on the same work."""

    work: Work
    forms: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.work.title}: {'; '.join(self.forms)}"


def both(*forms: str) -> tuple[str, ...]:
    """Each of them, and each mended."""
    return tuple(name for form in forms for name in (form, form + MENDED))


def pieces() -> list[Piece]:
    """What is measured, the most asked for first."""
    plain, bf16 = both(AS_IT_COMES), (AS_IT_COMES, *both("bf16 weights"))
    batching, bf16_batching = both("continuous batching"), both("bf16 weights, continuous batching")
    found = [
        Piece(Work("grpo", "skew"), (FLOOR, *plain)),
        Piece(Work("grpo", "tail512"), (FLOOR, batching[1])),
        Piece(Work("grpo", "tail512"), (batching[0],)),
        Piece(Work("grpo", "tail512"), (AS_IT_COMES,)),
        Piece(Work("grpo", "fixed"), (FLOOR, *plain)),
        Piece(Work("sft"), (FLOOR, *both("packed"), AS_IT_COMES)),
        Piece(Work("sft"), ("one by one", "padding-free", "sorted")),
        Piece(Work("dpo"), (FLOOR, *both("one by one"), AS_IT_COMES)),
        Piece(Work("rloo", "skew"), plain),
        Piece(Work("rloo", "tail512"), batching),
        Piece(Work("rloo", "fixed"), plain),
        Piece(Work("grpo", "skew", "bf16"), bf16),
        Piece(Work("grpo", "tail512", "bf16"), bf16_batching),
        Piece(Work("grpo", "fixed", "bf16"), bf16),
        Piece(Work("sft", dtype="bf16"), (AS_IT_COMES, *both("packed, bf16 weights"))),
        Piece(Work("dpo", dtype="bf16"), (AS_IT_COMES, *both("one by one, bf16 weights"))),
        Piece(Work("rloo", "skew", "bf16"), bf16),
        Piece(Work("rloo", "tail512", "bf16"), bf16_batching),
        Piece(Work("rloo", "fixed", "bf16"), bf16),
    ]
    found.append(Piece(Work("grpo", "skew"), ("continuous batching",)))
    others = [(MINI_BATCHES, 0.0), (1, KL), (1, 0.0)]
    for dtype, method, (steps, kl), length in itertools.product(
        ("fp32", "bf16"), ("grpo", "rloo"), others, work.LENGTHS
    ):
        in_fp32, in_bf16 = (batching, bf16_batching) if length == "tail512" else (plain, both("bf16 weights"))
        forms = in_fp32 if dtype == "fp32" else in_bf16
        found.append(Piece(Work(method, length, dtype, steps, kl), forms))
    return found


def systems(piece: Piece, trl: Path, size: str, iterations: int, threads: int) -> list[System]:
    """Ours, and each form of TRL."""
    common = ["--size", size, "--iterations", str(iterations), "--threads", str(threads), "--turns"]
    method = ["--advantage" if piece.work.is_online else "--method", piece.work.method]
    ours = "our_ppo" if piece.work.is_online else "our_supervised"

    def system(name: str, module: str, *more: str) -> System:
        return System(name, [sys.executable, "-m", f"benchmarks.{module}", *common, *more])

    def of_trl(name: str) -> System:
        if name == FLOOR:
            online = ["--lengths", piece.work.lengths, "--alone"]
            kind = online if piece.work.is_online else ["--rows", piece.work.method]
            return system(name, "floor", "--dtype", piece.work.dtype, *kind)
        form = [*FORMS[name.removesuffix(MENDED)], *(["--mended"] if name.endswith(MENDED) else ())]
        return system(name, "trl_trainers", "--trl", str(trl), "--method", piece.work.method, *piece.work.asked, *form)

    masters = sorted({master_of(name) for name in piece.forms})
    chosen = [system(f"ours {master}", ours, *method, *piece.work.asked, "--master", master) for master in masters]
    return chosen + [of_trl(name) for name in piece.forms]


def master_of(form: str) -> str:
    """The weights that ours keeps beside this form."""
    return "none" if "bf16 weights" in form else "fp32"


def require_same_work(piece: Piece, rows: dict[str, list[Row]]) -> None:
    """AssertionError where a side had other tokens, or another loss on rows that are given."""
    for name, of_one in rows.items():
        ours = rows[f"ours {master_of(name)}"] if name in piece.forms else of_one
        if {row["tokens"] for row in of_one} != {row["tokens"] for row in ours}:
            raise AssertionError(f"{piece.title}: {name} had {of_one[0]['tokens']} tokens, ours {ours[0]['tokens']}")
        if name == FLOOR or piece.work.is_online:
            continue
        # DPO begins at log 2, and its first updates in bf16 are below what a bf16 weight resolves
        tolerance = 0.03 if piece.work.title == "dpo bf16" else 0.005
        if not math.isclose(of_one[0]["loss"], ours[0]["loss"], rel_tol=tolerance):
            raise AssertionError(f"{piece.title}: {name} has the loss {of_one[0]['loss']}, ours {ours[0]['loss']}")


def compare(piece: Piece, rows: dict[str, list[Row]], before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every form beside ours, with the turns of `before`."""
    found = []
    for form in piece.forms:
        ours, peer = rows[f"ours {master_of(form)}"], rows[form]
        for entry in before:
            if (entry["title"], entry["form"]) == (piece.work.title, form):
                ours, peer = entry["turns"]["ours"] + ours, entry["turns"]["peer"] + peer
        calm = Comparison(ours, peer).calm()
        entry = {**asdict(piece.work), "title": piece.work.title, "form": form, "phases": calm.figures()}
        counted = {"pairs": len(calm.ours), "disturbed": calm.disturbed, "turns": {"ours": ours, "peer": peer}}
        found.append({**entry, **counted})
    return found


def table(comparisons: list[dict[str, Any]]) -> str:
    """Markdown: a row for each work, TRL mended, at its strongest and as it comes."""
    lines = ["| work | ours, s | mended | strongest | as it comes | floor |", "|---|---|---|---|---|---|"]
    for title, group in itertools.groupby(comparisons, key=lambda each: each["title"]):
        by_form = {each["form"]: each for each in group}
        floor = by_form.pop(FLOOR, None)
        mended = [each for name, each in by_form.items() if name.endswith(MENDED)]
        shipped = [each for name, each in by_form.items() if not name.endswith(MENDED)]
        ours = statistics.median(each["phases"]["total"]["ours"] for each in by_form.values())
        cells = [cell(fastest(mended)), cell(fastest(shipped)), cell(by_form.get(AS_IT_COMES)), cell(floor)]
        lines.append(f"| {title} | {ours:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def fastest(comparisons: list[dict[str, Any]]) -> dict[str, Any] | None:
    """That with the least time of TRL in all."""
    return min(comparisons, key=lambda each: each["phases"]["total"]["peer"], default=None)


NOTHING = 0.01
"""Seconds of a phase that has nothing to do, as scoring without KL."""


def cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    phases = found["phases"]
    named = PHASES[:3] if "generate" in phases else ()
    parts = [f"{name} {phases[name]['ratio']:.2f}" for name in named if phases[name]["ours"] > NOTHING]
    form = found["form"].removesuffix(MENDED)
    return f"**{phases['total']['ratio']:.2f}** ({form}{': ' if parts else ''}{', '.join(parts)})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, required=True, help=f"where TRL {TRL_NOW} is installed")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; turns are added to those in it")
    parser.add_argument("--only", default="", help="measure pieces whose title has this in it")
    parser.add_argument("--size", choices=list(work.SIZES), default="s")
    parser.add_argument("--iterations", type=int, default=5, help="calm turns, after one that warms up")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after so many no turn of a piece begins")
    parser.add_argument("--threads", type=int, default=2, help="of each system")
    parser.add_argument("--patience", type=float, default=20, help="seconds to wait for an idle machine before a turn")
    arguments = parser.parse_args()
    common = (arguments.trl, arguments.size, arguments.iterations, arguments.threads)
    used = {**versions(), "trl": TRL_NOW, "accelerate": version("accelerate"), "psutil": version("psutil")}
    asked = {"size": arguments.size, "threads": arguments.threads}
    found: dict[str, Any] = {"machine": machine(), "versions": used, "work": asked, "comparisons": []}
    if arguments.out.exists():
        there = read_json(arguments.out, "give another file to --out")
        if any(there[key] != found[key] for key in ("machine", "versions", "work")):
            sys.exit(f"{arguments.out} was measured elsewhere or on other work: give another file to --out.")
        found = there
    work.models(arguments.size)  # built here once, not by several processes at a time
    titles = [piece.work.title for piece in pieces()]
    for piece in pieces():
        calm = {(each["title"], each["form"]): each["pairs"] - each["disturbed"] for each in found["comparisons"]}
        least = min(calm.get((piece.work.title, form), 0) for form in piece.forms)
        if arguments.only not in piece.title or least >= arguments.iterations:
            continue
        print(piece.title, flush=True)
        try:
            rows, _ = measure(systems(piece, *common), arguments.iterations, arguments.patience, arguments.seconds)
        except Failed as error:
            print(error, file=sys.stderr)
            return 1
        require_same_work(piece, rows)
        made = compare(piece, rows, found["comparisons"])
        new = {(each["title"], each["form"]) for each in made}
        kept = [each for each in found["comparisons"] if (each["title"], each["form"]) not in new]
        found["comparisons"] = sorted(kept + made, key=lambda each: titles.index(each["title"]))
        write_json(arguments.out, found)
    print(table(found["comparisons"]))
    print(f"\n{machine()['cpu']}, {machine()['cores']} cores, {arguments.threads} threads; ", end="")
    print(", ".join(f"{name} {number}" for name, number in used.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
