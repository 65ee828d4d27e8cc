"""The tables of an evaluation: accuracies, two models beside each other, and a few of their answers."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from inference.streams import columns
from training.data.rows import read_rows
from training.evaluation.statistics import Sign, guard_signs, verdict
from training.metrics import Journal
from training.run_directory import RunDirectory
from training.steps import PPO, REWARD, Step

ROWS = (
    ("upbeat score (lexicon)", "true_score", "{:z.3f}"),
    ("learned reward", "learned_reward", "{:z.3f}"),
    ("reward of the judge", "judge_reward", "{:z.3f}"),
    ("reward of the run before", "reward_before", "{:z.3f}"),
    ("reward, all sources", "reward", "{:z.3f}"),
    ("KL to {against} (nats a reply)", "kl", "{:z.2f}"),
    ("length (tokens)", "length", "{:z.1f}"),
    ("ended fraction", "ended_fraction", "{:z.3f}"),
    ("distinct bigrams", "distinct_bigrams", "{:z.3f}"),
    ("most frequent reply", "most_frequent_share", "{:.1%}"),
    ("perplexity, untouched model", "perplexity_untouched", "{:z.1f}"),
    ("perplexity, SFT model", "perplexity_sft_model", "{:z.1f}"),
    ("perplexity of demonstrations", "perplexity_demonstrations", "{:z.1f}"),
)
SHOWN_ANSWERS = 6
NARROWEST = 20  # columns of the terminal for each text that stands beside others


def pair_of(result: Mapping[str, Any]) -> dict[str, str]:
    """Keys and names of the two models that were compared, the one measured against first."""
    return result.get("pair") or {"sft": "SFT", "rlhf": "RLHF"}


def table_rows(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Label and both models' values of each measure that there is."""
    first, second = pair_of(result)
    rows = []
    sources = [(f"reward {key.removeprefix('reward/')}", key, "{:z.3f}") for key in result[first] if "reward/" in key]
    for label, key, form in (*ROWS[:5], *sources, *ROWS[5:]):
        if key in result[first] and key in result[second]:
            theirs, ours = (shown(result[model][key], form) for model in (first, second))
            rows.append((label.format(against=pair_of(result)[first]), theirs, ours))
    return rows


def shown(value: float, form: str) -> str:
    """A figure of a table; one of more than six digits as a power of ten."""
    return form.format(value) if abs(value) < 1e6 else f"{value:.1e}"


def comparison_table(run: RunDirectory, step: Step = PPO) -> str:
    """A run's own evaluation as text: what is out of bounds, reward accuracy, SFT beside RLHF or DPO, win rate and
    sample answers.
    """
    _, answers_file = run.comparison_of(step)
    result = run.read_comparison(step) or {}
    line = reward_accuracy_line(run.step(REWARD).read_result()) if run.step(REWARD).is_finished else ""
    if step.has_reference and (accuracy := run.step(step).read_result().get("eval/accuracy")) is not None:
        counted = counted_pairs(run.step(step).read_result(), accuracy)
        line = f"{step.name}: {counted} ranked right by its implicit reward"
    return evaluation_table(result, answers_file, line, training_signs(run, step))


def evaluation_table(
    result: dict[str, Any], answers_file: Path, accuracy: str = "", training: Sequence[Sign] = ()
) -> str:
    """The results of an evaluation as text. `accuracy` is step 2's own line, for where nothing newer was measured;
    `training` says what the training showed.
    """
    console = text_console()
    console.print()
    if bad := [sign.text for sign in (*training, *guard_signs(result, *pair_of(result))) if not sign.is_good]:
        console.print(f"Out of bounds: {'; '.join(bad)}. Read the answers before the win rate.", markup=False)
    for key, who, line in (("reward_accuracy", "Reward model", accuracy), ("judge_accuracy", "The judge", "")):
        text = measured_accuracy_line(who, result[key]) if key in result else line
        if text:
            console.print(text)
    if "panel" in result:
        console.print(f"{PANEL_TITLE}:")
        panel = Table()
        for name in ("", *PANEL_COLUMNS.values()):
            panel.add_column(name, justify="right" if name else "left", overflow="fold")
        for row in panel_rows(result["panel"]):
            panel.add_row(*map(Text, row))
        console.print(panel)
        console.print(panel_line(result["panel"]), markup=False)
    sampling = result["sampling"]
    console.print(
        f"{result['prompts']} held-out prompts, temperature {sampling['temperature']:g}, "
        f"at most {sampling['max_tokens']} tokens:"
    )
    for sentence in result.get("trained_elsewhere", []):
        console.print(Text(sentence))
    names = list(pair_of(result).values())
    table = Table()
    table.add_column("")
    rows = table_rows(result)
    for number, name in enumerate(names, 1):  # figures stay whole
        widest = max((len(row[number]) for row in rows), default=None)
        table.add_column(Text(name), justify="right", overflow="fold", min_width=widest)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    if "win_rate" in result:
        console.print(verdict(result["win_rate"], *names), markup=False)
        if "panel" in result and "lexicon" in result["win_rate"]["judge"]:
            console.print("No reward saw the lexicon; its makers are those of the ratings.")
    else:
        console.print(
            "No win rate: nothing judges (no finished reward model, no true score); name a judge with eval --judge."
        )
    if "win_rate_before" in result:
        console.print(verdict(result["win_rate_before"], *names), markup=False)
    if unseen := result.get("win_rate_unseen_questions"):
        console.print(
            f"On the {unseen['prompts']} prompts under questions that no step was trained on: {unseen['rate']:.1%} "
            f"({unseen['low']:.1%} to {unseen['high']:.1%})"
        )
    if rates := of_people(result):
        print_preferences(console, rates)
    print_answers(console, pair_of(result), answers_file)
    return text_of(console)


