"""Seconds of a call on a layout, part by part.

Everything is counted from shapes and data sheets; what only measurement gives is in `hardware.Calibration`. In a pass
over many tokens the host runs ahead of the device, so that launches and the latency of collectives cost only what they
take longer than the arithmetic. The kernels of a decode step are as short as their launches, and the host waits for
every token: there launches, latency, arithmetic and reads add up.

Pipelines follow GPipe and 1F1B alike: (micro-batches + stages - 1) times the slowest stage.
Attention arithmetic: "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198, appendix A).
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from math import log2

from training.calls import Call
from training.hybrid_engine.layout import Layout
from training.memory import MAX_LIVE_PARAMETERS
from training.plan import Assignment
from training.planner.hardware import ACHIEVED_BANDWIDTH, Cluster
from training.planner.workload import Model, Workload


@dataclass(frozen=True)
class RankGroup:
    """Describes equal groups of ranks that communicate at the same time."""

    size: int
    bandwidth: float
    """Bytes a second that each rank sends."""
    latency: float
    """Seconds before the first byte; grows with log2 of the ranks."""
    decode_latency: float
    """The same in a decode step."""

    def all_reduce(self, size: float) -> float:
        """Return the seconds to sum `size` bytes that every rank has."""
        return self.latency + 2 * (self.size - 1) / self.size * size / self.bandwidth if self.size > 1 else 0.0

    def all_gather(self, size: float, share: float = 1.0) -> float:
        """Return the seconds until every rank has `size` bytes of which each had a part, at a share of the bandwidth;
        those of a reduce-scatter too."""
        sent = (self.size - 1) / self.size * size
        return self.latency + sent / (self.bandwidth * share) if self.size > 1 else 0.0

    def send(self, size: float) -> float:
        return self.latency + size / self.bandwidth if self.size > 1 else 0.0


@dataclass(frozen=True)
class LayoutLinks:
    tensor: RankGroup
    data: RankGroup
    hop: RankGroup
    """Ranks of neighbouring pipeline stages, in pairs; of size 1 where there is one stage."""


def links_of(layout: Layout, cluster: Cluster) -> LayoutLinks:
    stage = layout.tensor * layout.data
    hops = list(zip(layout.mesh, layout.mesh[stage:], strict=False))
    return LayoutLinks(
        _group(layout.tensor_groups, layout.tensor, cluster),
        _group(layout.data_groups, layout.data, cluster),
        _group(hops, min(layout.pipeline, 2), cluster, one_way=True),
    )


def _group(groups: Iterable[tuple[int, ...]], size: int, cluster: Cluster, one_way: bool = False) -> RankGroup:
    leaving: Counter[int] = Counter()
    for group in groups:
        nodes = {cluster.node_of(rank) for rank in group}
        if len(nodes) > 1:
            leaving.update([cluster.node_of(group[0])] if one_way else nodes)
    bandwidth = cluster.device.link_bandwidth
    if leaving:
        bandwidth = min(bandwidth, cluster.network_bandwidth / max(leaving.values()))
    calibration = cluster.calibration
    latencies = (seconds * log2(size) for seconds in (calibration.collective_seconds, calibration.decode_collective))
    return RankGroup(size, bandwidth * ACHIEVED_BANDWIDTH, *latencies)


BACKWARD = 2
"""Arithmetic and launches of a backward pass, in forward passes: gradients of inputs, and of weights."""
BACKWARD_OF_ADAPTERS = 1
"""Its arithmetic where the matrices are frozen: gradients of inputs only. That of the adapters is not counted."""
HEAD_LAUNCHES = 1
"""Launches of embedding, last norm, output matrix and sampling or loss, in layers."""
HEAD_COLLECTIVES = 3
"""Collectives of a tensor-parallel group a pass: for embedding, logits, and sampling or loss."""
OPTIMIZER_BYTES = 34
"""Read and written for each weight by AdamW on 16-bit weights: gradient, fp32 copy and two moments, both ways."""


@dataclass(frozen=True)
class CallCost:
    """Holds the seconds of one call, by what they are spent on."""

    arithmetic: float = 0.0
    """Matrix products, or reading the weights where that takes longer."""
    attention: float = 0.0
    """What grows with context: its arithmetic, and in decode steps reading keys and values."""
    launch: float = 0.0
    tensor_parallel: float = 0.0
    pipeline: float = 0.0
    """Bubbles and sends."""
    gradients: float = 0.0
    """Reduced over data ranks."""
    zero: float = 0.0
    """Weights gathered from data ranks."""
    optimizer: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __add__(self, other: "CallCost") -> "CallCost":
        return CallCost(*(a + b for a, b in zip(self.parts().values(), other.parts().values(), strict=True)))

    def __mul__(self, factor: float) -> "CallCost":
        return CallCost(*(value * factor for value in self.parts().values()))


class CallCosts:
    def __init__(self, workload: Workload, cluster: Cluster):
        self.workload, self.cluster = workload, cluster
        self.calibration = cluster.calibration
        self.flops = cluster.device.peak_flops[workload.precision] * self.calibration.compute_share
        self.memory_bandwidth = cluster.device.memory_bandwidth * ACHIEVED_BANDWIDTH
        self._links: dict[tuple, LayoutLinks] = {}

    def cost(self, call: Call, assignment: Assignment) -> CallCost:
        """Return the cost of `call` itself; the augmented graph adds reallocation, data transfer and offload."""
        model = self.workload.models[call.role]
        of_kind = {"generate": self._generate, "score": self._score, "train": self._train}[call.kind]
        return of_kind(model, assignment)

    def _score(self, model: Model, assignment: Assignment) -> CallCost:
        rows = self.workload.rows_together("score", assignment)
        stage = self._pass(model, assignment, rows, self.workload.length) + self._gathered(model, assignment)
        stage = stage + self._hooks(model, assignment)
        parts = self.workload.micro_batches("score", assignment)
        return self._pipelined(stage, model, assignment, rows * self.workload.length, parts)

    def _train(self, model: Model, assignment: Assignment) -> CallCost:
        """Count each optimiser step: forward, recomputed forward and backward of all micro-batches, reduction,
        update."""
        workload, layout = self.workload, assignment.layout
        rows = workload.rows_together("train", assignment)
        forwards = 2 if workload.checkpointing else 1
        forward = self._pass(model, assignment, rows, workload.length)
        backward = _backward(model, forward)
        # under ZeRO 3 the recomputed forward and the backward pass of a layer share one gathering, and the first one
        # too where DeepSpeed keeps as many weights whole as are passed until then
        reread = (forwards + 1) * model.largest_stage(layout).parameters / layout.tensor > MAX_LIVE_PARAMETERS
        stage = forward * forwards + backward + self._gathered(model, assignment) * (2 if reread else 1)
        stage = stage + self._hooks(model, assignment) * 2
        weights = model.largest_stage(layout).trained_parameters / layout.tensor
        zero_stage = max(
            layout.zero_stage, int(workload.precision == "bf16")
        )  # DeepSpeed keeps fp32 weights from stage 1 on
        reduced, gathered = self._gradient_reduction(assignment, weights, zero_stage)
        updated = weights / (layout.data if zero_stage else 1)
        step = CallCost(
            gradients=reduced,
            zero=gathered,
            optimizer=updated * OPTIMIZER_BYTES / self.memory_bandwidth,
        )
        parts = workload.micro_batches("train", assignment)
        passes = self._pipelined(stage, model, assignment, rows * workload.length, parts, sends=2)
        return (passes + step) * (workload.mini_batches * workload.epochs)

    def micro_batch_by_stage(self, call: Call, assignment: Assignment) -> list[tuple[float, float]]:
        """Return the seconds of a training call's forward and backward pass on each pipeline stage, sending included;
        where activations are recomputed the backward pass does it."""
        model, layout = self.workload.models[call.role], assignment.layout
        rows, last = self.workload.rows_together("train", assignment), layout.pipeline - 1
        hop = self._links_of(assignment).hop.send(self._sent(model, assignment, rows * self.workload.length))
        passes = []
        for stage, layers in enumerate(layout.runs(model.shape.layers)):
            forward = self.stage_pass(model, assignment, layers, stage == last, rows, self.workload.length)
            backward = _backward(model, forward) + forward * self.workload.checkpointing
            passes.append((forward.seconds + hop * (stage < last), backward.seconds + hop * (stage > 0)))
        return passes

    def _generate(self, model: Model, assignment: Assignment) -> CallCost:
        """Count waves of `pipeline` groups of rows (all rows where there is one stage): prefill, then decode steps.

        A stage works on one group while the others are elsewhere in the pipeline, so that a round of steps of all
        groups takes `pipeline` times the slowest stage, the last one with its head. A sample that ends makes room for
        one of the next wave, so that a wave lasts as long as a mean response, the last one as the longest.
        """
        workload, layout = self.workload, assignment.layout
        links = self._links_of(assignment)
        rows, parts = workload.rows_together("generate", assignment), workload.micro_batches("generate", assignment)
        groups = min(parts, layout.pipeline)
        waves = -(-parts // layout.pipeline)
        prefill = self._pipelined(
            self._pass(model, assignment, rows, workload.prompt_tokens), model, assignment,
            rows * workload.prompt_tokens, groups,
        )  # fmt: skip
        tokens = (waves - 1) * workload.response_tokens + workload.longest_response
        alive = rows * waves * workload.response_tokens / tokens
        context = workload.prompt_tokens + workload.response_tokens / 2
        stage = self._pass(model, assignment, alive, 1, context) + self._gathered(model, assignment)
        hop = links.hop.send(self._sent(model, assignment, alive))
        step = stage * layout.pipeline + CallCost(pipeline=hop * layout.pipeline)
        return prefill * waves + step * max(0, tokens - waves)

    def _pass(
        self, model: Model, assignment: Assignment, rows: float, length: int, context: float | None = None
    ) -> CallCost:
        """Count a forward pass of the slowest stage over `rows` x `length` tokens: the last stage, which has the head,
        or one of more layers.

        With `context` a decode step: so many earlier keys and values are read for every token.
        """
        *before, last = assignment.layout.runs(model.shape.layers)
        slowest = self.stage_pass(model, assignment, last, True, rows, length, context)
        if (most := max(before, default=0)) > last:
            other = self.stage_pass(model, assignment, most, False, rows, length, context)
            return max(slowest, other, key=lambda cost: cost.seconds)
        return slowest

    def stage_pass(
        self,
        model: Model,
        assignment: Assignment,
        layers: int,
        has_head: bool,
        rows: float,
        length: int,
        context: float | None = None,
    ) -> CallCost:
        """Count one forward pass of a stage of so many layers."""
        shape, layout, width = model.shape, assignment.layout, self.workload.value_bytes
        tokens = rows * length
        weights = (layers * model.layer_weights + model.head_weights * has_head) / layout.tensor
        arithmetic = max(2 * weights * tokens / self.flops, weights * width / self.memory_bandwidth)
        pairs = tokens * (length / 2 if context is None else context) * layers / layout.tensor
        attention = 4 * pairs * shape.heads * shape.head_dim / self.flops
        if context is not None:
            key_shards = min(layout.tensor, shape.kv_heads)
            read = tokens * context * layers * model.cache_values * width / key_shards
            attention = max(attention, read / self.memory_bandwidth)
        group = self._links_of(assignment).tensor
        one_layer = self.calibration.launch_seconds if context is None else self.calibration.decode_launch_seconds
        launch = (layers + HEAD_LAUNCHES * has_head) * one_layer
        one_collective = group.latency if context is None else group.decode_latency
        latency = (2 * layers + HEAD_COLLECTIVES * has_head) * one_collective
        hidden = 0.0 if context is not None else min(1.0, (arithmetic + attention) / (launch + latency))
        exchange = 2 * layers * (group.all_reduce(tokens * shape.hidden * width) - group.latency)
        return CallCost(
            arithmetic=arithmetic,
            attention=attention,
            launch=launch * (1 - hidden),
            tensor_parallel=exchange + latency * (1 - hidden),
        )

    def _pipelined(
        self,
        stage: CallCost,
        model: Model,
        assignment: Assignment,
        tokens: float,
        parts: int,
        sends: int = 1,
    ) -> CallCost:
        """Count `parts` micro-batches through all stages; between two the hidden states are sent `sends` times."""
        layout = assignment.layout
        hop = self._links_of(assignment).hop.send(self._sent(model, assignment, tokens)) * sends
        bubbles = layout.pipeline - 1
        return stage * parts + CallCost(pipeline=bubbles * stage.seconds + (parts + bubbles) * hop)

    def _sent(self, model: Model, assignment: Assignment, tokens: float) -> float:
        """Return the bytes of hidden states that one rank sends on: tensor-parallel ranks each send a part."""
        return tokens * model.shape.hidden * self.workload.value_bytes / assignment.layout.tensor

    def _gathered(self, model: Model, assignment: Assignment) -> CallCost:
        """Count the gathering, under ZeRO 3, of a stage's weights layer by layer in every pass."""
        layout = assignment.layout
        if layout.zero_stage < 3 or layout.data == 1:
            return CallCost()
        group = self._links_of(assignment).data
        weights = model.largest_stage(layout).parameters * self.workload.value_bytes / layout.tensor
        latency = group.latency * (max(layout.runs(model.shape.layers)) - 1)
        received = group.all_gather(weights, self.calibration.gather_share) + self._copied(weights)
        return CallCost(zero=latency + received)

    def _hooks(self, model: Model, assignment: Assignment) -> CallCost:
        """Count the hooks of ZeRO 3 around every module, in one pass forward or backward."""
        if assignment.layout.zero_stage < 3:
            return CallCost()
        return CallCost(zero=self.calibration.hook_seconds * max(assignment.layout.runs(model.shape.layers)))

    def _gradient_reduction(self, assignment: Assignment, weights: float, zero_stage: int) -> tuple[float, float]:
        """Return the seconds to sum the gradients of one optimiser step, and then to gather the new weights.

        Every backward pass writes new gradients. DeepSpeed flattens them before it sums; from ZeRO 1 on it copies them
        to a bucket before that, and flattens a rank's own part for its optimiser. ZeRO 1 and 2 keep a copy of that part
        of every sum.
        """
        group, size = self._links_of(assignment).data, weights * self.workload.value_bytes
        micro_batches, calibration = self.workload.micro_batches("train", assignment), self.calibration
        written = self._copied(size) * micro_batches
        if group.size == 1:
            return written, 0.0
        if zero_stage == 0:
            return written + self._copied(size) + group.all_reduce(size), 0.0
        own, times = self._copied(size / group.size), micro_batches if zero_stage >= 2 else 1
        if zero_stage == 3:
            summed, gathered = group.all_gather(size, calibration.scatter_share), 0.0
        else:
            summed = own + group.all_gather(size, calibration.reduce_share)
            gathered = group.all_gather(size, calibration.gather_share)
        return written + (self._copied(2 * size) + summed) * times + own, gathered

    def _copied(self, size: float) -> float:
        """Return the seconds to write `size` bytes into memory that is new to the process."""
        return size / self.calibration.copy_bandwidth

    def _links_of(self, assignment: Assignment) -> LayoutLinks:
        key = assignment.cut[:4]
        if key not in self._links:
            self._links[key] = links_of(assignment.layout, self.cluster)
        return self._links[key]


def _backward(model: Model, forward: CallCost) -> CallCost:
    return CallCost(
        arithmetic=(BACKWARD_OF_ADAPTERS if model.lora.rank else BACKWARD) * forward.arithmetic,
        attention=BACKWARD * forward.attention,
        launch=BACKWARD * forward.launch,
        tensor_parallel=forward.tensor_parallel,
    )
