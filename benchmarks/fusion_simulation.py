"""SIMULATION: what inter-stage fusion would gain in the published setting of RLHFuse (arXiv 2409.13221).

    python -m benchmarks.fusion_simulation --picture threshold.svg

32 instances generate and score 512 samples, LLaMA models of 13B to 65B, responses of up to 512, 1024 and 2048 tokens.
Nothing here is measured: costs come from data sheets and the assumptions below, lengths from a lognormal distribution.
What is simulated is this project's own rollout, by the simulator that chooses its thresholds. That one is checked on
real processes by `benchmarks.inter_stage_fusion`; its figures and these belong into separate tables.

Two things differ from the published system. There one threshold starts everything, here an instance that runs empty
scores in any case, and the threshold (0: never) only says when samples move: the gain at 0 is a column of its own.
And the tail is gathered again and again as it gets shorter, which rounds the teeth of the curve off.

Published: generation and scoring 1.2 to 1.6 times as fast as in the same stack without fusion, the best threshold near
20 % of the batch. Takes two minutes on one core.
"""

import argparse
import math
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle
from pathlib import Path

from training.fusion.board import FusionPolicy, SampleLengths
from training.fusion.choice import FusionChooser, FusionSetup
from training.fusion.costs import Costs, LengthStatistics
from training.fusion.simulator import SimulatedRollout, SimulatorConfig, fused, serial

LABEL = "SIMULATION, not a measurement"
INSTANCES, SAMPLES, PROMPT_TOKENS = 32, 512, 256
LONGEST = (512, 1024, 2048)
SLOTS = 32
"""Of an instance; the default of `rlhf.generation_batch`."""
MEDIAN_SHARE = 1 / 4
"""Median length as a share of the longest: about 3 % of the samples then are cut off at the limit."""
SIGMA = 0.75
"""Of the logarithm of the length: before the cut 1 of 1000 samples is over 10 times as long as the median."""
HISTORY = 2
"""Rollouts that the choice of the threshold has seen."""
PUBLISHED_BEST = 0.2

# An instance: a node of 8 A100-80G, tensor-parallel (256 GPUs in all).
GPUS = 8
PEAK_FLOPS, MEMORY_BANDWIDTH = 312e12, 2.039e12
"""Of a GPU: fp16 matrix products, bytes a second; NVIDIA's data sheet."""
NETWORK_BANDWIDTH = 25e9
"""Bytes a second from a GPU to its peer in another node: 200 Gbit/s, the usual network card of such nodes."""
COMPUTE_SHARE, BANDWIDTH_SHARE = 0.5, 0.8
"""Of the peaks: assumed, what good kernels reach."""
ALL_REDUCE_SECONDS = 2e-5
"""Latency in a node; assumed. Tensor parallelism needs two in a layer."""
UNIT_TOKENS, MICRO_BATCH_TOKENS = 1024, 8192
"""Scored together with and without fusion. The unit is several times what it takes to be bound by computing."""


