"""One request on its way through the server."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference.chat_model import TextPieces
from inference.generation.own_draw import OwnSample
from inference.generation.sample import SamplingKey, SamplingSettings
from inference.serving.request import Logprobs, StopStrings


@dataclass(frozen=True)
class Piece:
    """New text of one choice."""

    choice: int
    text: str
    finish: str | None = None
    """With the last piece: `stop` or `length`."""
    logprobs: list[dict[str, Any]] | None = None
    """Of the tokens of the text, where they are asked for."""


@dataclass(frozen=True)
class Failure:
    """The rest will not come."""

    status: int
    message: str


Event = Piece | Failure


class Choice:
    """One answer of a request as it is drawn."""

    def __init__(
        self, sample: OwnSample, decode: Callable[[list[int]], str], stops: Sequence[str], begun: Sequence[int] = ()
    ):
        """The answer goes on behind the tokens `begun`, the end of its prompt."""
        self.sample = sample
        self.finish: str | None = None
        self.text = ""
        self._pieces, self._stops, self._begun = TextPieces(decode), StopStrings(stops), begun
        self._starts: list[int] = []  # of each token: the characters before it
        self._decoded = self._shown_tokens = 0

    def grow(self) -> str:
        """After a token: the text that can be shown now and was not before. A stop string ends the sample."""
        if self._begun and not self._starts:
            self._pieces.take(self._begun)
        self._starts.append(self._decoded)
        piece = self._pieces.take([*self._begun, *self.sample.response_ids], is_whole=self.sample.is_over)
        self._decoded += len(piece)
        shown = self._stops.let_pass(piece, is_last=self.sample.is_over)
        if self._stops.was_found:
            self.sample.ended = True
        if self.sample.is_over:
            self.finish = "stop" if self.sample.ended else "length"
        self.text += shown
        return shown

    def new_tokens(self) -> range:
        """Places of the tokens of which something is shown now, and was not before."""
        shown = sum(start < len(self.text) for start in self._starts)
        if self.finish is not None and not self._stops.was_found:  # also those that say nothing, but for the end
            shown = len(self._starts) - self.sample.ended
        first, self._shown_tokens = self._shown_tokens, max(shown, self._shown_tokens)
        return range(first, self._shown_tokens)


class Job:
    """The choices of one request. The worker draws them; `events` is for the event loop alone."""

    def __init__(
        self,
        prompt_ids: list[int],
        settings: SamplingSettings,
        key: SamplingKey,
        choices: int,
        limit: int,
        stops: Sequence[str],
        decode: Callable[[list[int]], str],
        streams: bool,
        begun: Sequence[int] = (),
        logprobs: Logprobs | None = None,
        alternatives: int = 0,
        note: str = "",
    ):
        """`limit` is the most tokens of an answer. A job that `streams` tells each piece, others whole answers.

        `begun` tokens of an answer follow the prompt. With `logprobs` each token's is told, with those of so many
        `alternatives`. The `note` is for the client.
        """
        prompt: Tensor = torch.tensor([*prompt_ids, *begun], dtype=torch.int64)
        samples = [
            OwnSample(index, prompt, limit, settings=settings, key=key, alternatives=alternatives)
            for index in range(choices)
        ]
        self.choices = [Choice(sample, decode, stops, begun) for sample in samples]
        self.streams, self.note, self._logprobs = streams, note, logprobs
        self.events: asyncio.Queue[Event] = asyncio.Queue()

    def grow(self, choice: Choice) -> Piece | None:
        """After a token of a choice: what there is to tell."""
        text = choice.grow()
        if not self.streams:
            text = choice.text if choice.finish is not None else ""
        if not text and choice.finish is None:
            return None
        logprobs = self._logprobs.of(choice.sample, choice.new_tokens()) if self._logprobs else None
        return Piece(choice.sample.index, text, choice.finish, logprobs)

    @property
    def prompt_tokens(self) -> int:
        return len(self.choices[0].sample.prompt_ids)

    @property
    def response_tokens(self) -> int:
        return sum(len(choice.sample.response_ids) for choice in self.choices)

    @property
    def has_begun(self) -> bool:
        return self.response_tokens > 0

    @property
    def is_over(self) -> bool:
        return all(choice.finish is not None for choice in self.choices)
