"""One request on its way through the server."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.generation.own_draw import OwnSample
from inference.generation.sample import SamplingKey, SamplingSettings
from inference.serving.stop_strings import StopStrings
from inference.text_pieces import TextPieces


@dataclass(frozen=True)
class Piece:
    """New text of one choice."""

    choice: int
    text: str
    finish: str | None = None
    """With the last piece: `stop` or `length`."""


@dataclass(frozen=True)
class Failure:
    """The rest will not come."""

    status: int
    message: str


Event = Piece | Failure


class Choice:
    """One answer of a request as it is drawn."""

    def __init__(self, sample: OwnSample, decode: Callable[[list[int]], str], stops: Sequence[str]):
        self.sample = sample
        self.finish: str | None = None
        self.text = ""
        self._pieces, self._stops = TextPieces(decode), StopStrings(stops)

    def grow(self) -> str:
        """After a token: the text that can be shown now and was not before. A stop string ends the sample."""
        piece = self._pieces.take(self.sample.response_ids, is_whole=self.sample.is_over)
        shown = self._stops.let_pass(piece, is_last=self.sample.is_over)
        if self._stops.was_found:
            self.sample.ended = True
        if self.sample.is_over:
            self.finish = "stop" if self.sample.ended else "length"
        self.text += shown
        return shown


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
    ):
        """`limit` is the most tokens of an answer. A job that `streams` tells each piece, others whole answers."""
        prompt: Tensor = torch.tensor(prompt_ids, dtype=torch.int64)
        samples = [OwnSample(index, prompt, limit, settings=settings, key=key) for index in range(choices)]
        self.choices = [Choice(sample, decode, stops) for sample in samples]
        self.streams = streams
        self.events: asyncio.Queue[Event] = asyncio.Queue()

    def grow(self, choice: Choice) -> Piece | None:
        """After a token of a choice: what there is to tell."""
        text = choice.grow()
        if not self.streams:
            text = choice.text if choice.finish is not None else ""
        return Piece(choice.sample.index, text, choice.finish) if text or choice.finish is not None else None

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
