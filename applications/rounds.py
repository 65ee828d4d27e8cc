"""Round after round: what each run of a chain of `run --go-on` was trained on, and what it gained."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from applications.report_table import pair_of, share
from inference.errors import UserError
from inference.preferences import Preference, PreferenceFile
from inference.screen import columns
from training.data.prepare import COUNTS_FILE, read_counts
from training.evaluation.guard_rails import guard_signs
from training.evaluation.preferences import people, win_rates
from training.lineage import rounds_of
from training.run_directory import RunDirectory, read_json
from training.starts import begun_at
from training.steps import PAIRS, SFT, Step

HEADINGS = (
    "",
    "pairs",
    "over the one before",
    "by people",
    "over the first SFT model",
    "KL (to that one)",
    "length",
    "guard rails",
)


@dataclass(frozen=True)
class Round:
    """A run of the chain, as text; what was not measured is empty."""

    name: str
    pairs: str
    over_before: str
    by_people: str
    over_first: str
    kl: str
    length: str
    guard_rails: str

    @property
    def cells(self) -> tuple[str, ...]:
        return tuple(vars(self).values())


def first_sft(run: RunDirectory) -> Path | None:
    """The SFT model with which the chain began; None where there is none, or where `run` began with it itself."""
    first, *later = rounds_of(run)
    model = first.step(SFT).model.resolve()
    known = later and first.step(SFT).is_finished and str(model) != run.read_config().sft_model
    return model if known else None


def over_first_file(run: RunDirectory, step: Step) -> Path:
    """The comparison of the step's model with the first SFT model."""
    return run.path / "evaluations" / f"{step.command}-against-first-sft.json"


def rounds(run: RunDirectory) -> list[Round]:
    """All of the chain that ends with `run`; none where it goes on from nothing."""
    chain = rounds_of(run)
    return [round_of(each, before) for each, before in zip(chain, [None, *chain], strict=False)] if chain[1:] else []


def round_of(run: RunDirectory, before: RunDirectory | None) -> Round:
    evaluation = run.read_comparison(run.last_step) or {}
    file = over_first_file(run, run.last_step)
    first = read_json(file, "delete it") if file.exists() else evaluation if before is None else {}
    pair = pair_of(evaluation)
    ours = evaluation.get(list(pair)[-1], {})
    bad = [sign.text for sign in guard_signs(evaluation, *pair) if not sign.is_good] if evaluation else []
    counts = read_counts(run.data)["rows"] if (run.data / COUNTS_FILE).exists() else {}
    by = by_whom(run)
    return Round(
        f"{run.path.resolve().name} ({run.last_step.name})",
        f"{counts.get(f'{PAIRS.name}_train', 0):,}" + (f" ({by})" if by else ""),
        share(evaluation.get("win_rate")),
        people_over(run, before),
        share(first.get("win_rate")),
        kl_of(evaluation) + (f" ({far})" if before is not None and (far := kl_of(first)) else ""),
        f"{ours['length']:.1f}" if ours else "",
        "; ".join(bad) or ("hold" if ours else ""),
    )


def kl_of(evaluation: Mapping[str, Any]) -> str:
    found = evaluation.get(list(pair_of(evaluation))[-1], {})
    return f"{found['kl']:.2f}" if "kl" in found else ""


def by_whom(run: RunDirectory) -> str:
    """`ann 120, bob 80`: the preferences that were there when the run was prepared; empty of other data."""
    started = begun_at(run)
    found = [
        each
        for source in run.read_config().data.sources
        for each in preferences_in(Path(source))
        if not started or each.time[:19] <= started[:19]
    ]
    return ", ".join(f"{name} {sum(each.by == name for each in found):,}" for name in people(found))


def preferences_in(file: Path) -> list[Preference]:
    """Those in a file; none of other data, or of a file that is gone."""
    try:
        return PreferenceFile(file).read() if file.is_file() else []
    except UserError:
        return []


def people_over(run: RunDirectory, before: RunDirectory | None) -> str:
    """How often people preferred the run's model to the one before, by what was collected for both."""
    if before is None:
        return ""
    ours, theirs = (f"{each.path.resolve().name}/{each.last_step.command}" for each in (run, before))
    found = win_rates([*preferences_in(before.preferences), *preferences_in(run.preferences)], ours, theirs)
    return f"{share(found['together'])}, {found['together']['preferences']}" if found else ""


def rounds_table(run: RunDirectory, width: int = 0) -> str:
    """The chain as a table; `width` 0 is that of the terminal. Empty where there is none."""
    found = rounds(run)
    if not found:
        return ""
    console = Console(file=io.StringIO(), width=width or columns(), highlight=False)
    table = Table(show_lines=True)
    for heading in HEADINGS:
        table.add_column(Text(heading), overflow="fold")
    for each in found:
        table.add_row(*map(Text, each.cells))
    console.print(table)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]
