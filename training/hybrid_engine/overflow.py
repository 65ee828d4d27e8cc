"""fp16: several roles make an optimiser step, or none does.

DeepSpeed skips the step of a role whose scaled gradient overflows. Where actor and critic learn from one another's
work, one that goes on alone drifts from the other (DeepSpeed-Chat's --align_overflow).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from training.hybrid_engine.zero_engine import ZeroEngine


def step_together(engines: Sequence[ZeroEngine]) -> tuple[list[dict[str, float]], bool]:
    """The steps of all engines after their backward passes, and whether they were made. All ranks call it.

    An engine whose own gradient is finite keeps its loss scale when it skips for another.
    """
    overflows = [has_overflow(engine.engine.optimizer) for engine in engines]
    skipped = any(overflows)
    results = []
    for engine, own in zip(engines, overflows, strict=True):
        with forced(engine.engine.optimizer, skipped, keeps_scale=skipped and not own):
            results.append(engine.step())
    return results, not skipped


def has_overflow(optimizer: Any) -> bool:
    """What DeepSpeed's optimiser would find when stepping; the same on every rank. Some forget it after one look."""
    if hasattr(optimizer, "overflow_checker"):  # stage 0
        return bool(optimizer.overflow_checker.check())
    return bool(optimizer.has_overflow())


@contextmanager
def forced(optimizer: Any, overflow: bool, keeps_scale: bool) -> Iterator[None]:
    """Inside, the optimiser finds `overflow` when it looks, and does not lower its loss scale if it `keeps_scale`."""
    checker = getattr(optimizer, "overflow_checker", None)
    places = [(checker, "check")] if checker is not None else [(optimizer, "has_overflow")]
    replaced: list[tuple[Any, str, Any]] = [(*place, lambda *_, **__: overflow) for place in places]
    if keeps_scale:
        replaced.append((optimizer, "_update_scale", lambda *_, **__: None))
    for owner, name, function in replaced:
        setattr(owner, name, function)  # in front of the class's method
    try:
        yield
    finally:
        for owner, name, _ in replaced:
            delattr(owner, name)
