"""A data source becomes the run's six files: {sft, pairs, prompts}_{train, eval}.jsonl, and counts.json."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from inference.chat_format import ChatFormat
from inference.errors import UserError
from training.config import DataSettings
from training.data import chitchat
from training.data.rows import KINDS, Row, pair_row, prompt_row, sft_row, write_rows
from training.data.user_files import read_user_files
from training.run_directory import write_directory, write_json

Report = Callable[[str], None]
Files = dict[str, list[Row]]
COUNTS_FILE = "counts.json"


def prepare_data(
    settings: DataSettings, seed: int, directory: Path, chat_format: ChatFormat, report: Report
) -> dict[str, int]:
    """Fill `directory`, all of it or nothing; what is there already stays. Returns the counts, which are reported."""
    counts_file = directory / COUNTS_FILE
    if counts_file.exists():
        return json.loads(counts_file.read_text())
    counts: Counter[str] = Counter()
    if settings.source == "chitchat":
        files = chitchat_files(settings, seed, chat_format, counts)
    else:
        files = user_files(settings, seed, counts)
    counts |= Counter({f"{name} rows": len(rows) for name, rows in files.items()})

    def write(temporary: Path) -> None:
        for name, rows in files.items():
            write_rows(temporary / f"{name}.jsonl", rows)
        write_json(temporary / COUNTS_FILE, dict(counts))

    directory.parent.mkdir(parents=True, exist_ok=True)
    write_directory(directory, write)
    for line in count_lines(counts):
        report(line)
    return dict(counts)


def count_lines(counts: Counter[str]) -> list[str]:
    """A few readable lines: what was left out, what is there."""
    rows = [f"{name.removesuffix(' rows')} {n:,}" for name, n in counts.items() if name.endswith(" rows")]
    other = [f"{n:,} {name}" for name, n in counts.items() if not name.endswith(" rows")]
    return (["Data: " + ", ".join(other)] if other else []) + ["Rows: " + ", ".join(rows)]


def chitchat_files(settings: DataSettings, seed: int, chat_format: ChatFormat, counts: Counter[str]) -> Files:
    """The embedded dialogues: split by dialogue over steps and evaluation, six questions held out altogether."""
    draw = random.Random(f"{seed}/chitchat")
    dialogues = chitchat.usable_dialogues(chitchat.load_dialogues(), counts)
    questions = sorted({dialogue.question for dialogue in dialogues})
    held_out = set(draw.sample(questions, chitchat.HELD_OUT_QUESTIONS))
    counts["questions"], counts["questions held out"] = len(questions), len(held_out)
    draw.shuffle(dialogues)
    dialogues = dialogues[: settings.limit or None]

    maker = chitchat.ReplyMaker(settings, chat_format, counts)
    replies: dict[str, list[chitchat.Reply]] = {"eval": [], **{kind: [] for kind in KINDS}}
    for dialogue in dialogues:
        is_held_out = dialogue.question in held_out or draw.random() < settings.held_out
        part = "eval" if is_held_out else draw.choices(KINDS, settings.split)[0]
        replies[part] += maker.replies(dialogue, draw)
    for group in replies.values():
        draw.shuffle(group)

    def pairs(group: list[chitchat.Reply], part: str) -> list[Row]:
        made = chitchat.make_pairs(group, chitchat.MOST_ROWS[part], draw)
        return [pair_row(prompt, chosen.text, rejected.text) for chosen, rejected, prompt in made]

    train, held = chitchat.MOST_ROWS["train"], chitchat.MOST_ROWS["eval"]
    return {
        "sft_train": [sft_row(r.prompt, r.text) for r in replies["sft"][:train]],
        "sft_eval": [sft_row(r.prompt, r.text) for r in replies["eval"][:held]],
        "pairs_train": pairs(replies["pairs"], "train"),
        "pairs_eval": pairs(list(replies["eval"]), "eval"),
        "prompts_train": [prompt_row(r.prompt) for r in replies["prompts"][:train]],
        "prompts_eval": [prompt_row(r.prompt) for r in replies["eval"][:held]],
    }


def user_files(settings: DataSettings, seed: int, counts: Counter[str]) -> Files:
    """A user's rows. Pairs serve all three steps in the shares of `split`, as DeepSpeed-Chat does; so do the prompts of
    demonstrations, unless the files bring prompts (or demonstrations) of their own."""
    source = Path(settings.source)
    if not source.exists() and "/" in settings.source and source.suffix == "" and not source.is_absolute():
        raise UserError(
            f"Data sets on a hub ({settings.source}) cannot be read yet; save it as a JSON-lines file and give that."
        )
    rows = read_user_files(source, settings.bad_rows == "skip", settings.limit)
    for reason, count in rows.skipped.items():
        counts[f"rows skipped: {reason}"] = count

    def split_of(row: Row) -> float:
        """A number in [0, 1) from the seed and how the prompt begins: rows of one conversation stay together."""
        begin = next((m["content"] for m in row["prompt"] if m["role"] != "system"), "")
        return random.Random(f"{seed}/{begin}").random()

    held_out = held_out_bound([split_of(row) for row in rows.sft + rows.pairs + rows.prompts], settings.held_out)
    served = [kind for kind, own in zip(KINDS, (rows.sft, [], rows.prompts), strict=True) if not own]
    shares = [share for kind, share in zip(KINDS, settings.split, strict=True) if kind in served]
    files: Files = {f"{kind}_{part}": [] for kind in KINDS for part in ("train", "eval")}

    def add(kind: str, row: Row, evaluation: bool) -> None:
        files[f"{kind}_{'eval' if evaluation else 'train'}"].append(row)

    for row in rows.pairs:
        place = split_of(row)
        evaluation = place < held_out
        forms = {"sft": sft_row(row["prompt"], row["chosen"]), "pairs": row, "prompts": prompt_row(row["prompt"])}
        chosen = served if evaluation else [share_of((place - held_out) / (1 - held_out), served, shares)]
        for kind in chosen:
            add(kind, forms[kind], evaluation)
    for row in rows.sft:
        evaluation = split_of(row) < held_out
        add("sft", row, evaluation)
        if not rows.prompts and not rows.pairs:
            add("prompts", prompt_row(row["prompt"]), evaluation)
    for row in rows.prompts:
        add("prompts", row, split_of(row) < held_out)
    return files


def share_of(place: float, kinds: list[str], shares: list[float]) -> str:
    """Which kind a place in [0, 1) falls to, by the kinds' shares."""
    for kind, share in zip(kinds, shares, strict=True):
        place -= share / sum(shares)
        if place < 0:
            return kind
    return kinds[-1]


def held_out_bound(places: list[float], share: float) -> float:
    """Rows below it are for evaluation: `share`, moved so that both sides have a prompt if there are two."""
    distinct = sorted(set(places))
    if len(distinct) < 2:
        return 0.0
    if distinct[0] >= share:
        return (distinct[0] + distinct[1]) / 2
    if distinct[-1] < share:
        return (distinct[-2] + distinct[-1]) / 2
    return share
