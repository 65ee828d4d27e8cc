"""Linear layers on this CPU: F.linear against weights in oneDNN's blocked order, by rows.

    python -m benchmarks.cpu_linear --width 512 [--adapter 16]

With `--adapter` LoRA layers of that rank instead: PEFT's own forward, whose three linear layers have blocked weights,
against three products, the last of which adds itself to the first. Twelve sets of weights take turns, as the layers of
a model do, so that none stays in the cache.
"""

import argparse
import itertools
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.functional import linear

from inference.generation.cpu import blocked_product, forwards_of

Call = Callable[[Tensor], Tensor]
Maker = Callable[[], Call]
SETS = 12


def microseconds(calls: list[Call], inputs: Tensor, repeats: int = 120) -> float:
    """Median time of a call."""
    turns = itertools.cycle(calls)
    times = []
    for _ in range(repeats):
        call = next(turns)
        begun = time.perf_counter()
        call(inputs)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[SETS:]) * 1e6


def plain_and_blocked(inputs: int, outputs: int, dtype: torch.dtype) -> tuple[list[Call], list[Maker]]:
    weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(SETS)]
    bias = torch.randn(outputs).to(dtype)
    plain: list[Call] = [partial(linear, weight=weight, bias=bias) for weight in weights]
    return plain, [partial(blocked_product, weight, bias) for weight in weights]


def peft_and_ours(inputs: int, outputs: int, dtype: torch.dtype, rank: int) -> tuple[list[Call], list[Maker]]:
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[str(place) for place in range(SETS)])
    layers = nn.Sequential(*(nn.Linear(inputs, outputs, bias=False) for _ in range(SETS))).to(dtype)
    adapted: list[Any] = list(inject_adapter_in_model(config, layers).to(dtype).eval())
    for layer in adapted:
        for part in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
            (part.forward,) = forwards_of([part])
    return adapted, [lambda layer=layer: forwards_of([layer])[0] for layer in adapted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--adapter", type=int, default=0, metavar="RANK")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    width, rank = arguments.width, arguments.adapter
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads, torch {torch.__version__}\n")
    compared = "PEFT, us | ours, us" if rank else "F.linear, us | blocked, us"
    print(f"| dtype | rows | inputs x outputs | {compared} | ratio | making the order, us |")
    print("|---|---|---|---|---|---|---|")
    with torch.inference_mode():
        for dtype, rows, (inputs, outputs) in itertools.product(
            (torch.float32, torch.bfloat16), (1, 8, 32, 512), ((width, width), (width, 4 * width), (4 * width, width))
        ):
            x = torch.randn(1, rows, inputs).to(dtype)
            shape = inputs, outputs, dtype
            calls, makers = peft_and_ours(*shape, rank) if rank else plain_and_blocked(*shape)
            begun = time.perf_counter()
            made = [make() for make in makers]
            order = (time.perf_counter() - begun) / SETS * 1e6
            theirs, ours = microseconds(calls, x), microseconds(made, x)
            row = f"| {str(dtype).removeprefix('torch.')} | {rows} | {inputs} x {outputs} "
            print(row + f"| {theirs:.0f} | {ours:.0f} | {theirs / ours:.1f} | {order:.0f} |")


if __name__ == "__main__":
    main()
