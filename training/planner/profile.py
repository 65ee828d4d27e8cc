"""Measures the machine that it runs on, as one of its ranks: rates of matrix products, memory and links, and what
launching a layer and a collective cost. All ranks measure at the same time, because they share the machine.

As a script it is one rank: profile.py FILE, started by torchrun; the first writes the profile as JSON.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import log2
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import rlhf_chat  # noqa: F401  a script of ranks, too
from inference.generation.engine import GenerationEngine
from inference.generation.sampler import SamplingKey, SamplingSettings
from inference.tensor_parallel.shard import TensorParallel, empty_shard
from training.distributed import Ranks, start_ranks, stop_ranks
from training.launchers import begin_script
from training.planner.cost import BACKWARD
from training.planner.hardware import ACHIEVED_BANDWIDTH, THIS_MACHINE, Calibration, Device, MachineProfile
from training.planner.workload import Precision
from training.run_directory import processor, versions

REPEATS, FEW = 7, 3
SLOW = 2.0
"""Seconds of a program that once is enough for, as products in bf16 on a CPU that only imitates them."""
COLLECTIVES = 40
"""Collectives in sequence, with products between them."""
PAD, END = 0, 2
ROWS, DECODED = 16, 9
"""Samples that decode together, and tokens of each."""
LAYERS = (4, 20)
"""Layers of two stacks, whose difference in seconds is that of the layers they differ by."""
FEW_LAYERS = (2, 6)
"""The same where a layer waits for other ranks, or for DeepSpeed."""
ALL_REDUCE_SHARE = 0.5
"""Share of the link that a sum reaches of which a rank needs its part: DeepSpeed's all-reduce under ZeRO 1 and 2."""


def measure(ranks: Ranks) -> MachineProfile:
    """Measure, in about half a minute on two cores; all ranks get the profile of the slowest."""
    meter = Meter(ranks)
    rates = meter.matrix_products()
    memory = meter.memory_bandwidth()
    latency, link = meter.link() if ranks.size > 1 else (0.0, memory)
    device = Device(
        THIS_MACHINE, device_memory(ranks), rates, memory / ACHIEVED_BANDWIDTH, link / ACHIEVED_BANDWIDTH,
        meter.host_bandwidth(memory) / ACHIEVED_BANDWIDTH,
    )  # fmt: skip
    launches = meter.launch_seconds(), latency, 0.0, meter.decode_seconds()
    calibration = Calibration(meter.compute_share(rates["fp32"]), *launches)
    if meter.is_cpu and ranks.size > 1:  # a GPU's host runs ahead of it, and its memory is fast beside the link
        calibration = replace(
            calibration,
            decode_collective_seconds=meter.decode_collective_seconds(calibration.decode_seconds),
            gather_share=meter.gather_bandwidth() / link,
            scatter_share=meter.scatter_bandwidth() / link,
            reduce_share=ALL_REDUCE_SHARE,
            copy_bandwidth=meter.copy_bandwidth(),
            hook_seconds=meter.hook_seconds(calibration.launch_seconds),
        )
    return MachineProfile(device, ranks.size, calibration, where(ranks))


@dataclass(frozen=True)
class OneToken:
    weight: float = 1.0


