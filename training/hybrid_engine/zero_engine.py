"""fp16: several roles make an optimiser step, or none does.

DeepSpeed skips the step of a role whose scaled gradient overflows. Where actor and critic learn from one another's
work, one that goes on alone drifts from the other (DeepSpeed-Chat's --align_overflow).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from training.distributed import Ranks
from training.hybrid_engine.zero_engine import ZeroEngine
from training.private_surfaces import has_overflow, overflow_replacements


def step_together(engines: Sequence[ZeroEngine], ranks: Ranks) -> tuple[list[dict[str, float]], bool]:
    """The steps of this rank's engines after their backward passes, and whether they were made. All ranks call it.

    An engine whose own gradient is finite keeps its loss scale when it skips for another.
    """
    overflows = [overflows_now(engine) for engine in engines]
    skipped = any(ranks.gather(any(overflows), "whether a gradient overflowed"))
    results = []
    for engine, own in zip(engines, overflows, strict=True):
        with forced(engine.engine.optimizer, skipped, keeps_scale=skipped and not own):
            results.append(engine.step())
    return results, not skipped


def overflows_now(engine: ZeroEngine) -> bool:
    with engine.ranks.as_world():
        return has_overflow(engine.engine.optimizer)


@contextmanager
def forced(optimizer: Any, overflow: bool, keeps_scale: bool) -> Iterator[None]:
    """Inside, the optimiser finds `overflow` when it looks, and does not lower its loss scale if it `keeps_scale`."""
    replaced = overflow_replacements(overflow, keeps_scale)
    for name, function in replaced.items():
        setattr(optimizer, name, function)  # in front of the class's method
    try:
        yield
    finally:
        for name in replaced:
            delattr(optimizer, name)
