"""A role's weights from any layout on four ranks into any other: seconds, bytes sent beside those that the planner
counts, and the peak of the extra memory.

    python -m benchmarks.layout_pairs --out benchmarks/results/layout_pairs.json

Processes of one thread each. Of each pair the first move is compared bitwise with the whole weights, the second, after
its copy was released, measured for its memory (the first one makes the module, under ZeRO 3 of memory that nobody
touches), the others for their seconds. Ends with 1 where a bit differs, bytes differ from the planner's (with stages
by more than a thousandth: it counts the last norm among the layers), or a rank needs more than its part and two layers
and a half.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.ppo_iteration import machine
from training.hybrid_engine.layout import Layout
from training.run_directory import versions, write_json

RANKS, LAYERS_LIMIT, BYTES_LIMIT = 4, 2.5, 1e-3
ALL = tuple(range(RANKS))
HIDDEN, FFN, LAYERS, HEADS, VOCABULARY = 512, 1408, 8, 8, 8192
LAYOUTS = [
    Layout(ALL, data=4),
    Layout(ALL, data=4, zero_stage=3),
    Layout(ALL, data=2, tensor=2),
    Layout(ALL, tensor=4),
    Layout((0, 1), data=2),
    Layout((0, 1), data=2, zero_stage=3),
    Layout((0, 1), tensor=2),
    Layout((2, 3), data=2),
    Layout((2, 3), data=2, zero_stage=3),
    Layout((1, 2), tensor=2),
    Layout((3,)),
    Layout(ALL, data=2, pipeline=2),
    Layout((2, 3, 0, 1), data=2, pipeline=2, zero_stage=1, layers=(5, 3)),
    Layout(ALL, pipeline=4),
    Layout((3, 1, 0), pipeline=3),
    Layout((1, 2), pipeline=2, layers=(3, 5)),
]


def name_of(layout: Layout) -> str:
    degrees = [f"data {layout.data}"] * (layout.data > 1) + [f"tensor {layout.tensor}"] * (layout.tensor > 1)
    runs = f" ({' + '.join(map(str, layout.layers))})" if layout.layers else ""
    degrees += [f"pipeline {layout.pipeline}{runs}"] * (layout.pipeline > 1)
    zero = [f"ZeRO {layout.zero_stage}"] * (layout.zero_stage > 0)
    return f"{{{', '.join(map(str, layout.mesh))}}} {' '.join([*degrees, *zero]) or 'whole'}"


def run_rank(arguments: argparse.Namespace) -> None:
    """One rank; the first prints what all measured."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from training.deepspeed_config import deepspeed_config
    from training.distributed import start_ranks, stop_ranks
    from training.hybrid_engine.deepspeed_setup import divide
    from training.hybrid_engine.reallocation import Reallocation, on_rank, tensor_parallel_of, weights_of
    from training.role_settings import OptimizerSettings

    ranks = start_ranks(1)
    config = deepspeed_config(OptimizerSettings(zero_stage=3), torch.float32, trained=False)
    parts = {layout: tensor_parallel_of(layout) for layout in LAYOUTS}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape()))
    whole = dict(model.named_parameters())
    dividing: dict[Layout, Any] = {}
    for layout in LAYOUTS:
        group = ranks.part(layout.mesh) if layout.zero_stage == 3 else None
        if group is not None:

            def over(shard: Any, group: Any = group) -> None:
                with group.as_world():
                    divide(shard, config, torch.float32, group)

            dividing[layout] = over
    bytes_of: dict[str, int] = {}
    for weight in weights_of(model):
        size = whole[weight.name].numel() * weight.value_bytes
        bytes_of[weight.layer] = bytes_of.get(weight.layer, 0) + size
    rows = []
    for source in LAYOUTS:
        first = Reallocation(model, Layout((0,)), source, parts[source], ranks, divide=dividing.get(source))
        first.run()
        for target in LAYOUTS:
            if source == target:
                continue
            moving = Reallocation(model, source, target, parts[target], ranks, first, dividing.get(target))
            moving.run()
            held = moving.weights
            part = 0 if moving.stays else sum(on_rank(w).numel() * w.element_size() for w in held.values())
            equal = all(
                torch.equal(
                    on_rank(held[weight.name]).flatten(), expected(whole[weight.name], weight, target, ranks.rank)
                )
                if weight.is_on(target, ranks.rank)
                else weight.name not in held
                for weight in weights_of(model, (target,))
                if held
            )
            moving.release()
            peak, seconds = peak_of(moving.run), []
            for _ in range(arguments.repeats):
                ranks.barrier()
                moving.run()
                seconds.append(moving.moved.seconds)
            rows.append({**asdict(moving.moved), "seconds": seconds, "peak": peak, "part": part, "equal": equal})
    shares = ranks.gather({"rows": rows, "largest_layer": max(bytes_of.values())})
    if ranks.is_first:
        print("FOUND " + json.dumps(shares))
    ranks.barrier()
    stop_ranks()


