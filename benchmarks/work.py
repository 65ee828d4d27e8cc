"""The work that ours, the floor and TRL all do: models with random weights, prompts of 64 tokens, forced lengths.

One PPO iteration: 32 prompts, one PPO epoch, mini-batches of 8 samples, so four optimiser steps of actor and critic,
temperature 1, no top-k. The end token is forbidden before a sample's length and forced at it, so that everybody
generates, scores and trains the same number of tokens. Actor and reference are one checkpoint, critic and reward
model another of the same shape. Estimators without a critic draw 8 samples for each of 4 prompts, and a pattern rewards
them. Supervised steps take 32 rows of 16 to 512 tokens, or as many answers in pairs.
"""

import math
import random
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import OPTConfig

from inference.model_store import cache_directory

VOCABULARY_SIZE = 8192
MAX_POSITIONS = 1024
BEGIN_ID, PAD_ID, END_ID, UNKNOWN_ID = 0, 1, 2, 3
FIRST_PLAIN_ID = 5  # prompts are drawn from here on
SAMPLES = 32
PROMPT_TOKENS = 64
GROUP = 8
"""Samples of a prompt where they are compared with each other."""
MINI_BATCHES = 4
KL = 0.05
"""Coefficient of the penalty."""
REWARD = "regex:[02468]$"
"""Rewards answers whose last word ends in an even digit."""
LEARNING_RATE = 1e-6
SEED = 0
CACHE_NAME = "benchmark-1"  # the number goes up when `build_models` changes what it builds


@dataclass(frozen=True)
class Size:
    """Shape of all four models."""

    hidden: int
    layers: int
    heads: int
    ffn: int

    def config(self) -> "OPTConfig":
        from transformers import OPTConfig

        return OPTConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=self.hidden,
            word_embed_proj_dim=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            ffn_dim=self.ffn,
            max_position_embeddings=MAX_POSITIONS,
            dropout=0.0,
            attention_dropout=0.0,
            layerdrop=0.0,
            pad_token_id=PAD_ID,
            bos_token_id=BEGIN_ID,
            eos_token_id=END_ID,
            dtype="float32",
        )


@dataclass(frozen=True)
class Lengths:
    """How long the responses of an iteration are, end token included."""

    longest: int
    spread: float
    """Sigma of the lognormal with median 32 whose quantiles the lengths are; 0 makes all of them the longest."""

    def of(self, iteration: int) -> list[int]:
        """One length a sample: the same ones every iteration, in an order of their own."""
        if self.spread == 0:
            return [self.longest] * SAMPLES
        normal = statistics.NormalDist(math.log(32), self.spread)
        quantiles = [math.exp(normal.inv_cdf((place + 0.5) / SAMPLES)) for place in range(SAMPLES)]
        lengths = [max(2, min(self.longest, round(quantile))) for quantile in quantiles]
        random.Random(1000 + iteration).shuffle(lengths)
        return lengths

    @property
    def tokens(self) -> int:
        """Response tokens of an iteration."""
        return sum(self.of(0))


SIZES = {"s": Size(256, 4, 8, 1024), "m": Size(512, 8, 8, 2048)}
LENGTHS = {"skew": Lengths(128, 0.8), "fixed": Lengths(128, 0.0), "tail512": Lengths(512, 1.2)}


@dataclass(frozen=True)
class Models:
    """Two plain Hugging Face directories."""

    actor: Path
    reward: Path


def models(size: str, cache: Path | None = None) -> Models:
    """The models of a size, built in the cache (by default that of the project) if they are not there."""
    directory = (cache or cache_directory()) / f"{CACHE_NAME}-{size}"
    if not directory.is_dir():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{directory.name}.part-", dir=directory.parent) as part:
            whole = Path(part) / "models"
            build_models(whole, SIZES[size])
            whole.rename(directory)
    return Models(directory / "actor", directory / "reward")


def build_models(directory: Path, size: Size) -> None:
    """Write `actor` and `reward` with random float32 weights and a tokenizer; the same ones every time."""
    from transformers import OPTForCausalLM, OPTForSequenceClassification

    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        actor = OPTForCausalLM(size.config())
        config = size.config()
        config.num_labels = 1
        reward = OPTForSequenceClassification(config)
    for model, name in ((actor, "actor"), (reward, "reward")):
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)


def make_tokenizer():
    """One made-up word for each of the 8,192 ids. The work is in token ids; libraries want a tokenizer all the same."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"<s>": BEGIN_ID, "<pad>": PAD_ID, "</s>": END_ID, "<unk>": UNKNOWN_ID}
    words = special | {f"word{place}": place for place in range(len(special), VOCABULARY_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=MAX_POSITIONS,
    )


def prompts(iterations: int) -> Tensor:
    """Random prompts of that many iterations; int64 (iterations * SAMPLES, PROMPT_TOKENS)."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (iterations * SAMPLES, PROMPT_TOKENS)
    return torch.randint(FIRST_PLAIN_ID, VOCABULARY_SIZE, shape, generator=generator)


PACKS = 17
"""Sequences of 512 tokens that the rows fill best."""


def row_lengths() -> list[int]:
    """Tokens of each row of the supervised work, 16 to 512, in a fixed order."""
    lengths = list(range(16, 513, 16))
    random.Random(SEED).shuffle(lengths)
    return lengths


def demonstrations() -> list[tuple[Tensor, Tensor]]:
    """Prompt and response of each row, int64: a quarter and three quarters of it."""
    return [(row[: len(row) // 4], row[len(row) // 4 :]) for row in _random_rows()]


def pairs() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Prompt, chosen and rejected response, int64. A prompt has a quarter of the tokens of its shorter row."""
    made = []
    rows = _random_rows()
    for chosen, rejected in zip(rows[::2], rows[1::2], strict=True):
        prompt = chosen[: min(len(chosen), len(rejected)) // 4]
        made.append((prompt, chosen[len(prompt) :], rejected[len(prompt) :]))
    return made


def _random_rows() -> list[Tensor]:
    """Each ends with the end token, and has no other."""
    generator = torch.Generator().manual_seed(SEED)
    rows = [torch.randint(FIRST_PLAIN_ID, VOCABULARY_SIZE, (length,), generator=generator) for length in row_lengths()]
    for row in rows:
        row[-1] = END_ID
    return rows
