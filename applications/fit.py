"""Does a run fit this machine, and if not, what would? Estimated from shapes: no weights, no hub, no data."""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from applications.machine_report import GIB, nearest_existing
from applications.preset_store import is_preset_architecture, known_architecture, smaller_presets
from inference.errors import UserError
from inference.families import config_of, require_supported_family
from inference.model_files import require_usable
from training.calls import Call
from training.config import RunConfig
from training.config_files import validate_config
from training.distributed import require_gpus
from training.memory import Location, StepMemory, estimate_step_memory, with_slots
from training.merging import merge
from training.metrics import size
from training.models.loading import TORCH_DTYPES, require_scorer_family, resolve_dtype
from training.models.policy import keep_layers
from training.plan import Plan
from training.role_settings import OptimizerSettings
from training.run_directory import read_json
from training.shape import Shape
from training.step3_rlhf.planned import expects_exactness, iteration_calls, require_runnable
from training.steps import STEPS, Step

CLUSTER_GPU_BYTES = 80 * GIB  # of the GPUs that a way out speaks of where this machine has none
TENSOR_DEGREES = (1, 2, 4, 8)  # of tensor parallelism within a node of GPUs
PROCESS_BYTES = 500 * 2**20  # what torch, transformers and DeepSpeed take in a process


@dataclass(frozen=True)
class Machine:
    cores: int
    memory: int  # bytes of main memory, or what the container may use of it
    gpus: tuple[tuple[str, int], ...] = ()  # names and bytes

    @classmethod
    def here(cls) -> "Machine":
        limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
        for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # cgroup v2, v1
            try:
                limits.append(int(Path(file).read_text(encoding="utf-8")))
            except (OSError, ValueError):  # no such file, or "max"
                continue
        devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        gpus = tuple((device.name, device.total_memory) for device in devices)
        return cls(os.cpu_count() or 1, min(limits), gpus)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.gpus else "cpu")

    @property
    def locations(self) -> tuple[Location, ...]:
        """What a process's own memory holds: without a GPU, what is offloaded to the host lies there too."""
        return ("device",) if self.gpus else ("device", "host")

    def per_process(self, processes: int) -> int:
        return min(memory for _, memory in self.gpus) if self.gpus else self.memory // processes

    def require_room(self, processes: int) -> None:
        """Raise UserError where so many processes cannot be: without a GPU, or memory for the libraries, of each."""
        require_gpus(processes)
        most = self.memory // PROCESS_BYTES
        if processes > most:
            raise UserError(
                f"{processes} processes take {size(processes * PROCESS_BYTES)} before any model, and this machine has "
                f"{size(self.memory)}: use --processes {most} at most."
            )

    def __str__(self) -> str:
        gpus = f", {len(self.gpus)} x {self.gpus[0][0]} with {size(self.gpus[0][1])}" if self.gpus else ", no GPU"
        return f"{self.cores} cores, {size(self.memory)} memory{gpus}"


