"""`rlhf-chat chat`: models of a run, or a model of any kind, in the terminal or a pipe."""

import gc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from inference.chat_target import find_chat_models
from inference.collecting import without_collecting
from inference.console import PrintableConsole
from inference.errors import UserError, typed
from inference.streams import show_json, to_stderr
from training.metrics import Journal
from training.run_directory import RunDirectory
from training.steps import PPO


def chat_command(
    target: Path,
    compare: bool,
    temperature: float,
    top_p: float,
    top_k: int,
    max_tokens: int,
    seed: int,
    system: str | None,
    trusts: bool = False,
) -> None:
    """`rlhf-chat chat`."""
    if not -(2**63) <= seed < 2**63:
        raise UserError(f"--seed takes a whole number of 64 bits, not {seed}.")
    name = ""
    if "@" in target.name:
        from training.checkpoints import checkpoint_of

        if at := checkpoint_of(target):
            name, target = at.name, at.model(trusts)
    directories = find_chat_models(target, compare, model_before(target, trusts) if compare else None)
    with without_collecting():
        from inference.private_surfaces import import_transformers_lightly

        import_transformers_lightly()
        from inference.chat import chat
        from inference.chat_model import ChatModel
        from inference.generation.sampler import SamplingSettings

        models = [(name or label, ChatModel.load(path)) for label, path in directories]
        gc.freeze()  # looking through all that is loaded takes longer than the first word
    chat(models, SamplingSettings(max_tokens, temperature, top_p, top_k), seed, system)


def model_before(run: Path, trusts: bool) -> tuple[str, Path] | None:
    """What a run was given for SFT, such as the model of the round before; None where it trains its own."""
    from training.inputs import local_model
    from training.lineage import label_of
    from training.trust import of_models, require_yes

    if not (run / "config.yaml").is_file():
        return None
    config = RunDirectory(run).read_config()
    if not config.sft_model:
        return None
    require_yes(run, of_models(RunDirectory(run), config), trusts)
    directory = local_model(RunDirectory(run), config.sft_model, to_stderr)
    return label_of(directory, config.sft_model), directory


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
    """The worst and best by `reward/total`, then the longest by tokens of the response; each sample comes once."""
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
