"""How long responses have been: what is still to come of one, and which prompts are answered at length."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

KEPT = 1024
"""Newest lengths that make the histogram."""


class LengthStatistics:
    """Running statistics over response lengths, the same on every rank."""

    def __init__(self, longest: int):
        """`longest` is the limit of a response."""
        self.longest = longest
        self.recent: list[int] = []
        self.by_prompt: dict[int, int] = {}
        self._sorted: list[int] = []
        self._sums: list[int] = []

    def add(self, lengths: Mapping[int, Sequence[int]]) -> None:
        """Of one iteration: place of the prompt in its data set -> lengths of its responses."""
        for prompt, found in lengths.items():
            self.recent += found
            self.by_prompt[prompt] = round(sum(found) / len(found))
        self.recent = self.recent[-KEPT:]
        self._sort()

    def _sort(self) -> None:
        self._sorted = sorted(self.recent)
        self._sums = [0]
        for length in reversed(self._sorted):
            self._sums.append(self._sums[-1] + length)

    @property
    def mean(self) -> float:
        return self._sums[-1] / len(self._sorted) if self._sorted else self.longest / 2

    def expected(self, prompt: int) -> float:
        """Length of the next response to a prompt: as the last ones to it, else as all."""
        return self.by_prompt.get(prompt, self.mean)

    def remaining(self, tokens: int) -> float:
        """Tokens still to come of a response that has `tokens` and has not ended: the mean over all longer ones."""
        longer = len(self._sorted) - bisect_right(self._sorted, tokens)
        if longer == 0:
            return max(1.0, (self.longest - tokens) / 2)
        return self._sums[longer] / longer - tokens

    def as_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"recent": self.recent, "by_prompt": sorted(self.by_prompt.items())}

    def restore(self, values: dict[str, Any]) -> None:
        self.recent = list(values["recent"])
        self.by_prompt = dict(values["by_prompt"])
        self._sort()


def deal(expected: Sequence[float], instances: int) -> list[list[int]]:
    """Places 0 .. n-1 for each instance: longest first, each to the instance with the least work by then (then the
    fewest samples)."""
    shares: list[list[int]] = [[] for _ in range(instances)]
    load = [(0.0, 0)] * instances
    for place in sorted(range(len(expected)), key=lambda place: (-expected[place], place)):
        instance = min(range(instances), key=lambda i: (load[i], i))
        shares[instance].append(place)
        load[instance] = (load[instance][0] + expected[place], load[instance][1] + 1)
    return shares
