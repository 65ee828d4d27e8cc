"""The table at the end of a run, and a few answers side by side."""

import io
import json
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from training.data.rows import read_rows
from training.run_directory import RunDirectory

ROWS = (
    ("true upbeat score", "true_score", "{:.3f}"),
    ("learned reward", "learned_reward", "{:.3f}"),
    ("reward, all sources", "reward", "{:.3f}"),
    ("KL to SFT (nats a reply)", "kl", "{:.2f}"),
    ("length (tokens)", "length", "{:.1f}"),
    ("ended fraction", "ended_fraction", "{:.3f}"),
    ("distinct bigrams", "distinct_bigrams", "{:.3f}"),
    ("most frequent reply", "most_frequent_share", "{:.1%}"),
    ("perplexity, untouched model", "perplexity_untouched", "{:.1f}"),
)
SHOWN_ANSWERS = 6


def comparison_table(run: RunDirectory, width: int = 100) -> str:
    """Reward accuracy, SFT beside RLHF, win rate and sample answers, as text."""
    result = json.loads(run.evaluation_file.read_text())
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print()
    if run.step(2).is_finished:
        print_reward_accuracy(console, run.step(2).read_result())
    sampling = result["sampling"]
    console.print(
        f"{result['prompts']} held-out prompts, temperature {sampling['temperature']:g}, "
        f"at most {sampling['max_tokens']} tokens:"
    )
    table = Table()
    table.add_column("")
    table.add_column("SFT", justify="right")
    table.add_column("RLHF", justify="right")
    for label, key, form in ROWS:
        if key in result["sft"]:
            table.add_row(label, form.format(result["sft"][key]), form.format(result["rlhf"][key]))
    console.print(table)
    win = result["win_rate"]
    console.print(
        f"RLHF beats SFT in {win['rate']:.1%} of prompts by {win['judge']} (95 % interval {win['low']:.1%} to "
        f"{win['high']:.1%}; a tie counts half)"
    )
    if unseen := result.get("win_rate_unseen_questions"):
        console.print(
            f"On the {unseen['prompts']} prompts under questions that no step was trained on: {unseen['rate']:.1%} "
            f"({unseen['low']:.1%} to {unseen['high']:.1%})"
        )
    print_answers(console, run)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def print_reward_accuracy(console: Console, result: dict[str, Any]) -> None:
    if "eval/accuracy" not in result:
        return
    by_length = ", ".join(
        f"up to {key.removeprefix('eval/accuracy_up_to_').removesuffix('_tokens')} tokens {value:.1%}"
        for key, value in result.items()
        if key.startswith("eval/accuracy_up_to_")
    )
    if "eval/accuracy_unseen_questions" in result:
        by_length += f"; under questions not trained on {result['eval/accuracy_unseen_questions']:.1%}"
    console.print(f"Reward model: {result['eval/accuracy']:.1%} of held-out pairs ranked right ({by_length})")


def print_answers(console: Console, run: RunDirectory) -> None:
    table = Table(show_lines=True)
    for name in ("prompt", "SFT", "RLHF"):
        table.add_column(name, overflow="fold")
    for row in read_rows(run.comparison_file)[:SHOWN_ANSWERS]:
        table.add_row(Text(row["prompt"][-1]["content"]), Text(row["sft"]), Text(row["rlhf"]))  # no markup in them
    console.print(table)
