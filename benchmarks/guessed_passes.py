"""What a pass costs that checks guesses: the newest token of each row and some behind it, against a decode step."""

import itertools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from applications.preset_store import settings_for_model
from benchmarks.generation_scaling import DTYPES, load
from benchmarks.generation_scaling import SMOLLM as INSTRUCT
from benchmarks.work import END_ID
from inference.chat_format import ChatFormat
from inference.generation.attention import NextTokens, packed
from inference.generation.cpu import BlockedWeights, Exactness, plain_attention
from inference.generation.engine import GenerationEngine
from inference.generation.kv_cache import CachePositions, KVCache
from inference.generation.passes import PackedPasses, packed_logits, preferred_cache_dtype
from inference.generation.sampler import SamplingKey, SamplingSettings, sample_tokens
from inference.model_store import resolve_model
from training.data.chitchat import load_dialogues, prompts_for
from training.data.rows import read_rows
from training.run_directory import write_json

GUESSES = (1, 2, 4, 8)
PROMPTS, GROUP, ITERATIONS, LIMIT, TEMPERATURES = 8, 8, 2, 128, (1.0, 0.8, 0.3)
HELD_OUT, RUN_LIMIT, RUN_TEMPERATURE = 64, 32, 0.8
"""Prompts of a run, and how it answers them."""
SLOTS = 32
ROWS = (1, 2, 4, 8, 16, 32)
CONTEXT = 160
"""Tokens of the longest row; each other one is three shorter than the one before."""
EXACT = {torch.bfloat16: Exactness(keys=32), torch.float32: None}
"""What a run takes where a processor multiplies bf16."""


class Guessed(NextTokens):
    """Several tokens of each of the first rows of a cache; each token sees its row up to itself, without a window."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None,
        window: int | None,
        dropout: float = 0.0,
    ) -> Tensor:
        rows, start = self.positions.rows, self.positions.next
        width = query.shape[1] // rows
        q, k, v = (t.unflatten(1, (rows, width)).transpose(0, 1) for t in (query, key, value))  # (rows, heads, ...)
        at = start[:, None] + torch.arange(width)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        for cached, new in ((keys, k), (values, v)):
            cached[self.positions.index[:, None], :, at] = new.transpose(1, 2).to(cached.dtype)
        keys, values = (cached[:rows, :, : self.positions.longest] for cached in (keys, values))
        queries = q.unflatten(1, (keys.shape[1], -1)).flatten(2, 3).to(keys.dtype)
        mask = self.mask_of(at, q.shape[1] // keys.shape[1], keys.dtype)
        if self.exact is None:
            seen = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
        else:
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            seen = plain_attention(queries * scale, keys, values, mask, self.exact)
        seen = seen.unflatten(2, (-1, width)).permute(0, 3, 1, 2, 4)  # (rows, width, key heads, sharing, head)
        return seen.flatten(0, 1).flatten(1, 2).to(query.dtype)

    def mask_of(self, at: Tensor, sharing: int, dtype: torch.dtype) -> Tensor:
        """(rows, width) -> (rows, 1, sharing * width, longest), the same for all layers."""
        if not hasattr(self, "_mask"):
            hidden = torch.arange(self.positions.longest) > at[:, :, None]
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
            self._mask = mask.repeat(1, sharing, 1)[:, None]
        return self._mask


def logits_of(passes: PackedPasses, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """Append `tokens`, int64 (rows, width), to rows that are `lengths` long; logits (rows * width, vocabulary)."""
    width = tokens.shape[1]
    positions, longest = torch.tensor(lengths), max(lengths) + width
    longest = longest if passes.exact is None else passes.exact.seen(longest)
    guessed = Guessed(passes.cache, CachePositions(positions, longest, is_level=False), passes.exact)
    at = (positions[:, None] + torch.arange(width)).flatten()
    with packed(passes.model):
        return packed_logits(
            passes.model, tokens.flatten()[None], at[None], guessed, torch.arange(len(at)), passes.exact
        )


def passes_over(model: Any, lengths: Sequence[int], exact: Exactness | None) -> PackedPasses:
    """With random tokens in a cache that has room for guesses."""
    room = max(lengths) + max(GUESSES) + 1
    room = room if exact is None else exact.seen(room)
    cache = KVCache(len(lengths), room, preferred_cache_dtype(model, exact), exact)
    passes = PackedPasses(model, cache, exact)
    passes.prefill([torch.randint(5, 8000, (room,))], [0])  # a layer's part is as long as its longest row
    passes.prefill([torch.randint(5, 8000, (length,)) for length in lengths], range(len(lengths)))
    return passes


def measure_costs(file: Path, models: Sequence[str], dtypes: Sequence[str], repeats: int) -> None:
    """Seconds of a pass with its draws, medians, all sizes in turn; models that are in the file stay as they are."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name, dtype in itertools.product(models, dtypes):
        if f"{name} {dtype}" in found:
            continue
        model = load(name, DTYPES[dtype])
        calls, times = {}, defaultdict(list)
        with torch.inference_mode(), BlockedWeights(model).in_use():
            for rows in ROWS:
                lengths = [CONTEXT - 3 * row for row in range(rows)]
                passes = passes_over(model, lengths, EXACT[DTYPES[dtype]])
                calls |= {(rows, guesses): drawing_pass(passes, lengths, guesses) for guesses in (0, *GUESSES)}
            for _, (size, call) in itertools.product(range(repeats + 1), calls.items()):
                begun = time.perf_counter()
                call()
                times[size].append(time.perf_counter() - begun)
        found[f"{name} {dtype}"] = [
            {"rows": rows, "guesses": guesses, "seconds": statistics.median(seconds[1:])}
            for (rows, guesses), seconds in times.items()
        ]
        write_json(file, found)


