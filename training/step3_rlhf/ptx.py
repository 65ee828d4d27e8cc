"""PPO-ptx (Ouyang et al. 2022, arXiv 2203.02155, equation 2): demonstrations beside the samples of each mini-batch."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.chat_format import ChatFormat
from training.data.batching import MicroBatch, TokenBatch
from training.data.demonstrations import demonstrations
from training.stage import Stage

Encoded = tuple[Tensor, Tensor]  # prompt ids, response ids: int64 (length) each


@dataclass(frozen=True)
class Drawn:
    """The demonstrations of one optimiser step, over all ranks."""

    rows: list[Encoded]

    @property
    def lengths(self) -> list[int]:
        return [len(prompt) + len(response) for prompt, response in self.rows]

    @property
    def tokens(self) -> int:
        """Of all responses."""
        return sum(len(response) for _, response in self.rows)

    def batch(self, micro_batch: MicroBatch, device: torch.device) -> TokenBatch:
        return TokenBatch.of([self.rows[row] for row in micro_batch.rows], device)


class Demonstrations:
    """Rows in epochs, each shuffled by (seed, epoch): which ones an optimiser step sees depends on its number alone."""

    def __init__(self, stage: Stage, chat_format: ChatFormat):
        data = stage.config.data
        self.seed = stage.config.seed
        self.rows: list[Encoded] = [
            (
                torch.tensor(chat_format.prompt_ids(row["prompt"], data.max_prompt_tokens)),
                torch.tensor(chat_format.response_ids(row["response"], data.max_response_tokens)),
            )
            for row in demonstrations(stage.config, stage.run.data, chat_format)
        ]
        self.order: tuple[int, list[int]] = -1, []
        """Epoch, and its order."""

    def draw(self, update: int, count: int) -> Drawn:
        """The `count` rows of optimiser step `update`, counted from 0."""
        drawn = []
        for place in range(update * count, (update + 1) * count):
            epoch, seat = divmod(place, len(self.rows))
            if self.order[0] != epoch:
                order = list(range(len(self.rows)))
                random.Random(f"{self.seed}/demonstrations/{epoch}").shuffle(order)
                self.order = epoch, order
            drawn.append(self.rows[self.order[1][seat]])
        return Drawn(drawn)