def shape() -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "vocab_size": VOCABULARY,
        "model_type": "llama",
    }


def expected(whole: Any, weight: Any, layout: Layout, rank: int) -> Any:
    """Of the whole weight by its cut, flat; under ZeRO 3 this rank's run. All sizes divide."""
    cut = weight.cut(layout, rank)
    part = (whole if cut is None else cut(whole)).detach().flatten()
    return part.chunk(layout.data)[layout.data_rank(rank)] if layout.zero_stage == 3 else part


def peak_of(function: Any) -> int:
    """The most that the allocator handed out during a call, in bytes."""
    from torch.profiler import profile

    with profile(profile_memory=True) as profiled:
        function()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate((change for _, change in changes), initial=0))


def planned_bytes() -> list[float]:
    """What all ranks receive, for each pair, as the planner counts it."""
    import numpy as np

    from training.plan import Assignment
    from training.planner.hardware import Cluster
    from training.planner.reallocation_cost import Shares, Traffic, bytes_by_kind
    from training.planner.workload import Model
    from training.shape import Shape

    sizes = bytes_by_kind(Model(Shape.from_config_values(shape()), True), 4)
    shares = Shares.of([Assignment(layout).cut for layout in LAYOUTS], Cluster.named("h200", 1, RANKS), LAYERS)
    pairs = [(a, b) for a, b in itertools.product(range(len(LAYOUTS)), repeat=2) if a != b]
    sources, targets = (np.array(ends) for ends in zip(*pairs, strict=True))
    return list(Traffic.between(shares, sources, shares, targets, sizes).received.sum(axis=1))


def report(shares: list[dict[str, Any]]) -> dict[str, Any]:
    """By pair, over the ranks."""
    pairs = [(a, b) for a in LAYOUTS for b in LAYOUTS if a != b]
    largest, found = shares[0]["largest_layer"], []
    for place, ((source, target), planned) in enumerate(zip(pairs, planned_bytes(), strict=True)):
        of_ranks = [share["rows"][place] for share in shares]
        sent = sum(row["sent"] for row in of_ranks)
        found.append(
            {
                "from": name_of(source),
                "to": name_of(target),
                "seconds": statistics.median(
                    max(times) for times in zip(*(r["seconds"] for r in of_ranks), strict=True)
                ),
                "sent": sent,
                "planned": round(planned),
                "most_sent_by_a_rank": max(row["sent"] for row in of_ranks),
                "extra_layers": max(max(0, row["peak"] - row["part"]) / largest for row in of_ranks),
                "equal": all(row["equal"] for row in of_ranks),
            }
        )
    return {"machine": machine(), "versions": versions(), "model": shape(), "largest_layer": largest, "pairs": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for machine, versions and all figures")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        run_rank(arguments)
        return
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, "-m", "benchmarks.layout_pairs", *sys.argv[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if not lines:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    found = report(json.loads(lines[0].removeprefix("FOUND ")))
    if arguments.out is not None:
        write_json(arguments.out, found)
    pairs = found["pairs"]
    slowest = max(pairs, key=lambda pair: pair["seconds"])
    off, off_in_stages = (
        max(
            abs(pair["sent"] - pair["planned"]) / max(1, pair["planned"])
            for pair in pairs
            if ("pipeline" in pair["from"] + pair["to"]) == has_stages
        )
        for has_stages in (False, True)
    )
    layers = max(pair["extra_layers"] for pair in pairs)
    print(f"{len(pairs)} pairs: {sum(pair['equal'] for pair in pairs)} equal to the bit")
    print(f"bytes sent differ from the planner's by at most {off:.2%}, where there are stages by {off_in_stages:.2%}")
    print(f"extra memory beside the part: at most {layers:.2f} of the largest layer ({LAYERS_LIMIT} allowed)")
    print(
        f"seconds: median {statistics.median(pair['seconds'] for pair in pairs):.3f}, slowest {slowest['seconds']:.3f}"
    )
    print(f"  ({slowest['from']} -> {slowest['to']}, {slowest['sent'] / 1e6:.0f} MB sent)")
    if off or off_in_stages > BYTES_LIMIT or layers > LAYERS_LIMIT or not all(pair["equal"] for pair in pairs):
        sys.exit(1)


if __name__ == "__main__":
    main()
