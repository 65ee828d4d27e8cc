"""The demonstrations that PPO-ptx mixes into step 3: those of step 1, or another file of the user's."""

import json
from pathlib import Path
from typing import cast

from inference.chat_format import ChatFormat
from inference.disk import write_text
from inference.errors import UserError
from training.config import RunConfig
from training.data.reading import read_sources
from training.data.rows import DEMONSTRATIONS_FILE, SFTRow, read_rows
from training.data.split import opening


def demonstrations(config: RunConfig, data: Path, chat_format: ChatFormat | None = None) -> list[SFTRow]:
    """Rows with a prompt and a response, from `rlhf.ptx.source` (without the questions that the run holds out) or the
    run's `data`, which keeps the former once they were read. Raises UserError without any."""
    source, kept = config.rlhf.ptx.source, data / DEMONSTRATIONS_FILE
    if source and kept.exists():
        return cast(list[SFTRow], read_rows(kept))
    if source:
        given = config.data.model_copy(update={"source": source, "limit": 0})
        (read,) = read_sources(given, lambda _: None, chat_format)
        held_out = {opening(row["prompt"]) for file in data.glob("*_eval.jsonl") for row in read_rows(file)}
        rows = [cast(SFTRow, row) for row in read.rows if "response" in row and opening(row["prompt"]) not in held_out]
    else:
        rows = cast(list[SFTRow], read_rows(data / "sft_train.jsonl"))
    if not rows:
        raise UserError(
            f"rlhf.ptx needs rows with a prompt and a response, and {source or 'the data of step 1'} has none: name a "
            f"file that has in rlhf.ptx.source, or set rlhf.ptx.coefficient=0."
        )
    return rows


def keep_demonstrations(config: RunConfig, data: Path, chat_format: ChatFormat) -> None:
    """Raise UserError without any; those of another file are put beside the run's own, and not read anew."""
    rows, kept = demonstrations(config, data, chat_format), data / DEMONSTRATIONS_FILE
    if config.rlhf.ptx.source and not kept.exists():
        write_text(kept, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
