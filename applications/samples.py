"""`rlhf-chat samples`: what the policy said in an iteration, and what came of it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from inference.console import PrintableConsole
from inference.errors import UserError, typed
from inference.streams import show_json
from training.metrics import Journal
from training.run_directory import RunDirectory
from training.steps import PPO

Row = Mapping[str, Any]
PARTS = {"reward/score": "score", "reward/missing_end": "no end", "reward/kl": "KL penalty"}
"""What makes up `reward/total`."""


def samples_command(path: Path, iteration: int | None, worst: int, best: int, longest: int, as_json: bool) -> None:
    """Print samples: all, or the worst, best and longest ones, in this order and each once."""
    run = RunDirectory(path)
    run.read_config()
    rows, numbers = Journal(run.step(PPO).rollouts_file).read_one(iteration)
    if not numbers:
        command = f"run --from {typed(path)} --name NEW" if run.step(PPO).is_finished else f"rlhf {typed(path)}"
        raise UserError(
            f"{path} has no {run.step(PPO).rollouts_file.name}: rlhf-chat {command} --set rlhf.rollouts_every=1 "
            f"writes every sample of each iteration that is still to come."
        )
    if not rows:
        listed = ", ".join(map(str, numbers))
        raise UserError(f"No samples of iteration {iteration} were written in {path}: there are those of {listed}.")
    chosen = chosen_of(rows, worst, best, longest) if worst or best or longest else rows
    if as_json:
        return show_json(chosen)
    console = PrintableConsole(soft_wrap=True, highlight=False)
    console.print(f"Iteration {rows[0]['number']}: {len(chosen)} of {len(rows)} samples", markup=False)
    for row in chosen:
        console.print()
        console.print(" · ".join(facts(row)), style="bold", markup=False)
        console.print(row["prompt"], style="dim", end="", markup=False)
        console.print(row["response"], markup=False)


def chosen_of(rows: list[dict[str, Any]], worst: int, best: int, longest: int) -> list[dict[str, Any]]:
    """By `reward/total`, and by the tokens of the response."""
    by_reward = sorted(rows, key=lambda row: row["reward/total"])
    by_length = sorted(rows, key=lambda row: -len(row["response_ids"]))
    picked = [*by_reward[:worst], *by_reward[::-1][:best], *by_length[:longest]]
    return list({row["sample"]: row for row in picked}.values())


def facts(row: Row) -> Iterator[str]:
    """What stands above a sample."""
    yield f"sample {row['sample']}"
    parts = ", ".join(f"{name} {row[key]:z.2f}" for key, name in PARTS.items() if row[key])
    yield f"reward {row['reward/total']:z.2f}{f' ({parts})' if parts else ''}"
    given = [
        f"{key.removeprefix('reward/')} {value:z.2f}"
        for key, value in row.items()
        if key.startswith("reward/") and key not in (*PARTS, "reward/total")
    ]
    yield f"given by {', '.join(given)}"
    if "kl" in row:
        yield f"KL {sum(row['kl']):z.2f} nats"
    yield f"{len(row['response_ids'])} tokens{', truncated' if row['truncated'] else ''}"
