"""What generation takes and gives."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn. temperature 0 is greedy; top_p 1 and top_k 0 are off."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_tokens: int = 0
    """No token that ends a sample is drawn before this many."""


@dataclass(frozen=True)
class SamplingKey:
    """What, with a sample's index and a token's position, decides every random number."""

    seed: int
    iteration: int = 0


@dataclass
class Sample:
    """One prompt with one response."""

    index: int
    prompt_ids: Tensor  # (prompt) int64
    limit: int
    """Most tokens of the response."""
    response_ids: list[int] = field(default_factory=list)
    """With the token that ended it, if it ended."""
    logprobs: list[float] = field(default_factory=list)
    """log p of each response token under the distribution that it was drawn from, temperature included."""
    ended: bool = False
    """Whether a token was drawn that ends it."""

    @property
    def is_over(self) -> bool:
        return self.ended or len(self.response_ids) >= self.limit

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def cached_ids(self) -> Tensor:
        """The tokens whose keys and values decoding needs: all but the newest of the response; int64."""
        return torch.cat([self.prompt_ids, torch.tensor(self.response_ids[:-1], dtype=torch.int64)])