def text_console() -> Console:
    """A console that writes text as wide as the terminal."""
    return Console(file=io.StringIO(), width=columns(), highlight=False)


def text_of(console: Console) -> str:
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def training_signs(run: RunDirectory, step: Step) -> list[Sign]:
    """What the metrics of a step say against its model, whatever a judge says of it."""
    rows = Journal(run.step(step).metrics_file).read() if step.draws_samples else []
    warned = [row["warning/alike"] for row in rows if "warning/alike" in row]
    alike = bool(warned) and bool(warned[-1])
    text = "Scores: no answer had another one than those it is compared with, so there was nothing to learn"
    return [Sign(False, text)] if alike else []


def reward_accuracy_line(result: Mapping[str, Any]) -> str:
    """The accuracy of step 2's last evaluation; empty where it had no held-out pairs."""
    if "eval/accuracy" not in result:
        return ""
    by_length = ", ".join(
        f"up to {key.removeprefix('eval/accuracy_up_to_').removesuffix('_tokens')} tokens {value:.1%}"
        for key, value in result.items()
        if key.startswith("eval/accuracy_up_to_")
    )
    if "eval/accuracy_unseen_questions" in result:
        by_length += f"; under questions not trained on {result['eval/accuracy_unseen_questions']:.1%}"
    return f"Reward model: {counted_pairs(result, result['eval/accuracy'])} ranked right ({by_length})"


def counted_pairs(result: Mapping[str, Any], accuracy: float) -> str:
    """`86.0% of 200 held-out pairs`; runs of before do not say how many."""
    count = f"{result['held_out']} " if "held_out" in result else ""
    return f"{accuracy:.1%} of {count}held-out pairs"


def measured_accuracy_line(who: str, measured: dict[str, Any]) -> str:
    """An accuracy with its interval and the numbers of pairs."""
    groups = {name.replace("_", " "): group for name, group in measured.items() if name != "all"}
    parts = [f"{name} {group['rate']:.1%} of {group['pairs']}" for name, group in groups.items()]
    whole = measured["all"]
    return (
        f"{who}: {whole['rate']:.1%} of {whole['pairs']} held-out pairs ranked right (95 % interval {whole['low']:.1%} "
        f"to {whole['high']:.1%}; {', '.join(parts)})"
    )


PANEL_COLUMNS = {"learned": "reward model", "person": "one person", "lexicon": "lexicon"}
PANEL_TITLE = (
    "Of two held-out texts that a panel of people rated at least 1 apart (from -4 to 4, by how positive they are), the "
    "more positive one is put higher in"
)


