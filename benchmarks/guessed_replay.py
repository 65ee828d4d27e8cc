"""Answers that were drawn, drawn again with guesses: their draws are the same, so what a pass keeps can be counted."""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from inference.generation.sampler import SamplingKey, uniform

AHEAD = 16
"""Guesses in one pass, at most."""
LONGEST = 4
"""Tokens of the contexts whose continuations are kept."""


@dataclass(frozen=True)
class Answer:
    """One that was drawn, to be replayed."""

    group: int
    """The prompt's number."""
    index: int
    iteration: int
    prompt: list[int]
    tokens: list[int]

    @cached_property
    def drawn(self) -> list[float]:
        """The random number of each token, and of those that could have followed."""
        places = torch.arange(len(self.tokens) + AHEAD)
        return uniform(SamplingKey(0, self.iteration), torch.full_like(places, self.index), places).tolist()


class NGrams:
    """What followed the last tokens before; the longest context that is known decides."""

    def __init__(self) -> None:
        self.followed: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)

    def learn(self, tokens: Sequence[int], start: int) -> None:
        """The tokens from `start` on, each with what comes before it."""
        for place in range(max(1, start), len(tokens)):
            for count in range(1, min(LONGEST, place) + 1):
                self.followed[tuple(tokens[place - count : place])][tokens[place]] += 1

    def next(self, tokens: Sequence[int], drawn: float) -> int | None:
        """The token that the sampler would draw were probabilities the shares of what followed; None where nothing is
        known."""
        for count in range(min(LONGEST, len(tokens)), 0, -1):
            if found := self.followed.get(tuple(tokens[len(tokens) - count :])):
                threshold = drawn * found.total()
                for token in sorted(found):
                    threshold -= found[token]
                    if threshold < 0:
                        return token
        return None


class Guesser(Protocol):
    def learn(self, answer: Answer, start: int, end: int) -> None:
        """Tokens `start` to `end` of an answer are drawn."""

    def guess(self, answer: Answer, known: int, count: int) -> list[int]:
        """The tokens behind the first `known`, at most `count`."""
        ...


class FromNGrams:
    def __init__(self, pool: Callable[[Answer], Hashable], prompts: bool = False, before: Iterable[Answer] = ()):
        """Answers of one `pool` learn from each other, and from those `before`; with `prompts` from theirs too."""
        self.pool, self.prompts = pool, prompts
        self.pools: defaultdict[Hashable, NGrams] = defaultdict(NGrams)
        for answer in before:
            self.learn(answer, 0, len(answer.tokens))

    def learn(self, answer: Answer, start: int, end: int) -> None:
        begun = 0 if self.prompts and start == 0 else len(answer.prompt) + start
        self.pools[self.pool(answer)].learn(answer.prompt + answer.tokens[:end], begun)

    def guess(self, answer: Answer, known: int, count: int) -> list[int]:
        known_tokens = (answer.prompt + answer.tokens[:known])[-LONGEST:]
        ngrams, guesses = self.pools[self.pool(answer)], list[int]()
        for drawn in answer.drawn[known : known + count]:
            token = ngrams.next((known_tokens + guesses)[-LONGEST:], drawn)
            if token is None:
                break
            guesses.append(token)
        return guesses


class FromSameDraws:
    """The answers of an earlier policy to the same prompts with the same random numbers, place by place."""

    def __init__(self, before: Iterable[Answer]):
        self.before = {answer.index: answer.tokens for answer in before}

    def learn(self, answer: Answer, start: int, end: int) -> None:
        """Nothing: an answer is drawn once."""

    def guess(self, answer: Answer, known: int, count: int) -> list[int]:
        return self.before[answer.index][known : known + count]


@dataclass(frozen=True)
class Pass:
    rows: int
    computed: int
    """Tokens: the newest of each row, and guesses."""
    kept: int
    """Tokens that rows grew by."""


def replay(answers: Sequence[Answer], guesser: Guesser, slots: int, guesses: Callable[[int], int]) -> list[Pass]:
    """The passes in which the answers would have been drawn; `guesses` are those of a row, for so many rows."""
    waiting, running, known = deque(answers), list[Answer](), dict[int, int]()
    passes = []
    while True:
        running = [answer for answer in running if known[id(answer)] < len(answer.tokens)]
        while waiting and len(running) < slots:  # the first token comes with the prefill
            answer = waiting.popleft()
            known[id(answer)] = 1
            guesser.learn(answer, 0, 1)
            if len(answer.tokens) > 1:
                running.append(answer)
        if not running:
            return passes
        guessed = [guesser.guess(answer, known[id(answer)], guesses(len(running))) for answer in running]
        kept = 0
        for answer, tokens in zip(running, guessed, strict=True):
            start = known[id(answer)]
            end = min(start + agreeing(tokens, answer.tokens[start:]) + 1, len(answer.tokens))
            guesser.learn(answer, start, end)
            known[id(answer)], kept = end, kept + end - start
        passes.append(Pass(len(running), len(running) + sum(map(len, guessed)), kept))


def agreeing(guesses: Sequence[int], tokens: Sequence[int]) -> int:
    """Guesses before the first one that is wrong."""
    pairs = enumerate(zip(guesses, tokens, strict=False))
    return next((place for place, (guess, token) in pairs if guess != token), min(len(guesses), len(tokens)))
