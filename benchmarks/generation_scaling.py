"""How the time and memory of generation grow: over samples and response length, for s, m and SmolLM2-135M.

    python -m benchmarks.generation_scaling --models s m --dtype bf16 --out scaling.json

Prompts of 64 tokens, every response exactly as long as the row says, as many slots as samples up to 64. Seconds are
medians over `--repeats` calls after a short one that warms up; key-value memory is what the cache has made.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from applications.preset_store import settings_for_model
from benchmarks import work
from benchmarks.ppo_iteration import machine
from benchmarks.work import SIZES
from inference.generation.engine import GenerationEngine
from inference.generation.sampler import SamplingKey, SamplingSettings
from inference.model_store import resolve_model
from training.run_directory import versions, write_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SMOLLM = "smollm2-135m"
MOST_SLOTS = 64
WARM_UP_TOKENS = 8


def load(name: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    directory = work.models(name).actor if name in SIZES else resolve_model(settings_for_model(name)["model"], print)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def measure(model: Any, samples: int, length: int, repeats: int) -> dict[str, float]:
    """Seconds, tokens a second and bytes of keys and values for `samples` responses of `length` tokens."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(5, 8000, (work.PROMPT_TOKENS,), generator=generator) for _ in range(samples)]
    engine = GenerationEngine(model, work.END_ID, work.PAD_ID, min(samples, MOST_SLOTS))
    times = []
    for iteration in range(repeats + 1):
        wanted = length if iteration else min(length, WARM_UP_TOKENS)
        begun = time.perf_counter()
        drawn = engine.generate(
            prompts, SamplingSettings(length), SamplingKey(1, iteration), lengths=[wanted] * samples
        )
        tokens = sum(len(sample.response_ids) for sample in drawn)
        times.append(time.perf_counter() - begun)
        assert tokens == samples * wanted
    seconds = statistics.median(times[1:])
    return {"seconds": seconds, "tokens_per_second": tokens / seconds, "cache_mb": engine.cache.bytes / 1e6}


def sweep(arguments: argparse.Namespace) -> None:
    """Prints each row when it is measured, and writes all so far."""
    rows: list[dict[str, Any]] = []
    for name, dtype in itertools.product(arguments.models, arguments.dtype):
        model = load(name, DTYPES[dtype])
        for samples, length in itertools.product(arguments.samples, arguments.lengths):
            rows.append(
                {"model": name, "dtype": dtype, "samples": samples, "length": length}
                | measure(model, samples, length, arguments.repeats)
            )
            print(row_of(rows[-1]), flush=True)
            if arguments.out:
                found = {"machine": machine(), "threads": arguments.threads, "versions": versions(), "rows": rows}
                write_json(arguments.out, found)


def row_of(row: dict[str, Any]) -> str:
    return (
        f"| {row['model']} | {row['dtype']} | {row['samples']} | {row['length']} | {row['seconds']:.2f} "
        f"| {row['tokens_per_second']:,.0f} | {row['cache_mb']:,.0f} |"
    )


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*SIZES, SMOLLM], choices=[*SIZES, SMOLLM])
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=list(DTYPES))
    parser.add_argument("--samples", nargs="+", type=int, default=[8, 32, 64, 256])
    parser.add_argument("--lengths", nargs="+", type=int, default=[32, 128, 512])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(given)
    torch.set_num_threads(arguments.threads)
    print("| model | dtype | samples | response tokens | seconds | tokens a second | keys and values, MB |")
    print("|---|---|---|---|---|---|---|")
    sweep(arguments)


if __name__ == "__main__":
    main()