@dataclass(frozen=True)
class Outlook:
    """One configuration on a number of ranks, with the shapes that are known."""

    config: RunConfig
    steps: tuple[Step, ...]
    ranks: int
    machine: Machine
    actor: Shape | None
    scorer: Shape | None
    reference: Shape | None = None  # of an own reference model; None also where its size is not known

    @classmethod
    def of(cls, config: RunConfig, steps: Sequence[Step]) -> "Outlook":
        """Look at this machine; step 3 has the slots of generation that its GPUs have room for. Raises UserError where
        the plan of the settings cannot run."""
        outlook = cls(config, tuple(steps), config.processes, Machine.here(), *known_shapes(config))
        drawn = next((step for step in steps if step.draws_samples), None)
        if drawn is not None:
            require_runnable(config, outlook.ranks, outlook.actor, outlook.scorer, outlook.dtype, outlook.reference)
            if outlook.machine.gpus and outlook.memory(drawn) is not None:

                def memory_of(changed: RunConfig) -> StepMemory:
                    memory = replace(outlook, config=changed).memory(drawn)
                    assert memory is not None
                    return memory

                room = outlook.machine.per_process(config.processes)
                config = with_slots(config, outlook.ranks, room, memory_of)
        return replace(outlook, config=config)

    @property
    def dtype(self) -> torch.dtype:
        return resolve_dtype(self.config.dtype, self.machine.device)

    @property
    def calls(self) -> tuple[Call, ...]:
        """What an iteration of step 3 is expected to run."""
        rlhf, dtype = self.config.rlhf, self.dtype
        return iteration_calls(rlhf, dtype, expects_exactness(rlhf, dtype, self.machine.device))

    @property
    def plan(self) -> Plan:
        """Raises UserError where the settings do not fit the ranks."""
        return Plan.of(self.config.rlhf, self.ranks, self.config.data.longest, self.calls)

    def shape_of(self, step: Step) -> Shape | None:
        return self.scorer if step.leaves_scorer else self.actor

    def memory(self, step: Step) -> StepMemory | None:
        """None where a shape that the step needs is unknown."""
        rlhf = self.config.rlhf
        scorers = [self.scorer] if rlhf.has_critic or rlhf.has_reward_model else []
        needed = [self.actor, *scorers] if step.draws_samples else [self.shape_of(step)]
        needed += [self.reference] * bool(step.compared_with and self.config.reference_model)
        if any(shape is None for shape in needed):
            return None
        actor, scorer = self.actor or self.scorer, self.scorer or self.actor  # what a step does not need is not read
        assert actor is not None and scorer is not None
        of_run = self.dtype, self.ranks, self.machine.locations, self.calls
        return estimate_step_memory(step, self.config, actor, scorer, *of_run, self.reference)

    def largest(self) -> tuple[Step, int] | None:
        """The step whose processes need most, and their bytes."""
        estimates = [(step, memory) for step in self.steps if (memory := self.memory(step)) is not None]
        peaks = [(step, memory.peak(*self.machine.locations)) for step, memory in estimates]
        return max(peaks, key=lambda peak: (peak[1], peak[0].number), default=None)

    def with_settings(self, values: dict[str, Any], ranks: int = 0) -> "Outlook":
        config = validate_config(merge(self.config.model_dump(), values))
        return replace(self, config=config, ranks=ranks or self.ranks)


def check_fits(config: RunConfig, steps: Sequence[Step]) -> None:
    """Raise UserError where what a step holds all through is more than the memory of this machine.

    Only the clearly impossible: phases such as generation and backward passes are not counted.
    """
    outlook = Outlook.of(config, steps)
    for step in steps:
        memory = outlook.memory(step)
        if memory is None:
            continue
        held, has = memory.held(*outlook.machine.locations), outlook.machine.per_process(config.processes)
        if held > has:
            raise UserError(
                f"Step {step.label} cannot run here: weights, gradients and optimiser states take about "
                f"{size(held)} per process, {_has(outlook)} {size(has)}; ways out: {ways_out(outlook)}."
            )


def known_shapes(config: RunConfig) -> tuple[Shape | None, Shape | None, Shape | None]:
    """The shapes of the actor, of reward model and critic, and of the settings' own reference model; None where there
    is no such model, or its size is unknown without the hub."""
    actor = find_shape(config.actor_source, config.architecture.get("model"))
    layers, scores = config.scorer_layers, config.needs_scorer
    if config.scorer_source == config.actor_source and not layers and not scores:
        scorer = actor
    else:
        scorer = find_shape(config.scorer_source, config.architecture.get("reward_model"), layers, scores)
    own = config.reference_model
    return actor, scorer, find_shape(own, config.architecture.get("reference_model")) if own else None


