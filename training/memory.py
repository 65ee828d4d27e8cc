"""How much memory a step needs on one rank, part by part, before anything is loaded.

Counted are weights, gradients, optimiser states, what generation keeps, activations and logits. `NOT_COUNTED` names
what is left out; on small models that is the larger part.

Sources: "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (arXiv 1910.02054, section 3) for
what training holds. Activations: `Shape.activation_values`.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from training.calls import Call, role_of
from training.config import RunConfig
from training.data_settings import DataSettings
from training.deepspeed_config import effective_zero_stage
from training.hybrid_engine.layout import Layout
from training.hybrid_engine.transfers import stays
from training.plan import Assignment, Plan, most_generated
from training.planner.hardware import USABLE_MEMORY
from training.role_settings import OptimizerSettings
from training.shape import Shape
from training.steps import Step

Location = Literal["device", "host"]

NOT_COUNTED = (
    "Python and its libraries, the CUDA context, communication buckets, attention matrices where no fused kernel runs, "
    "fragmentation; on a CPU also the copy of the linear layers that generates, and keys and values kept in fp32"
)
# stage3_max_live_parameters of DeepSpeed: so many weights may be whole at one time under ZeRO stage 3
MAX_LIVE_PARAMETERS = 10**9
# SelectedLogprobs holds per logit: the model's own and their gradient, in fp32 at most; of a part of them as much again
TRAINING_BYTES_PER_LOGIT = 16
# the sampler holds per logit: three fp32 arrays, one cumulative sum in double precision, one copy for the mask
SAMPLING_BYTES_PER_LOGIT = 24
LOADING = "loading"
"""The last word of the phases that come before anything else is held; models are loaded one after the other."""


@dataclass(frozen=True)
class Part:
    """One thing in the memory of one rank. `phase` is empty for what is held all through the step."""

    name: str
    bytes: int
    location: Location = "device"
    phase: str = ""
    first_rank_only: bool = False
    persists: bool = False  # made in its phase, and held from then on to the end of the step


@dataclass(frozen=True)
class StepMemory:
    """What one rank needs in a step."""

    parts: tuple[Part, ...]

    def held(self, *locations: Location) -> int:
        """Bytes held all through: weights, gradients, optimiser states, frozen models, the copy that generates."""
        return sum(part.bytes for part in self.parts if part.location in locations and not part.phase)

    def phases(self, *locations: Location, processes: int = 1) -> dict[str, int]:
        """Bytes that each phase adds while it lasts; what persists after it is left out."""
        added: dict[str, int] = {}
        for part in self.parts:
            if part.phase and part.location in locations and not part.persists:
                times = 1 if part.first_rank_only else processes
                added[part.phase] = added.get(part.phase, 0) + part.bytes * times
        return added

    def peak(self, *locations: Location, processes: int = 1) -> int:
        """Find the most that the first rank, or all processes of a machine, need at one time in `locations`: with
        both of them (no GPU) it is their common peak."""
        phases = self.phases(*locations, processes=processes)
        loading = max((phases.pop(phase) for phase in list(phases) if phase.endswith(LOADING)), default=0)
        persisting = sum(part.bytes for part in self.parts if part.persists and part.location in locations)
        return max(loading, (self.held(*locations) + persisting) * processes + max(phases.values(), default=0))

    def host_peak(self, processes: int) -> int:
        """Find the most main memory that the processes of one machine need together beside their GPUs."""
        return self.peak("host", processes=processes)


def rows_per_micro_batch(token_budget: int, length: int, rows_together: int = 1) -> int:
    """Rows of the longest length in one forward pass; at least `rows_together` (2 for a pair)."""
    return max(token_budget // length // rows_together, 1) * rows_together


def with_slots(
    config: RunConfig, ranks: int, device_bytes: int, memory_of: Callable[[RunConfig], StepMemory]
) -> RunConfig:
    """Set as many slots of generation as a GPU of so many bytes has room for beside all else of step 3.

    `memory_of` gives the memory of step 3 with other settings. Those that name their slots, or have a plan, stay.
    """
    rlhf = config.rlhf
    if rlhf.generation_batch != "auto" or rlhf.plan:
        return config

    def of(slots: int) -> RunConfig:
        return config.model_copy(update={"rlhf": rlhf.model_copy(update={"generation_batch": slots})})

    most = math.ceil(most_generated(rlhf) * rlhf.generation_tensor_parallel / ranks)
    room, slots = int(device_bytes * USABLE_MEMORY), range(1, most + 1)
    return of(max(1, bisect_right(slots, room, key=lambda count: memory_of(of(count)).peak("device"))))


def slots_in(free_bytes: int, shape: Shape, length: int, dtype: torch.dtype) -> int:
    """Samples of so many tokens that can be decoded together in memory that nothing else wants; at least 1."""
    bytes_of_sample = shape.cache_values(length) * dtype.itemsize + shape.vocabulary * SAMPLING_BYTES_PER_LOGIT
    return max(1, int(free_bytes * USABLE_MEMORY) // bytes_of_sample)


def estimate_step_memory(
    step: Step,
    config: RunConfig,
    actor: Shape,
    scorer: Shape,
    dtype: torch.dtype,
    ranks: int,
    locations: tuple[Location, ...] = get_args(Location),
    calls: tuple[Call, ...] = (),
    reference: Shape | None = None,
) -> StepMemory:
    """Estimate the memory of a step on one of `ranks` ranks. `scorer` is the shape of reward model and critic;
    `locations` make up a process's own memory; `calls` are those of an iteration, by default those of the settings;
    `reference` is the shape of an own one, by default the actor's.

    DPO holds no reference: it was asked before the first update, an own one before the actor was loaded.
    """
    reference = reference or actor
    if step.draws_samples:
        plan = Plan.of(config.rlhf, ranks, config.data.longest, calls)
        return _rlhf_memory(config, plan, actor, scorer, reference, dtype, ranks, locations)
    settings = config.supervised(step)
    optimizer, scores = settings.optimizer, step.leaves_scorer
    shape, parameters = (scorer, scorer.scorer_parameters) if scores else (actor, actor.parameters)
    tokens, checkpointing = settings.micro_batch_tokens, optimizer.gradient_checkpointing
    answers = config.rows_of(step).answers
    passes = _pass_parts(shape, config.data, tokens, checkpointing, dtype, "training", answers, not scores)
    training = training_parts("", parameters, shape, optimizer, dtype, ranks, "training")
    saving = _saving_parts(parameters, _adapters(shape, optimizer) or parameters)
    asked = []
    if step.has_reference and config.reference_model:
        share = ranks if optimizer.zero_stage == 3 else 1
        asked = [Part("reference weights", _share(reference.parameters * dtype.itemsize, share), phase=LOADING)]
    return StepMemory((*asked, *training, *passes, *saving))


def _rlhf_memory(
    config: RunConfig,
    plan: Plan,
    actor: Shape,
    scorer: Shape,
    reference: Shape,
    dtype: torch.dtype,
    ranks: int,
    locations: tuple[Location, ...],
) -> StepMemory:
    """Estimate step 3 on the first rank, or, where the settings hold a plan, on the one that needs most: in
    `locations`, and in each location that is not among them."""
    of_ranks = [
        StepMemory(tuple(_rlhf_parts(config, plan, actor, scorer, dtype, rank, reference)))
        for rank in (range(ranks) if config.rlhf.plan else (0,))
    ]

    def fullest(*locations: Location) -> list[Part]:
        memory = max(of_ranks, key=lambda memory: memory.peak(*locations))
        return [part for part in memory.parts if part.location in locations]

    rest = [location for location in get_args(Location) if location not in locations]
    return StepMemory((*fullest(*locations), *(part for location in rest for part in fullest(location))))


def _rlhf_parts(
    config: RunConfig,
    plan: Plan,
    actor: Shape,
    scorer: Shape,
    dtype: torch.dtype,
    rank: int,
    reference: Shape | None = None,
) -> Iterator[Part]:
    """Yield the parts of one rank: those of the roles whose calls it takes part in."""
    rlhf, longest = config.rlhf.as_planned, config.data.longest
    samples = rlhf.prompts_per_iteration * rlhf.samples_per_prompt

    def takes_part(call: str) -> bool:
        return call in plan.assignments and rank in plan[call].layout.mesh

    def here(call: str, shape: Shape) -> Shape:
        """Return the shape of this rank's pipeline stage; `parameters` without an output matrix if the model has a
        score head."""
        with_head = not call.startswith(("reward", "critic"))
        stage = shape.stage(plan[call].layout.stage_cut(rank, shape.layers), with_head)
        return stage if with_head else replace(stage, parameters=stage.scorer_parameters, output_matrix=0)

    def copy(call: str, whole: Shape, use: str) -> Iterator[Part]:
        """Yield the copy of trained weights, beside those that are trained, where `call` has them in another layout."""
        role = role_of(call)
        if not takes_part(call) or stays(plan[f"{role}_train"].layout, plan[call].layout, rank):
            return
        layout, shape = plan[call].layout, here(call, whole)
        adapters = _adapters(shape, getattr(rlhf, role))
        parts = layout.tensor * (layout.data if layout.zero_stage == 3 else 1)
        name = f"{role} weights to {use}, " + _which(layout, rank, parts)
        phase = "generation" if use.startswith("generate") and rlhf.release_generation else ""
        yield Part(name, _share((shape.parameters + adapters) * dtype.itemsize, parts), phase=phase)

    def passes(role: str, whole: Shape) -> list[Part]:
        call = f"{role}_train"
        assignment, rows = plan[call], math.ceil(samples / rlhf.mini_batches)
        tokens = assignment.micro_batch_limit or assignment.together(rows) * longest
        checkpointing = getattr(rlhf, role).gradient_checkpointing
        cut = assignment.layout.stage_cut(rank, whole.layers)
        alive = min(assignment.micro_batches, len(cut.layers) - cut.stage)
        logits, phase = role == "actor" and cut.is_last, f"{role} training"
        return _pass_parts(here(call, whole), config.data, tokens, checkpointing, dtype, phase, 1, logits, alive)

    def trained(role: str, whole: Shape) -> list[Part]:
        call, settings = f"{role}_train", getattr(rlhf, role)
        shape, data = here(call, whole), plan[call].layout.data
        return training_parts(f"{role} ", shape.parameters, shape, settings, dtype, data, f"{role} training")

    if takes_part("actor_train"):
        yield from trained("actor", actor)
    if takes_part("critic_train"):
        yield from trained("critic", scorer)
        yield from passes("critic", scorer)
    yield from copy("critic_score", scorer, "score")
    if takes_part("reward_score"):
        held = here("reward_score", scorer).parameters
        yield from _frozen_parts("reward", held, plan["reward_score"], dtype)
    if rlhf.ema and takes_part("actor_train"):
        shape = here("actor_train", actor)
        weights = (_adapters(shape, rlhf.actor) or shape.parameters) * 4
        location: Location = "device" if rlhf.actor.offload == "none" else "host"
        ranks = plan["actor_train"].layout.data if effective_zero_stage(rlhf.actor, dtype) >= 1 else 1
        yield Part("actor average, fp32", _share(weights, ranks), location)
    if takes_part("reference_score") and not plan.actor_is_reference(rlhf.reference_is_actor):
        held = here("reference_score", reference or actor).parameters
        yield from _frozen_parts("reference", held, plan["reference_score"], dtype)
    scored = plan.assignments.get("actor_score")
    if scored is not None and scored.cut == plan["actor_generate"].cut:
        yield from copy("actor_generate", actor, "generate and score")
    else:
        yield from copy("actor_generate", actor, "generate")
        yield from copy("actor_score", actor, "score")
    if takes_part("actor_generate"):
        layout = plan["actor_generate"].layout
        rows = min(plan["actor_generate"].together(samples), math.ceil(most_generated(rlhf) / layout.data))
        keys_and_values = _share(actor.cache_values(rows * longest) * dtype.itemsize, layout.tensor)
        keeps = not rlhf.release_generation
        cache = "key-value cache, kept while training" if keeps else "key-value cache"
        yield Part(cache, keys_and_values, phase="generation", persists=keeps)
        yield Part("logits to sample", rows * actor.vocabulary * SAMPLING_BYTES_PER_LOGIT, phase="generation")
    if takes_part("actor_train"):
        yield from passes("actor", actor)
        if rank == min(plan["actor_train"].layout.mesh):  # the critic is not saved
            yield from _saving_parts(actor.parameters, _adapters(actor, rlhf.actor) or actor.parameters)


def _frozen_parts(role: str, parameters: int, assignment: Assignment, dtype: torch.dtype) -> list[Part]:
    layout = assignment.layout
    location: Location = "host" if assignment.offload else "device"
    whole, divides = parameters * dtype.itemsize, layout.zero_stage == 3
    where = "whole (first rank)" if divides else "whole"
    held, comes_whole = _share(whole, layout.data if divides else layout.tensor), assignment.offload and not divides
    return [
        Part(f"{role} weights", held, location),
        *([Part(f"{role} weights, for its call", held, phase=f"{role} scoring")] if comes_whole else []),
        Part(f"{role} weights, {where}", whole, "host", f"{role} {LOADING}", first_rank_only=divides),
    ]


def training_parts(
    role: str, parameters: int, shape: Shape, settings: OptimizerSettings, dtype: torch.dtype, ranks: int, phase: str
) -> list[Part]:
    """Count what a trained model holds: weights, gradients and AdamW's states, divided as its ZeRO stage says.

    ZeRO paper, section 3.1: in 16 bit, weights take 2 bytes each and the optimiser 12 (fp32 copy, momentum,
    variance). Our bf16 gradients are summed in fp32: 4 bytes. In fp32: 4 + 4 + 8, and from ZeRO stage 1 on
    DeepSpeed keeps its copy of the weights there too. bf16 without master weights: 2 + 2 + 4, and 2 for DeepSpeed's
    copy from stage 1 on. With LoRA, only adapters have gradients and states.
    """
    stage = effective_zero_stage(settings, dtype)
    adapters = _adapters(shape, settings)
    trained = adapters or parameters
    gradient_bytes = 2 if dtype == torch.float16 else 4
    optimizer_bytes = 8 if dtype == torch.float32 and stage == 0 else 12
    if dtype == torch.bfloat16 and not settings.master_weights:
        gradient_bytes, optimizer_bytes = 2, 4 if stage == 0 else 6
    off_device: Location = "host" if settings.offload != "none" else "device"
    weights_location: Location = "host" if settings.offload == "optimizer+parameters" else "device"
    weights = (parameters + adapters) * dtype.itemsize
    parts = [
        Part(f"{role}weights", _share(weights, ranks if stage == 3 else 1), weights_location),
        # ZeRO-Offload moves gradients to the host as they come (arXiv 2101.06840)
        Part(f"{role}gradients", _share(trained * gradient_bytes, ranks if stage >= 2 else 1), off_device),
        Part(f"{role}optimiser states", _share(trained * optimizer_bytes, ranks if stage >= 1 else 1), off_device),
    ]
    loading = role + LOADING
    if stage < 3:  # each rank reads the whole model into main memory, in fp32, and takes it to its device in `dtype`
        parts.append(Part(f"{role}weights, fp32", parameters * 4, "host", loading))
    else:  # ZeRO 3 divides it while it comes from the first rank's main memory
        whole = parameters * dtype.itemsize
        parts.append(Part(f"{role}weights, whole (first rank)", whole, "host", loading, first_rank_only=True))
        gathered = min(parameters, MAX_LIVE_PARAMETERS) * dtype.itemsize
        parts.append(Part("weights gathered by ZeRO, at most", gathered, phase=phase))
    return parts


def _which(layout: Layout, rank: int, parts: int) -> str:
    """Describe the part of a model that a rank has."""
    stage = f"stage {layout.pipeline_rank(rank) + 1} of {layout.pipeline}" if layout.pipeline > 1 else "whole"
    return stage if parts == 1 else f"1 of {parts} parts"


def _saving_parts(parameters: int, trained: int) -> list[Part]:
    """Count what the first rank gathers in the end, and the whole model that it puts that into; both in fp32."""
    return [
        Part("trained weights, fp32 (first rank)", trained * 4, "host", "saving", first_rank_only=True),
        Part("whole model, fp32 (first rank)", parameters * 4, "host", "saving", first_rank_only=True),
    ]


def _adapters(shape: Shape, settings: OptimizerSettings) -> int:
    return shape.lora_parameters(settings.lora.rank, settings.lora.targets) if settings.lora.rank else 0


def _pass_parts(
    shape: Shape,
    data: DataSettings,
    micro_batch_tokens: int,
    checkpointing: bool,
    dtype: torch.dtype,
    phase: str,
    rows_together: int = 1,
    with_logits: bool = False,
    alive: int = 1,
) -> list[Part]:
    """Count what passes over micro-batches of longest rows add, `alive` at a time: more than one in a pipeline."""
    rows = rows_per_micro_batch(micro_batch_tokens, data.longest, rows_together)
    activations = shape.activation_values(rows * data.longest, checkpointing, alive)
    parts = [Part("activations", activations * dtype.itemsize, phase=phase)]
    if with_logits:  # taken at response positions only
        logits = rows * data.max_response_tokens * shape.vocabulary
        parts.append(Part("logits", logits * TRAINING_BYTES_PER_LOGIT, phase=phase))
    return parts


def _share(bytes_: int, ranks: int) -> int:
    return -(-bytes_ // ranks)
