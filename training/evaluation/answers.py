"""One model's answers to the prompts, readable by models with other tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inference.chat_format import ChatFormat
from inference.chat_template import Message, same_rendering
from inference.generation.sample import Sample
from training.config import DataSettings

Row = tuple[Tensor, Tensor]  # prompt ids, response ids: int64 (length) each


@dataclass
class Answers:
    """In the order of the prompts, in the tokens of `chat_format`."""

    chat_format: ChatFormat
    prompts: list[list[Message]]
    samples: list[Sample]
    texts: list[str]

    def first(self, count: int) -> "Answers":
        return Answers(self.chat_format, self.prompts[:count], self.samples[:count], self.texts[:count])

    def rows(self, reader: ChatFormat, data: DataSettings, to_score: bool = False) -> list[Row]:
        """As `reader` has them: the same tokens, or the text anew; no end token where the answer did not end.

        A reward model reads an answer `to_score` with the end that it was taught, whatever token ended it.
        """
        if same_tokens(reader, self.chat_format):
            as_read = self.chat_format.as_taught if to_score else list
            return [(sample.prompt_ids, torch.tensor(as_read(sample.response_ids))) for sample in self.samples]
        rows = []
        for prompt, text, sample in zip(self.prompts, self.texts, self.samples, strict=True):
            prompt_ids, response_ids = reader.prompt_ids(prompt, data.max_prompt_tokens), reader.response_ids(text)
            if not sample.ended and len(response_ids) > 1:
                response_ids.pop()
            rows.append((torch.tensor(prompt_ids), torch.tensor(response_ids)))
        return rows


def same_tokens(a: ChatFormat, b: ChatFormat) -> bool:
    """Whether both make the same tokens of every conversation."""
    ours, theirs = a.tokenizer, b.tokenizer
    return (
        a.end_of_turn_id == b.end_of_turn_id
        and ours.get_vocab() == theirs.get_vocab()
        and (ours.chat_template == theirs.chat_template or same_rendering(a, b))
    )


def encode(chat_format: ChatFormat, prompt: Sequence[Message], response: str, data: DataSettings) -> Row:
    """A reply from the data, within the limits that training has too."""
    prompt_ids = chat_format.prompt_ids(list(prompt), data.max_prompt_tokens)
    return torch.tensor(prompt_ids), torch.tensor(chat_format.response_ids(response, data.max_response_tokens))
