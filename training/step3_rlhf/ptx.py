"""PPO-ptx (Ouyang et al. 2022, arXiv 2203.02155, equation 2): demonstrations beside the samples of each mini-batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from inference.chat_format import ChatFormat
from training.data.batching import MicroBatch, TokenBatch
from training.data.prepare import demonstrations
from training.data.rows import DEMONSTRATIONS_FILE, Epochs
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
    """Rows in epochs, each shuffled by (seed, epoch): no row comes again before all others have come."""

    def __init__(self, stage: Stage, chat_format: ChatFormat):
        data = stage.config.data
        stage.ranks.see(stage.run.data / DEMONSTRATIONS_FILE)
        self.rows: list[Encoded] = [
            (
                torch.tensor(chat_format.prompt_ids(row["prompt"], data.max_prompt_tokens)),
                torch.tensor(chat_format.response_ids(row["response"], data.max_response_tokens)),
            )
            for row in demonstrations(stage.config, stage.run.data, chat_format)
        ]
        self.order = Epochs(len(self.rows), f"{stage.seed}/demonstrations")

    def draw(self, first: int, count: int) -> Drawn:
        """`count` rows from place `first` on, counted from 0 through all epochs."""
        return Drawn([self.rows[row] for row in self.order.rows(first, count)])
