"""A model one can talk to: messages in, pieces of text out as tokens are drawn."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from inference.chat_format import ChatFormat, Prompt
from inference.chat_target import refuse_reward_model
from inference.chat_template import Message
from inference.errors import UserError
from inference.families import longest_text
from inference.generation.engine import GenerationEngine
from inference.generation.sampler import SamplingKey, SamplingSettings
from inference.weights import read_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


BROKEN = "\ufffd"
"""What a decoder writes for bytes that are not, or not yet, a character."""
WINDOW = 64
"""Tokens that are decoded again for each new one, at most, as long as they decode to whole characters."""
OVERLAP = 8
"""Tokens that the next window begins with: some decoders treat the first token of a text differently."""


class TextPieces:
    """The pieces joined are the decoded whole. Only a window of the newest tokens is decoded for each piece."""

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._start = 0  # the window's first token
        self._taken = 0  # characters of the window's text

    def take(self, ids: Sequence[int], is_whole: bool = False) -> str:
        """The text that `ids`, all so far, add to the pieces before; `is_whole` says that nothing follows."""
        text = self._decode(list(ids[self._start :]))
        safe = text if is_whole else text.rstrip(BROKEN)  # what follows may be the first bytes of a character
        piece = safe[self._taken :]
        self._taken = max(self._taken, len(safe))
        if len(safe) == len(text) and len(ids) - self._start >= WINDOW:
            overlap = self._decode(list(ids[-OVERLAP:]))
            if overlap and text.endswith(overlap):  # else a new window would begin inside a character
                self._start, self._taken = len(ids) - OVERLAP, len(overlap)
        return piece


def whole_text(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text of all tokens, special ones too."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def pieces_of(ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The text of each token; joined, they are the text of all. A character that takes several tokens stands at the
    last of them."""
    from tokenizers.decoders import DecodeStream

    text, pieces = whole_text(ids, tokenizer), list[str]()
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        stream = DecodeStream(skip_special_tokens=False)
        try:
            pieces = [stream.step(backend, token) or "" for token in ids]
        except Exception:  # it refuses what is no text
            pieces = []
    if not pieces or not text.startswith("".join(pieces)):
        growing = TextPieces(lambda some: whole_text(some, tokenizer))
        pieces = [growing.take(ids[: index + 1]) for index in range(len(ids))]
    return [*pieces[:-1], text[len("".join(pieces[:-1])) :]] if pieces else []


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGE_BYTES = 6 * 2**30
"""Weights beyond this stay in bf16 on a CPU: slower there, but half the memory."""


class ChatModel:
    """A causal language model in evaluation mode with its chat format."""

    def __init__(self, model: PreTrainedModel, chat_format: ChatFormat):
        self.model = model.eval()
        self.format = chat_format
        self.engine = GenerationEngine(model, chat_format.end_ids, self.pad_id)
        self.engine.prepare()  # while somebody thinks of a question

    @classmethod
    def load(cls, directory: Path, dtype: str = "auto") -> "ChatModel":
        """Read a Hugging Face model directory; on the GPU if there is one.

        `dtype` is fp32, bf16, fp16 or auto: bf16 on a GPU, and fp32 on a CPU unless the weights are large.
        Raises UserError where the directory is not a complete, undamaged model.
        """
        if not (directory / "config.json").is_file():
            raise UserError(f"{directory} is not a model: it has no config.json; give a Hugging Face model directory.")
        refuse_reward_model(directory)
        chat_format = ChatFormat.load(directory, day=None)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with no_init_weights():  # all are read
            model, _ = read_weights(AutoModelForCausalLM, directory, dtype=choose_dtype(directory, dtype, device))
        if max(chat_format.end_ids) >= model.get_input_embeddings().num_embeddings:
            raise UserError(f"The tokenizer in {directory} has more tokens than the model; put the model's own there.")
        return cls(cast(Any, model).to(device), chat_format)

    @property
    def pad_id(self) -> int:
        """A token that the model has: one that was added for padding waits for training to give it a row."""
        rows: int = self.model.get_input_embeddings().num_embeddings
        return self.format.pad_id if self.format.pad_id < rows else self.format.end_of_turn_id

    @property
    def context_length(self) -> int:
        """Most tokens that prompt and answer may have together; 0 means no limit is known."""
        return longest_text(self.model.config)

    @property
    def description(self) -> str:
        parameters = self.model.num_parameters() / 1e6
        return f"{parameters:,.1f} M parameters, {str(self.model.dtype).removeprefix('torch.')}, {self.model.device}"

    def reply(self, messages: list[Message], settings: SamplingSettings, seed: int, turn: int) -> Iterator[str]:
        """Yield the answer in pieces that hold whole characters; joined, they are the decoded answer.

        `seed` and `turn` decide the draws. Where the model's context is too short, the oldest turns are dropped, see
        `prompt`. Raises UserError where the chat template refuses the messages.
        """
        prompt = torch.tensor(self.prompt(messages, settings).ids)
        settings = replace(settings, max_tokens=self._longest_answer(settings.max_tokens))
        pieces, drawn = TextPieces(self.format.decode), list[int]()
        for sample in self.engine.stream(prompt, settings, SamplingKey(seed, turn)):
            drawn = sample.response_ids
            if piece := pieces.take(drawn):
                yield piece
        if rest := pieces.take(drawn, is_whole=True):
            yield rest

    def prompt(self, messages: list[Message], settings: SamplingSettings) -> Prompt:
        """The prompt of as many messages as the context has room for beside an answer."""
        limit = self.context_length - self._longest_answer(settings.max_tokens) if self.context_length else 0
        return self.format.prompt(messages, limit)

    def _longest_answer(self, wanted: int) -> int:
        return longest_answer(wanted, self.context_length) if self.context_length else wanted


def longest_answer(wanted: int, context: int) -> int:
    """An answer takes at most half of the context, so that its prompt has room; tokens."""
    return min(wanted, max(1, context // 2))


def choose_dtype(directory: Path, dtype: str, device: str) -> torch.dtype:
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype != "auto":
        raise UserError(f"There is no dtype '{dtype}'; use auto, {', '.join(DTYPES)}.")
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    size = sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in directory.glob(pattern))
    return torch.bfloat16 if size > LARGE_BYTES else torch.float32