def find_shape(model: str, given: dict[str, Any] | None, layers: int = 0, scores: bool = False) -> Shape | None:
    """Read a local directory's config.json, a preset with this model, or the user's own `given` values; else None.

    `layers` keeps only the first so many; 0 keeps all. Raises UserError for a family that cannot be used, or that has
    no head to score with where the model `scores`.
    """
    file = Path(model).expanduser() / "config.json"
    if file.is_file():
        require_usable(file.parent)
        values: dict[str, Any] | None = read_json(file, "fetch or train the model again")
    else:
        values = known_architecture(model)
        if values is None and given is not None and not is_preset_architecture(given):
            values = given  # a preset's values with another model's name are left over from before the name was changed
    if values is None:
        return None
    config = config_of(values)
    require_supported_family(config)
    if scores:
        require_scorer_family(config)
    if layers:
        keep_layers(config, layers)
    return Shape.of(config)


def verdict(outlook: Outlook, run_directory: Path) -> str:
    config, machine, largest = outlook.config, outlook.machine, outlook.largest()
    estimates = [memory for step in outlook.steps if (memory := outlook.memory(step)) is not None]
    if largest is None or len(estimates) < len(outlook.steps):
        unknown = config.model if outlook.actor is None else config.scorer_source
        if outlook.actor is not None and config.reference_model and outlook.reference is None:
            unknown = config.reference_model
        return f"Verdict: unknown: the size of {unknown} is not known without the hub (a local directory would tell)"
    (step, need), has = largest, machine.per_process(config.processes)
    host = max(memory.host_peak(config.processes) for memory in estimates)
    disk, free = disk_needed(outlook), shutil.disk_usage(nearest_existing(run_directory)).free
    if need > has:
        why = f"step {step.label} needs about {size(need)} per process, {_has(outlook)} {size(has)}"
        ways = ways_out(outlook)
    elif machine.gpus and host > machine.memory:
        why = f"loading, offloading and saving take up to {size(host)} of main memory, this machine has "
        why += size(machine.memory)
        ways = "ZeRO stage 3 (one rank reads the model), LoRA, no offload, fewer processes, or a smaller model"
    elif disk > free:
        why = f"the run directory takes up to {size(disk)}, {size(free)} are free"
        ways = "another disk, or fewer checkpoints (checkpoint_every=0)"
    else:
        return f"Verdict: fits: step {step.label} needs most, about {size(need)} per process of {size(has)}"
    return f"Verdict: does not fit here: {why}; ways out: {ways}"


def _has(outlook: Outlook) -> str:
    if outlook.machine.gpus:
        return "a GPU here has"
    processes = outlook.config.processes
    return "this machine has" if processes == 1 else f"this machine has for each of {processes} processes"


def ways_out(outlook: Outlook) -> str:
    """Changes that make the largest step fit, each with what it then needs; in the end always a smaller model."""
    has = outlook.machine.per_process(outlook.config.processes)
    changes = []
    for text, changed in _changes(outlook):
        largest = changed.largest()
        if largest is not None and largest[1] <= has:
            changes.append(f"{text} ({size(largest[1])})")
    return "; ".join([*changes, *_more_ranks(outlook), _smaller_model(outlook, has)])


def _changes(outlook: Outlook) -> Iterator[tuple[str, Outlook]]:
    """What can be changed on the same machine, one thing at a time, then together."""

    def on_all(values: dict[str, Any]) -> dict[str, Any]:
        return {**_on_supervised(values), "rlhf": {"actor": values, "critic": values}}

    lora = merge(on_all({"lora": {"rank": 16}}), {"rlhf": {"scoring_tensor_parallel": {"reference": 1}}})
    short = {"data": {"max_prompt_tokens": 128, "max_response_tokens": 128}}
    small = {step.command: {"micro_batch_tokens": 256} for step in STEPS}
    frugal = merge(merge(short, small), on_all({"gradient_checkpointing": True}))
    yield "shorter rows, small micro-batches and gradient checkpointing", outlook.with_settings(frugal)
    if outlook.machine.gpus:
        yield "offload=optimizer", outlook.with_settings(on_all({"zero_stage": 2, "offload": "optimizer"}))
    yield "LoRA (rlhf.actor.lora.rank=16 and its like)", outlook.with_settings(lora)
    yield "LoRA with shorter rows, small micro-batches and checkpointing", outlook.with_settings(merge(lora, frugal))


