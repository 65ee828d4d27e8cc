"""Rewards that do not come from the reward model: a Python function of the user's, or an address that scores.

Both get prompts as lists of messages, responses as text and, where they want them, the prompts' other keys in the data.
"""

import importlib.util
import inspect
import json
import math
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol

from inference.chat_format import Message
from inference.errors import UserError
from training.distributed import Ranks
from training.rlhf_settings import RLHFSettings

Row = dict[str, Any]
LONGEST_PAUSE = 30.0
"""Seconds between two tries."""


class RewardFailed(UserError):
    """A source of rewards did not give any."""


class Source(Protocol):
    """Gives one number for each response. Raises RewardFailed."""

    @property
    def name(self) -> str: ...

    def scores(self, prompts: list[list[Message]], responses: list[str], rows: list[Row]) -> list[float]: ...


class RewardFunction:
    """`path/to/file.py:function`, called with (prompts, responses), or (prompts, responses, rows) if it takes three."""

    name = "function"

    def __init__(self, spec: str):
        """Load it. Raises UserError where there is no such function."""
        self.spec = spec
        place, _, name = spec.rpartition(":")
        file = Path(place).expanduser()
        if not file.is_file():
            raise UserError(f"rlhf.reward_function={spec}: there is no file {file}; give path/to/file.py:function.")
        module_spec = importlib.util.spec_from_file_location("rlhf_chat_reward_function", file)
        assert module_spec is not None and module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        try:
            module_spec.loader.exec_module(module)
        except Exception as error:
            raise failed(f"rlhf.reward_function={spec}: the file cannot be loaded", error) from error
        function = getattr(module, name, None)
        if not callable(function):
            raise UserError(f"rlhf.reward_function={spec}: the file has no function {name}; name one that it has.")
        self.function: Callable[..., Any] = function
        try:
            inspect.signature(function).bind([], [], [])
            self.takes_rows = True
        except TypeError:
            self.takes_rows = False

    def scores(self, prompts: list[list[Message]], responses: list[str], rows: list[Row]) -> list[float]:
        try:
            found = self.function(prompts, responses, *([rows] if self.takes_rows else []))
        except Exception as error:
            raise failed(f"rlhf.reward_function={self.spec} failed", error) from error
        return checked(found, len(responses), f"rlhf.reward_function={self.spec}")


@dataclass(frozen=True)
class RewardEndpoint:
    """POST {"prompts", "responses", "rows"} as JSON to `url`, which answers {"scores": [...]}."""

    url: str
    timeout: float
    """Seconds."""
    retries: int
    name = "url"

    def scores(self, prompts: list[list[Message]], responses: list[str], rows: list[Row]) -> list[float]:
        body = json.dumps({"prompts": prompts, "responses": responses, "rows": rows}).encode()
        answer = self._ask(body)
        try:
            found = json.loads(answer)["scores"]
        except (ValueError, KeyError, TypeError):
            begin = answer[:80].decode(errors="replace")
            raise RewardFailed(
                f'rlhf.reward_url={self.url} must answer {{"scores": [...]}} as JSON, not {begin!r}; correct the '
                f"server and give the same command again."
            ) from None
        return checked(found, len(responses), f"rlhf.reward_url={self.url}")

    def _ask(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return response.read()
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}"
                if error.code < 500 and error.code != 429:  # the same question gets the same answer
                    break
            except (OSError, HTTPException) as error:  # URLError and timeouts are OSErrors
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < self.retries:
                time.sleep(min(2.0**attempt, LONGEST_PAUSE))
        raise RewardFailed(
            f"rlhf.reward_url={self.url} gives no scores ({reason}, {attempt + 1} tries); see that it runs, then give "
            f"the same command again."
        )


def failed(what: str, error: Exception) -> RewardFailed:
    """The sentence for an error in the user's code; its traceback goes with it as a note."""
    raised = RewardFailed(
        f"{what} ({type(error).__name__}: {first_line(error)}); correct it and give the command again."
    )
    raised.add_note("".join(traceback.format_exception(error)))
    return raised


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def checked(found: Any, count: int, source: str) -> list[float]:
    """`found` as finite floats, one for each response. Raises RewardFailed."""
    try:
        scores = [float(score) for score in found]
    except (TypeError, ValueError):
        raise RewardFailed(f"{source} must return a list of numbers, not {str(found)[:80]!r}; correct it.") from None
    if len(scores) != count:
        raise RewardFailed(
            f"{source} returned {len(scores)} scores for {count} responses; it must return one for each."
        )
    bad = next((score for score in scores if not math.isfinite(score)), None)
    if bad is not None:
        raise RewardFailed(f"{source} returned {bad}; every score must be a finite number.")
    return scores


class Rewards:
    """What PPO is told to raise: the weighted sum of the reward model's scores and those of the user's sources."""

    def __init__(self, settings: RLHFSettings, ranks: Ranks):
        self.ranks = ranks
        self.weights = settings.reward_weights
        self.has_model = settings.has_reward_model
        self.sources: list[tuple[Source, float]] = []
        if settings.reward_function and self.weights.function:
            self.sources.append((RewardFunction(settings.reward_function), self.weights.function))
        if settings.reward_url and self.weights.url:
            endpoint = RewardEndpoint(settings.reward_url, settings.reward_timeout, settings.reward_retries)
            self.sources.append((endpoint, self.weights.url))

    def total(
        self, of_model: Sequence[float], prompts: list[list[Message]], responses: list[str], rows: list[Row], group: int
    ) -> tuple[list[float], dict[str, float]]:
        """Sums in the order of the responses, and the mean of each source. All ranks call it with the same and get it.

        Each rank asks for a part; the `group` responses of a prompt go into one question. Raises RewardFailed on all
        ranks where one of them failed.
        """
        parts = {"model": (list(of_model), self.weights.model)} if self.has_model else {}
        for source, weight in self.sources:
            parts[source.name] = (self._ask(source, prompts, responses, rows, group), weight)
        totals = [sum(weight * scores[i] for scores, weight in parts.values()) for i in range(len(responses))]
        return totals, {f"reward/{name}_mean": sum(scores) / len(scores) for name, (scores, _) in parts.items()}

    def _ask(
        self, source: Source, prompts: list[list[Message]], responses: list[str], rows: list[Row], group: int
    ) -> list[float]:
        share = -(-len(responses) // group // self.ranks.size) * group
        ours = slice(self.ranks.rank * share, (self.ranks.rank + 1) * share)
        found: list[float] | RewardFailed = []
        if responses[ours]:
            try:
                found = source.scores(prompts[ours], responses[ours], rows[ours])
            except RewardFailed as error:
                found = error
        scores: list[float] = []
        for share_found in self.ranks.gather(found):
            if isinstance(share_found, RewardFailed):
                raise share_found
            scores += share_found
        return scores