def drawing_pass(passes: PackedPasses, lengths: Sequence[int], guesses: int) -> Callable[[], None]:
    tokens = torch.randint(5, 8000, (len(lengths), 1 + guesses))
    names = torch.arange(tokens.numel())

    def call() -> None:
        logits = logits_of(passes, tokens, lengths) if guesses else passes.decode(tokens[:, 0], lengths)
        for drawn in sample_tokens(logits, SamplingSettings(1), SamplingKey(0), names, names, (END_ID,)):
            drawn.tolist()

    return call


def draw_answers(file: Path, policies: Sequence[str], prompts: Path | None) -> None:
    """Writes all sets of answers so far; those that are there are not drawn again."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    known = {(each["policy"], each["temperature"], each["iteration"]) for each in found}
    wanted = [(INSTRUCT, temperature, i) for i in range(ITERATIONS) for temperature in TEMPERATURES]
    wanted += [(policy, RUN_TEMPERATURE, 0) for policy in policies]
    for policy, sets in itertools.groupby((each for each in wanted if each not in known), key=lambda each: each[0]):
        directory = resolve_model(settings_for_model(policy)["model"], print)
        chat_format = ChatFormat.load(directory)
        if policy == INSTRUCT:
            messages = [next(prompts_for(dialogue, 1)) for dialogue in load_dialogues()[:PROMPTS]]
        else:
            messages = [row["prompt"] for row in read_rows(prompts, HELD_OUT)]
        each, limit = (GROUP, LIMIT) if policy == INSTRUCT else (1, RUN_LIMIT)
        rows = [torch.tensor(chat_format.prompt_ids(prompt)) for prompt in messages for _ in range(each)]
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
        engine = GenerationEngine(model, chat_format.end_ids, chat_format.pad_id, SLOTS)
        for _, temperature, iteration in sets:
            drawing, key = SamplingSettings(limit, temperature), SamplingKey(0, iteration)
            samples = sorted(engine.generate(rows, drawing, key), key=lambda sample: sample.index)
            answers = [
                {
                    "group": sample.index // each,
                    "index": sample.index,
                    "iteration": iteration,
                    "prompt": sample.prompt_ids.tolist(),
                    "tokens": sample.response_ids,
                }
                for sample in samples
            ]
            found.append({"policy": policy, "temperature": temperature, "iteration": iteration, "answers": answers})
            write_json(file, found)
            print(policy, temperature, iteration, sum(len(answer["tokens"]) for answer in answers), flush=True)
