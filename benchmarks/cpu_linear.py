"""Linear layers on this CPU: F.linear against weights in oneDNN's blocked order, by rows.

    python -m benchmarks.cpu_linear --width 512

Twelve sets of weights take turns, as the layers of a model do, so that none stays in the cache.
"""

import argparse
import itertools
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from inference.generation.cpu_weights import blocked_product

SETS = 12


def microseconds(calls: list[Callable[[Tensor], Tensor]], inputs: Tensor, repeats: int = 120) -> float:
    """Median time of a call."""
    turns = itertools.cycle(calls)
    times = []
    for _ in range(repeats):
        call = next(turns)
        begun = time.perf_counter()
        call(inputs)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[SETS:]) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    width = arguments.width
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads, torch {torch.__version__}\n")
    print("| dtype | rows | inputs x outputs | F.linear, us | blocked, us | ratio | making the order, us |")
    print("|---|---|---|---|---|---|---|")
    with torch.inference_mode():
        for dtype, rows, (inputs, outputs) in itertools.product(
            (torch.float32, torch.bfloat16), (1, 8, 32, 512), ((width, width), (width, 4 * width), (4 * width, width))
        ):
            weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(SETS)]
            bias, x = torch.randn(outputs).to(dtype), torch.randn(rows, inputs).to(dtype)
            begun = time.perf_counter()
            blocked = [blocked_product(weight, bias) for weight in weights]
            order = (time.perf_counter() - begun) / SETS * 1e6
            plain = microseconds([partial(linear, weight=weight, bias=bias) for weight in weights], x)
            ours = microseconds(blocked, x)
            row = f"| {str(dtype).removeprefix('torch.')} | {rows} | {inputs} x {outputs} "
            print(row + f"| {plain:.0f} | {ours:.0f} | {plain / ours:.1f} | {order:.0f} |")


if __name__ == "__main__":
    main()
