"""Footprint: the bytes that a plan holds on each rank, part by part, in `training.memory`'s terms.

Calls that share a rank run one after another, so a rank needs what is held all through and the largest of what its
calls hold while they run.
"""

import torch

from inference.errors import UserError
from training.calls import Call, DataflowGraph
from training.memory import (
    LOADING,
    MAX_LIVE_PARAMETERS,
    SAMPLING_BYTES_PER_LOGIT,
    TRAINING_BYTES_PER_LOGIT,
    Part,
    StepMemory,
    training_parts,
)
from training.plan import Assignment, Plan
from training.planner.hardware import GIB, Cluster
from training.planner.workload import Model, Precision, Workload
from training.role_settings import OptimizerSettings

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCORING_BYTES_PER_LOGIT = 6
"""A logit as the model gives it, and once in fp32."""


class Footprints:
    def __init__(self, workload: Workload, graph: DataflowGraph):
        self.workload, self.graph = workload, graph

    def lender(self, call: Call) -> Call | None:
        """Return the training whose weights `call` uses where both have one cut: that of its role; of a reference, the
        actor's if it trains adapters alone."""
        is_actor = call.role == "reference" and self.workload.reference_is_actor
        return self.graph.training_call("actor" if is_actor else call.role)

    def has_own_weights(self, call: Call, plan: Plan) -> bool:
        """Whether the call needs weights beside those of its lender."""
        if call.role == "reference":
            return not plan.actor_is_reference(self.workload.reference_is_actor)
        return self.lender(call) is None or plan.reallocates(self.graph, call)

    def parts(self, call: Call, assignment: Assignment, own_weights: bool) -> tuple[Part, ...]:
        """Return the parts that `call` puts on each rank of its mesh; its weights only where it has some of its own."""
        model = self.workload.models[call.role]
        if call.kind == "train":
            return (*self._trained(call, model, assignment), *self._passes(call, model, assignment))
        divided = assignment.layout.zero_stage == 3
        weights = self._share(model, assignment, divided)
        name = f"{call.role} weights"
        parts: list[Part] = []
        if own_weights and self.graph.training_call(call.role) is not None:
            parts.append(Part(f"{name}, a copy", weights, phase=call.name))
        elif own_weights:
            whole = model.largest_stage(assignment.layout).parameters * self.workload.value_bytes
            parts.append(_loaded(call, whole, divided))
            waits = [Part(f"{name}, on the host", weights, "host"), Part(name, weights, phase=call.name)]
            parts += waits if assignment.offload else [Part(name, weights)]
        if divided:
            parts.append(self._gathered(call, model, assignment))
        return (*parts, *self._passes(call, model, assignment))

    def by_rank(self, plan: Plan) -> dict[int, StepMemory]:
        held: dict[int, list[Part]] = {}
        for call in self.graph.calls:
            parts = self.parts(call, plan[call.name], self.has_own_weights(call, plan))
            mesh = plan[call.name].layout.mesh
            for rank in mesh:
                held.setdefault(rank, []).extend(part for part in parts if rank == mesh[0] or not part.first_rank_only)
        return {rank: StepMemory(tuple(parts)) for rank, parts in sorted(held.items())}

    def require_fit(self, plan: Plan, cluster: Cluster) -> None:
        """Raises UserError that names the fullest rank and its largest part."""
        by_rank = self.by_rank(plan)
        rank, memory = max(by_rank.items(), key=lambda item: item[1].peak("device"))
        if memory.peak("device") > cluster.usable_memory:
            largest = max((part for part in memory.parts if part.location == "device"), key=lambda part: part.bytes)
            raise UserError(
                f"The plan needs {memory.peak('device') / GIB:.1f} GiB on rank {rank}, of which {largest.name} "
                f"{largest.bytes / GIB:.1f} GiB, but {cluster.usable_memory / GIB:.1f} GiB can be used; "
                f"cut the models further, raise micro_batches, or offload frozen roles."
            )
        if (most := self.host_peak(plan, cluster)) > cluster.host_memory:
            raise UserError(
                f"The plan needs {most / GIB:.1f} GiB of a node's main memory, which has "
                f"{cluster.host_memory / GIB:.1f}, to load models and for what is offloaded; take ZeRO stage 3, under "
                f"which one rank reads a model, or fewer ranks of a node."
            )

    def host_peak(self, plan: Plan, cluster: Cluster) -> int:
        """Bytes of main memory of the fullest node: of one role after the other while all its ranks load it, and of
        what stays there."""
        by_node: dict[int, dict[str, int]] = {}
        for rank, memory in self.by_rank(plan).items():
            phases = by_node.setdefault(cluster.node_of(rank), {})
            for phase, bytes_ in {"": memory.held("host"), **memory.phases("host")}.items():
                phases[phase] = phases.get(phase, 0) + bytes_
        return max(max(phases.values()) for phases in by_node.values())

    def _trained(self, call: Call, model: Model, assignment: Assignment) -> list[Part]:
        layout = assignment.layout
        stage = model.largest_stage(layout)
        parameters = -(-stage.parameters // layout.tensor)
        settings = OptimizerSettings(zero_stage=layout.zero_stage, lora=model.lora)
        dtype = DTYPES[self.workload.precision]
        parts = training_parts(f"{call.role} ", parameters, stage.shape, settings, dtype, layout.data, call.name)
        divided = layout.zero_stage == 3
        whole = stage.parameters * (self.workload.value_bytes if divided else 4)
        return [*(part for part in parts if not part.phase.endswith(LOADING)), _loaded(call, whole, divided)]

    def _passes(self, call: Call, model: Model, assignment: Assignment) -> list[Part]:
        """Return activations, keys and values, and logits of the largest pipeline stage."""
        workload, layout, width = self.workload, assignment.layout, self.workload.value_bytes
        rows = -(-workload.rows(call.kind) // (layout.data * assignment.micro_batches))
        if call.kind == "generate":
            rows = workload.rows_together(call.kind, assignment)
        layers = max(layout.runs(model.shape.layers))
        tokens = rows * (workload.prompt_tokens if call.kind == "generate" else workload.longest)
        one_layer = tokens * model.layer_activations // layout.tensor
        logit_bytes = {"generate": SAMPLING_BYTES_PER_LOGIT, "score": SCORING_BYTES_PER_LOGIT}
        logits = rows * model.shape.vocabulary * logit_bytes.get(call.kind, TRAINING_BYTES_PER_LOGIT)
        parts = []
        if call.kind == "train":
            in_flight = min(assignment.micro_batches, layout.pipeline)
            saved = in_flight * self.saved_activations(call, assignment, layers)
            recomputed = one_layer * width * workload.checkpointing
            parts.append(Part("activations", saved + recomputed, phase=call.name))
        else:
            parts.append(Part("activations", (one_layer + tokens * model.shape.hidden) * width, phase=call.name))
        if call.kind == "generate":
            groups = min(assignment.micro_batches, layout.pipeline)
            values = groups * rows * workload.longest * layers * model.cache_values * width
            parts.append(Part("key-value cache", values // min(layout.tensor, model.shape.kv_heads), phase=call.name))
        else:
            logits *= workload.longest_response
        if model.has_vocabulary_head:
            parts.append(Part("logits", logits // layout.tensor, phase=call.name))
        return parts

    def saved_activations(self, call: Call, assignment: Assignment, layers: int) -> int:
        """Return the bytes that a micro-batch saves of so many layers for its backward pass."""
        model, layout = self.workload.models[call.role], assignment.layout
        tokens = -(-self.workload.rows("train") // (layout.data * assignment.micro_batches)) * self.workload.longest
        layer = model.shape.hidden if self.workload.checkpointing else model.layer_activations // layout.tensor
        return tokens * layers * layer * self.workload.value_bytes

    def _share(self, model: Model, assignment: Assignment, divided: bool) -> int:
        layout = assignment.layout
        ranks = layout.tensor * (layout.data if divided else 1)
        return -(-model.largest_stage(layout).parameters * self.workload.value_bytes // ranks)

    def _gathered(self, call: Call, model: Model, assignment: Assignment) -> Part:
        whole = self._share(model, assignment, divided=False)
        limit = MAX_LIVE_PARAMETERS * self.workload.value_bytes
        return Part("weights gathered by ZeRO, at most", min(whole, limit), phase=call.name)


def _loaded(call: Call, bytes_: int, divided: bool) -> Part:
    """Return a role's weights while ranks read them: all the whole model, or, where ZeRO 3 divides it, the first
    alone."""
    name = f"{call.role} weights, whole" + (" (first rank)" if divided else "")
    return Part(name, bytes_, "host", f"{call.role} {LOADING}", first_rank_only=divided)