class Meter:
    """Times small programs on one rank while the others run them too."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.device = ranks, ranks.device
        self.is_cpu = self.device.type == "cpu"
        self.scale = 1 if self.is_cpu else 8
        """How much larger the work on a GPU is."""

    def seconds(self, program: Callable[[], Any], repeats: int = REPEATS) -> float:
        """Return the median of several calls after two that warm up, or of the first that is slow, of the slowest
        rank."""
        taken = []
        for repeat in range(repeats + 2):
            self.ranks.barrier()
            self._wait()
            begun = time.perf_counter()
            program()
            self._wait()
            elapsed = time.perf_counter() - begun
            if repeat >= 2:
                taken.append(elapsed)
            elif max(self.ranks.gather(elapsed)) > SLOW:
                taken.append(elapsed)
                break
        return max(self.ranks.gather(statistics.median(taken)))

    def _wait(self) -> None:
        if not self.is_cpu:
            torch.cuda.synchronize(self.device)

    def matrix_products(self) -> dict[Precision, float]:
        """Return the operations a second of a large product, by number format; fp16 where the device has it."""
        rates: dict[Precision, float] = {}
        formats: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
        if not self.is_cpu:
            formats["fp16"] = torch.float16
        rows, size = 1024 * self.scale, 1024 * self.scale
        for name, dtype in formats.items():
            tokens = torch.ones(rows, size, dtype=dtype, device=self.device)
            weights = torch.ones(size, size, dtype=dtype, device=self.device)
            seconds = self.seconds(lambda tokens=tokens, weights=weights: tokens @ weights)  # type: ignore[misc]
            rates[name] = 2 * rows * size * size / seconds
        return rates

    def memory_bandwidth(self) -> float:
        """Return the bytes a second at which a decode step reads weights: a row times a matrix of 128 MiB (1 GiB on a
        GPU)."""
        weights = torch.ones(8192 * self.scale, 4096, device=self.device)
        row = torch.ones(1, 4096, device=self.device)
        return weights.numel() * weights.element_size() / self.seconds(lambda: row @ weights.T)

    def host_bandwidth(self, memory: float) -> float:
        """Return the bytes a second from the host's memory; on a CPU that is `memory`."""
        if self.is_cpu:
            return memory
        host = torch.ones(2**26, pin_memory=True)
        there = torch.empty_like(host, device=self.device)
        return host.numel() * host.element_size() / self.seconds(lambda: there.copy_(host))

    def link(self) -> tuple[float, float]:
        """Return the seconds of a collective over two ranks; bytes a second that a rank sends in a long one.

        A collective stands between products, as in a model: ranks that come from other work wait for each other.
        """
        size = self.ranks.size
        many = torch.ones(2**22 * self.scale, device=self.device)
        sent = 2 * (size - 1) / size * many.numel() * many.element_size()
        bandwidth = sent / self.seconds(lambda: dist.all_reduce(many))
        rows, weights = (torch.ones(count, 512, device=self.device) for count in (16, 512))

        def layers(with_collective: bool) -> None:
            for _ in range(COLLECTIVES):
                product = rows @ weights
                if with_collective:
                    dist.all_reduce(product)

        both, alone = self.seconds(lambda: layers(True)), self.seconds(lambda: layers(False))
        exchange = 2 * (size - 1) / size * rows.numel() * rows.element_size() / bandwidth
        return max(0.0, (both - alone) / COLLECTIVES - exchange) / log2(size), bandwidth

    def gather_bandwidth(self) -> float:
        """Return the bytes a second that a rank sends in an all-gather of 128 MiB, too many for buffers that gloo
        has."""
        whole, part, sent = self._divided()
        return sent / self.seconds(lambda: dist.all_gather_into_tensor(whole, part), FEW)

    def scatter_bandwidth(self) -> float:
        """Return the bytes a second that a rank sends in a reduce-scatter of 128 MiB."""
        whole, part, sent = self._divided()
        return sent / self.seconds(lambda: dist.reduce_scatter_tensor(part, whole), FEW)

    def _divided(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Return what all ranks have together, this rank's part of it, and the bytes of the others."""
        part = torch.ones(2**25 // self.ranks.size, device=self.device)
        whole = part.repeat(self.ranks.size)
        return whole, part, (len(whole) - len(part)) * whole.element_size()

    def copy_bandwidth(self) -> float:
        """Return the bytes a second written into a buffer as DeepSpeed makes it for gradients: so large that the system
        gives new memory, and clears every page of it first."""
        many = torch.ones(2**24, device=self.device)
        taken = self.seconds(lambda: torch.empty(2**28, device=self.device)[: len(many)].copy_(many))
        return many.numel() * many.element_size() / taken

    def hook_seconds(self, launch: float) -> float:
        """Return the seconds of DeepSpeed around one layer, in a forward or a backward pass under ZeRO 3, beside
        `launch` seconds for its kernels: with weights so small that all ranks keep them whole, it gathers none."""
        from training.hybrid_engine.zero_engine import ZeroEngine  # seconds that only this needs
        from training.role_settings import OptimizerSettings

        ids, taken = torch.ones(1, 1, dtype=torch.long, device=self.device), []
        for layers in FEW_LAYERS:
            settings = OptimizerSettings(zero_stage=3)
            engine = ZeroEngine(self.stack(layers, hidden=64), settings, torch.float32, 1, self.ranks)
            loss = lambda _, engine=engine: engine(ids, use_cache=False)[0].sum()  # noqa: E731
            taken.append(self.seconds(lambda: engine.accumulate([OneToken()], loss), FEW))  # noqa: B023
        one_layer = (taken[1] - taken[0]) / (FEW_LAYERS[1] - FEW_LAYERS[0])
        return max(0.0, one_layer - (1 + BACKWARD) * launch) / 2

    def launch_seconds(self) -> float:
        """Return the seconds to run one layer on one token, nearly without arithmetic."""
        few, more = (self.stack(layers, hidden=64) for layers in LAYERS)
        ids = torch.ones(1, 1, dtype=torch.long, device=self.device)
        return (self._forward(more, ids) - self._forward(few, ids)) / (LAYERS[1] - LAYERS[0])

    def decode_seconds(self) -> float:
        """Return the seconds to run one layer in a decode step of the generation engine, nearly without arithmetic; on
        a GPU its steps are CUDA graphs."""
        few, more = (self._decode(self.stack(layers, hidden=64, generates=True)) for layers in LAYERS)
        return max(0.0, more - few) / (LAYERS[1] - LAYERS[0]) / (DECODED - 1)

    def decode_collective_seconds(self, alone: float) -> float:
        """Return the seconds of a collective over two ranks in a decode step of the generation engine: a
        tensor-parallel layer takes two of them longer than one `alone`. Ranks that come from many small kernels wait
        longer for each other."""
        part = TensorParallel(self.ranks.rank, self.ranks.size, dist.group.WORLD)
        whole = (self.stack(layers, 64 * part.size, generates=True) for layers in FEW_LAYERS)
        few, more = (self._decode(shard(model, part), FEW) for model in whole)
        one_layer = (more - few) / (FEW_LAYERS[1] - FEW_LAYERS[0]) / (DECODED - 1)
        return max(0.0, one_layer - alone) / 2 / log2(part.size)

    def _decode(self, model: nn.Module, repeats: int = REPEATS) -> float:
        engine = GenerationEngine(model, END, PAD, slots=ROWS)
        prompts, settings = [torch.ones(1, dtype=torch.long)] * ROWS, SamplingSettings(DECODED)
        return self.seconds(
            lambda: list(engine.generate(prompts, settings, SamplingKey(0), lengths=[DECODED] * ROWS)), repeats
        )

    def compute_share(self, rate: float) -> float:
        """Return the share of `rate` that a stack of layers reaches, forward, over 2,048 tokens in fp32."""
        hidden = 512 * self.scale
        few, more = (self.stack(layers, hidden) for layers in (2, 6))
        ids = torch.ones(16, 128, dtype=torch.long, device=self.device)
        weights = sum(p.numel() for p in more.parameters()) - sum(p.numel() for p in few.parameters())
        seconds = self._forward(more, ids) - self._forward(few, ids)
        return min(1.0, 2 * weights * ids.numel() / seconds / rate)

    def stack(self, layers: int, hidden: int, generates: bool = False) -> nn.Module:
        from transformers import OPTConfig, OPTForCausalLM, OPTModel  # a second that only this needs

        config = OPTConfig(
            vocab_size=8, hidden_size=hidden, word_embed_proj_dim=hidden, num_hidden_layers=layers, ffn_dim=4 * hidden,
            num_attention_heads=hidden // 64, max_position_embeddings=256, dropout=0.0, pad_token_id=PAD,
        )  # fmt: skip
        return (OPTForCausalLM if generates else OPTModel)(config).eval().to(self.device)

    def _forward(self, model: nn.Module, ids: torch.Tensor) -> float:
        with torch.inference_mode():
            return self.seconds(lambda: model(ids, use_cache=False))


def shard(model: nn.Module, part: TensorParallel) -> nn.Module:
    """Return a rank's part of a model, with weights of 0."""
    cut, pieces = empty_shard(model, part)
    for piece in pieces:
        nn.init.zeros_(piece.local)
    return cut


def device_memory(ranks: Ranks) -> float:
    if ranks.device.type == "cuda":
        return float(torch.cuda.get_device_properties(ranks.device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks.size


def where(ranks: Ranks) -> dict[str, str]:
    is_gpu = ranks.device.type == "cuda"
    name = torch.cuda.get_device_name(ranks.device) if is_gpu else f"{processor()[0]}, {os.cpu_count()} cores"
    return {"processor": name, "threads of a rank": str(torch.get_num_threads()), **versions()}


def main() -> int:
    begin_script()
    ranks = start_ranks()
    profile = measure(ranks)
    if ranks.is_first:
        Path(sys.argv[1]).write_text(json.dumps(asdict(profile)), encoding="utf-8")
    ranks.barrier()
    stop_ranks()
    return 0


if __name__ == "__main__":
    sys.exit(main())