@dataclass(frozen=True)
class Model:
    """LLaMA (arXiv 2302.13971, table 2), in fp16."""

    parameters: float
    layers: int
    hidden: int

    @property
    def latency(self) -> float:
        """Seconds of the all-reduces of one forward pass."""
        return 2 * self.layers * ALL_REDUCE_SECONDS

    @property
    def token_seconds(self) -> float:
        """To compute one token: two operations a weight; attention is left out, a few percent at these lengths."""
        return 2 * self.parameters / (GPUS * PEAK_FLOPS * COMPUTE_SHARE)

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one token."""
        return 2 * 2 * self.layers * self.hidden


MODELS = {"13B": Model(13.0e9, 40, 5120), "33B": Model(32.5e9, 60, 6656), "65B": Model(65.2e9, 80, 8192)}
PAIRS = (("13B", "33B"), ("33B", "13B"), ("33B", "65B"), ("65B", "33B"))
"""Actor, whose size the reference has too, and critic, whose size the reward model has too."""


def instance_costs(actor: Model, critic: Model) -> Costs:
    """A decode step reads the weights once, however many rows it has, until computing takes longer than reading; then
    it grows with them. Keys and values are read for each token attended to. Scoring is bound by computing."""
    bandwidth = GPUS * MEMORY_BANDWIDTH * BANDWIDTH_SHARE
    flat = actor.latency + 2 * actor.parameters / bandwidth
    rows = math.floor(flat / actor.token_seconds)
    return Costs(
        rows=(1, rows, 2 * rows),
        step=(flat, flat, 2 * flat),
        per_context=actor.cache_bytes / bandwidth,
        prefill=(flat, actor.token_seconds),
        score=(actor.latency + 2 * critic.latency, actor.token_seconds + 2 * critic.token_seconds),
        bandwidth=NETWORK_BANDWIDTH,
        cache_bytes=actor.cache_bytes // GPUS,
    )


@dataclass(frozen=True)
class Case:
    """One setting; sizes are names in MODELS."""

    actor: str
    critic: str
    longest: int
    median_share: float = MEDIAN_SHARE
    sigma: float = SIGMA

    def __str__(self) -> str:
        return f"{self.actor}/{self.critic}, up to {self.longest} tokens, median {self.longest * self.median_share:.0f}"

    def rollout(self, seed: int) -> list[list[SampleLengths]]:
        """Samples by instance, dealt out one by one."""
        drawn = random.Random(f"{self.longest}/{self.median_share}/{self.sigma}/{seed}")
        median = math.log(self.longest * self.median_share)
        lengths = [max(1, min(self.longest, round(drawn.lognormvariate(median, self.sigma)))) for _ in range(SAMPLES)]
        samples = [SampleLengths(index, PROMPT_TOKENS, length) for index, length in enumerate(lengths)]
        return [samples[instance::INSTANCES] for instance in range(INSTANCES)]


class Simulation:
    """Some rollouts of one case with fusion and without. The threshold is chosen on other draws than these."""

    def __init__(self, case: Case, draws: int):
        self.case = case
        self.config = SimulatorConfig(
            instance_costs(MODELS[case.actor], MODELS[case.critic]), SLOTS, micro_batch_tokens=MICRO_BATCH_TOKENS
        )
        self.rollouts = [case.rollout(seed) for seed in range(draws)]
        self.lengths = LengthStatistics(case.longest)
        past = [sample.response for seed in range(HISTORY) for samples in case.rollout(-1 - seed) for sample in samples]
        self.lengths.add({0: past})

    @cached_property
    def without(self) -> list[SimulatedRollout]:
        """Of each rollout, without fusion."""
        return [serial(shares, self.config) for shares in self.rollouts]

    @property
    def generate_seconds(self) -> float:
        return statistics.mean(outcome.generated for outcome in self.without)

    @property
    def score_seconds(self) -> float:
        return statistics.mean(outcome.seconds - outcome.generated for outcome in self.without)

    @property
    def bound(self) -> float:
        """No more can be gained: all of scoring hidden."""
        return 1 + self.score_seconds / self.generate_seconds

    @cached_property
    def chosen(self) -> FusionPolicy:
        """What the running system would take when it is asked to fuse."""
        setting = FusionSetup("inter", INSTANCES, 1, SLOTS, SAMPLES, MICRO_BATCH_TOKENS, UNIT_TOKENS)
        policy = FusionChooser(setting, self.lengths, self.config.costs, prompts=[PROMPT_TOKENS]).choose(0).policy
        assert policy is not None
        return policy

    def gain(self, policy: FusionPolicy) -> float:
        """Seconds without fusion / seconds with it."""
        outcomes = [fused(shares, self.config, policy, self.lengths.remaining) for shares in self.rollouts]
        return sum(outcome.seconds for outcome in self.without) / sum(outcome.seconds for outcome in outcomes)

    def curve(self, thresholds: Iterable[int]) -> dict[int, float]:
        """Gain by threshold, with the rows of the chosen policy."""
        return {threshold: self.gain(replace(self.chosen, threshold=threshold)) for threshold in thresholds}


def best_of(curve: Mapping[int, float]) -> int:
    """The threshold that gains most; of equal ones the smallest."""
    return max(curve, key=lambda threshold: (curve[threshold], -threshold))


def gains_table(simulations: Sequence[Simulation]) -> str:
    """What is gained with the chosen threshold."""
    lines = [
        f"Gain of fusion over the same stack without it ({LABEL})\n",
        "| actor/critic, lengths | generate, s | score, s | bound | threshold 0 | chosen | threshold | rows |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for s in simulations:
        threshold = f"{s.chosen.threshold} ({s.chosen.threshold / SAMPLES:.0%})"
        gains = f"{s.bound:.2f} | {s.gain(replace(s.chosen, threshold=0)):.2f} | {s.gain(s.chosen):.2f}"
        times = f"{s.generate_seconds:.2f} | {s.score_seconds:.2f}"
        lines.append(f"| {s.case} | {times} | {gains} | {threshold} | {s.chosen.rows} |")
    return "\n".join(lines)


def curve_table(curves: Mapping[str, Mapping[int, float]], step: int) -> str:
    """Every `step`-th threshold of curves that have the same ones, and the best of all."""
    thresholds = next(iter(curves.values()))
    lines = [
        f"Gain by threshold ({LABEL})\n",
        "| threshold | " + " | ".join(curves) + " |",
        "|---" * (len(curves) + 1) + "|",
    ]
    for threshold in [threshold for threshold in thresholds if threshold % step == 0]:
        lines.append(f"| {threshold} | " + " | ".join(f"{curve[threshold]:.3f}" for curve in curves.values()) + " |")
    best = [(best_of(curve), curve) for curve in curves.values()]
    found = (f"{curve[place]:.3f} at {place} ({place / SAMPLES:.0%})" for place, curve in best)
    return "\n".join([*lines, "| best | " + " | ".join(found) + " |"])


COLOURS = ("#4c78a8", "#d66c0f", "#3f9142", "#de4b45")


def curves_svg(title: str, curves: Mapping[str, Mapping[int, float]]) -> str:
    """Gain over threshold, a line for each; the best of each is marked, and where the published best lies."""
    from matplotlib.figure import Figure

    from training.pictures import INK, as_file, drawing

    with drawing():
        picture = Figure((480 / 72, 320 / 72), layout="constrained")
        axes = picture.add_subplot(xlabel="threshold")
        axes.set_title(title, wrap=True)
        axes.grid(axis="y")
        axes.margins(y=0.05)
        axes.axhline(1, color=INK, linewidth=1)
        axes.axvline(PUBLISHED_BEST * SAMPLES, color=INK, linewidth=1, linestyle="--", gid="published")
        for (label, curve), colour in zip(curves.items(), cycle(COLOURS), strict=False):
            best = list(curve).index(best_of(curve))
            axes.plot(curve.keys(), curve.values(), color=colour, label=label, marker="o", markevery=[best], gid=label)
        shares = [share / 100 for share in range(0, 101, 20)]
        axes.set_xticks(
            [share * SAMPLES for share in shares], [f"{share * SAMPLES:.0f} ({share:.0%})" for share in shares]
        )
        axes.set_xlim(0, SAMPLES)
        picture.legend(loc="outside lower left", ncols=2)
        return as_file(
            picture, "curves", {"published": "the published best lies near here"} | {each: each for each in curves}
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4, help="rollouts that each figure is a mean over")
    parser.add_argument("--median-share", type=float, default=MEDIAN_SHARE, help="median length / longest")
    parser.add_argument("--sigma", type=float, default=SIGMA, help="of the logarithm of the length")
    parser.add_argument("--longest", type=int, nargs="+", default=list(LONGEST), help="limits of a response, tokens")
    parser.add_argument("--step", type=int, default=4, help="between two thresholds of the curve")
    parser.add_argument("--picture", type=Path, help="SVG file for the curve over the threshold")
    options = parser.parse_args(arguments)

    simulations = [
        Simulation(Case(actor, critic, longest, options.median_share, options.sigma), options.draws)
        for actor, critic in PAIRS
        for longest in options.longest
    ]
    print(f"{LABEL}: {INSTANCES} instances of {GPUS} A100, {SAMPLES} samples, prompts of {PROMPT_TOKENS} tokens,")
    print(f"lengths lognormal with sigma {options.sigma}, {options.draws} rollouts a figure\n")
    print(gains_table(simulations) + "\n", flush=True)
    curves = {
        f"up to {s.case.longest}, {s.chosen.rows} rows": s.curve(range(0, SAMPLES + 1, options.step))
        for s in simulations[: len(options.longest)]
    }
    print(curve_table(curves, 8 * options.step))
    if options.picture:
        title = f"{LABEL}: gain of generation and scoring over the threshold, {'/'.join(PAIRS[0])}"
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        options.picture.write_text(curves_svg(title, curves))


if __name__ == "__main__":
    main()