def _on_supervised(values: dict[str, Any]) -> dict[str, Any]:
    return {step.command: {"optimizer": values} for step in STEPS if not step.draws_samples}


def _more_ranks(outlook: Outlook) -> list[str]:
    """The fewest ranks on which the run fits with ZeRO stage 3, each with a GPU like those here (else 80 GiB); where
    the actor does not fit whole on one to generate, tensor-parallel."""
    gpu = min((memory for _, memory in outlook.machine.gpus), default=CLUSTER_GPU_BYTES)
    three = {"zero_stage": 3}
    four_roles = dict.fromkeys(("actor", "critic", "reference", "reward"), three)
    divided = {
        "dtype": str(outlook.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp"),
        "processes": 1,
        **_on_supervised(three),
        "rlhf": {
            **four_roles,
            "scoring_tensor_parallel": dict.fromkeys(("reference", "reward", "critic"), 1),
            "fusion": {"mode": "auto", "rows": 0},
            "plan": "",
        },
    }
    ranks = 1
    while ranks <= 1024:
        for tensor in (degree for degree in TENSOR_DEGREES if degree <= ranks):
            cut = {"rlhf": {"generation_tensor_parallel": tensor}}
            changed = outlook.with_settings(merge(divided, cut), ranks)
            peaks = [memory.peak("device") for step in outlook.steps if (memory := changed.memory(step)) is not None]
            if peaks and max(peaks) <= gpu:
                name = "1 GPU" if ranks == 1 else f"{ranks} GPUs"
                how = "" if tensor == 1 else f" and rlhf.generation_tensor_parallel={tensor}"
                return [f"{name} of {size(gpu)} with ZeRO stage 3{how} ({size(max(peaks))} each)"]
        ranks *= 2
    return []


def _smaller_model(outlook: Outlook, has: int) -> str:
    for name in smaller_presets(outlook.config.model):
        actor = find_shape(name, None)
        changed = replace(outlook, actor=actor, reference=None)
        largest = changed.largest()
        if largest is not None and largest[1] <= has:
            return f"a smaller model (--model {name}: {size(largest[1])} with these settings)"
    return "a smaller model"


def disk_needed(outlook: Outlook) -> int:
    """Bytes of the finished models and of the stored checkpoints, one more while a new one is being written.

    Models of unknown shape are left out.
    """
    config, total = outlook.config, 0
    for step in outlook.steps:
        shape, ema = outlook.shape_of(step), step.draws_samples and bool(config.rlhf.ema)
        if step.draws_samples:
            every, keep = config.rlhf.checkpoint_every, config.rlhf.keep_checkpoints
            trained = [(outlook.actor, config.rlhf.actor)]
            trained += [(outlook.scorer, config.rlhf.critic)] * config.rlhf.has_critic
        else:
            settings = config.supervised(step)
            every, keep = settings.checkpoint_every, settings.keep_checkpoints
            trained = [(shape, settings.optimizer)]
        models = 1 + ema
        if shape is not None:
            weights = _trained_parameters(shape, trained[0][1])
            total += models * shape.parameters * TORCH_DTYPES[config.save_dtype].itemsize
            if ema and every:
                total += (keep + 1) * weights * 4
            if config.of_step(step).keep == "best":  # that of each checkpoint, the newest, a new one
                total += (keep * bool(every) + 2) * weights * (models * 4 + outlook.dtype.itemsize)
        for trained_shape, optimizer in trained:
            if every and trained_shape is not None:
                weights = _trained_parameters(trained_shape, optimizer)
                total += (keep + 1) * weights * (outlook.dtype.itemsize + 12)  # with the optimiser's three fp32 numbers
    return total


def _trained_parameters(shape: Shape, settings: OptimizerSettings) -> int:
    lora = settings.lora
    return shape.lora_parameters(lora.rank, lora.targets) if lora.rank else shape.parameters
