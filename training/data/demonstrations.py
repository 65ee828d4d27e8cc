"""The demonstrations that PPO-ptx mixes into step 3: those of step 1, or another file of the user's."""

from pathlib import Path
from typing import cast

from inference.errors import UserError
from training.config import RunConfig
from training.data.reading import read_sources
from training.data.rows import SFTRow, read_rows


def demonstrations(config: RunConfig, data: Path) -> list[SFTRow]:
    """Rows with a prompt and a response, from `rlhf.ptx.source` or the run's `data`. Raises UserError without any."""
    source = config.rlhf.ptx.source
    if source:
        given = config.data.model_copy(update={"source": source, "limit": 0})
        (read,) = read_sources(given, lambda _: None)
        rows = [cast(SFTRow, row) for row in read.rows if "response" in row]
    else:
        rows = cast(list[SFTRow], read_rows(data / "sft_train.jsonl"))
    if not rows:
        raise UserError(
            f"rlhf.ptx needs rows with a prompt and a response, and {source or 'the data of step 1'} has none: name a "
            f"file that has in rlhf.ptx.source, or set rlhf.ptx.coefficient=0."
        )
    return rows