def panel_rows(panel: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Kind of text, and the share of pairs in which each of PANEL_COLUMNS agrees with the panel; the first interval."""
    rows = []
    for domain, judges in panel.items():
        others = (f"{judges[judge]['rate']:.1%}" for judge in list(PANEL_COLUMNS)[1:])
        rows.append((f"{domain} ({judges['texts']} texts)", rate_text(judges["learned"]), *others))
    return rows


def panel_line(panel: Mapping[str, Any]) -> str:
    """What the reward model has over the lexicon on the texts of its training's kind."""
    domain, judges = next(iter(panel.items()))
    rate, low, high = (100 * judges["over_lexicon"][key] for key in ("rate", "low", "high"))
    learned, person, lexicon = (f"{judges[judge]['rate']:.1%}" for judge in PANEL_COLUMNS)
    return (
        f"On {domain}, what it learned from, the reward model agrees with the panel in {learned} "
        f"of pairs, one person in {person}, the lexicon in {lexicon}: "
        f"{rate:+.1f} points against the lexicon (95 % interval {low:+.1f} to {high:+.1f})"
    )


def of_people(evaluation: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What people prefer, if it is in an evaluation, also in one of an early version, which called it `clicks`."""
    if "clicks" not in evaluation:
        return evaluation.get("preferences")
    renamed: Mapping[str, Any] = json.loads(json.dumps(evaluation["clicks"]).replace('"clicks": ', '"preferences": '))
    return renamed


def overview_table(result: Mapping[str, Any]) -> str:
    """What people prefer, as text: each two models that they compared, then the people."""
    console = text_console()
    for rates in result["pairs"]:
        print_preferences(console, {**rates, "agreement": []})
    if not result["pairs"]:
        console.print("All preferences are between two answers of one model: prefer --against MODEL compares two.")
    for line in overview_lines(result):
        console.print(line, markup=False)
    return text_of(console)


def overview_lines(seen: Mapping[str, Any]) -> list[str]:
    """Who prefers what, as `preferences.overview` has it."""
    share = {
        name: f"{seen[key] / seen['preferences']:.0%} {name}"
        for key, name in (("ties", "about the same"), ("both_bad", "both bad"))
    }
    by = ", ".join(f"{name} {count:,}" for name, count in seen["by"].items())
    lines = [f"{seen['preferences']:,} preferences ({by}): {', '.join(share.values())}"]
    for name, left in seen["left"].items():
        lines.append(f"{name} prefers the left answer in {rate_text(left)} of {left['preferences']:,} preferences")
    for name, agreement in seen["repeated"].items():
        lines.append(f"{name}, asked again, says the same of {agreement_text(agreement)}")
    return lines + agreement_lines(seen["agreement"])


def agreement_lines(agreement: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{' and '.join(both['people'])} say the same of {agreement_text(both)}" for both in agreement]


def agreement_text(agreement: Mapping[str, Any]) -> str:
    """`70.0% (52.1% to 83.3%) of 30 pairs, kappa 0.45 (0.12 to 0.70)`."""
    kappa = (
        "; chance alone would always"
        if agreement["kappa"] is None
        else f", kappa {agreement['kappa']:z.2f} ({agreement['kappa_low']:z.2f} to {agreement['kappa_high']:z.2f})"
    )
    same = f"{agreement['same']:.1%} ({agreement['low']:.1%} to {agreement['high']:.1%})"
    return f"{same} of {agreement['pairs']:,} pairs{kappa}"


def rate_text(rate: Mapping[str, Any]) -> str:
    return f"{rate['rate']:.1%} ({rate['low']:.1%} to {rate['high']:.1%})"


def share(win: Mapping[str, Any] | None) -> str:
    """`73.2% (66.9% to 78.7%), learned reward`; empty where it was not measured."""
    return "" if win is None else rate_text(win) + (f", {win['judge']}" if "judge" in win else "")


def preferences_table(rates: Mapping[str, Any]) -> RenderableType:
    """How often people prefer a model to another, one by one and together."""
    what = ("preferences", "about the same", "both bad", f"{rates['model']} preferred to {rates['against']}")
    table = Table("preferred by", show_footer=len(rates["by"]) > 1)
    table.columns[0].footer = "all"
    for name, all_together in zip(what, shares(rates["together"]), strict=True):
        table.add_column(Text(name), all_together, justify="right")
    for name, rate in rates["by"].items():
        table.add_row(Text(name), *shares(rate))
    return table


def shares(rate: Mapping[str, Any]) -> tuple[str, ...]:
    return *(f"{rate[key]:,}" for key in ("preferences", "ties", "both_bad")), rate_text(rate)


def people_prefer(rates: Mapping[str, Any]) -> str:
    """What all people together show."""
    together, people = rates["together"], len(rates["by"])
    count = together["preferences"]
    by = f"{count} preference{'s' * (count != 1)} of {people} {'person' if people == 1 else 'people'}"
    return verdict({**together, "prompts": count, "judge": by}, rates["against"], rates["model"])


def print_preferences(console: Console, rates: Mapping[str, Any]) -> None:
    console.print(preferences_table(rates))
    console.print(people_prefer(rates), markup=False)
    for line in agreement_lines(rates["agreement"]):
        console.print(line, markup=False)


def print_answers(console: Console, pair: Mapping[str, str], file: Path) -> None:
    """Side by side, or one below the other where words have no room beside others."""
    names = ("prompt", *pair.values())
    rows = [(row["prompt"][-1]["content"], *(row[key] for key in pair)) for row in read_rows(file)[:SHOWN_ANSWERS]]
    if console.width < len(names) * NARROWEST:
        for texts in rows:
            console.print(*(Text(f"{name}: {text}") for name, text in zip(names, texts, strict=True)), "", sep="\n")
        return
    table = Table(show_lines=True)
    for name in names:
        table.add_column(Text(name), overflow="fold")
    for texts in rows:
        table.add_row(*map(Text, texts))  # no markup in them
    console.print(table)
