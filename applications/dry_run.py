"""What a run would do, without doing it: nothing is written; weights, hub and data are not needed.

Plain text of at most 100 columns, or as many as the terminal has (paths may be longer).
"""

import math
import shlex
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

from applications.fit import Outlook, disk_needed, verdict
from applications.launch import stage_command
from applications.machine_report import nearest_existing
from applications.profile import expected_time
from inference.streams import USUAL_COLUMNS, columns, redacted
from training.config import RunConfig
from training.memory import LOADING, NOT_COUNTED, rows_per_micro_batch
from training.metrics import size
from training.plan import Assignment, mesh_text, slots
from training.rlhf_settings import RLHFSettings
from training.role_settings import FrozenSettings, OptimizerSettings
from training.shape import Shape
from training.steps import ANSWERS, Step

_PHASE_ORDER = {"": 0, LOADING: 1, "generation": 2, "scoring": 3, "training": 4, "saving": 5}


def dry_run(config: RunConfig, steps: Sequence[Step], run_directory: Path) -> str:
    """The text that `--dry-run` prints: models, batches, optimiser steps, memory, disk, commands and a verdict."""
    outlook = Outlook.of(config, steps)
    lines = ["Dry run: nothing is written, nothing is fetched, nothing is started.", ""]
    lines += _machine_and_models(outlook)
    for step in steps:
        settings = _rlhf_step(outlook) if step.draws_samples else _supervised_step(outlook, step)
        title = f"Step {step.label}: {step.title}"
        lines += ["", title, *settings, *_evaluations(outlook, step), *_time(outlook, step), *_memory(outlook, step)]
    lines += ["", *_where(outlook, run_directory), "", "Commands"]
    for step in steps:
        lines += shell_lines(stage_command(step.folder, run_directory, config.processes))
    lines += ["", *wrap(f"Memory does not count {NOT_COUNTED}.")]
    if any(step.draws_samples for step in steps) and (warning := config.idle_warning(outlook.ranks)):
        lines += ["", *wrap(warning)]
    lines += ["", *wrap(verdict(outlook, run_directory))]
    return "\n".join(lines)


def _machine_and_models(outlook: Outlook) -> list[str]:
    config, dtype = outlook.config, str(outlook.dtype).removeprefix("torch.")
    return [
        _line("this machine", str(outlook.machine)),
        _line("processes", f"{config.processes} on this machine, computing in {dtype}"),
        _line("actor", f"{config.sft_model or config.model}, {_parameters(outlook.actor)}"),
        *_scorers(outlook),
        _line(
            "data",
            ", ".join(config.data.sources) + (f", at most {config.data.limit:,} rows" if config.data.limit else ""),
        ),
        *([_line("evaluation data", ", ".join(config.data.eval_sources))] if config.data.eval_sources else []),
        _line("lengths", f"prompt {config.data.max_prompt_tokens} + response {config.data.max_response_tokens} tokens"),
    ]


def _scorers(outlook: Outlook) -> list[str]:
    """What reward model and critic start from, those that there are."""
    rlhf = outlook.config.rlhf
    if not any(step.leaves_scorer or step.draws_samples for step in outlook.steps):
        return []
    roles = ["reward"] * rlhf.has_reward_model + ["critic"] * rlhf.has_critic
    source = f"{outlook.config.scorer_source}, {_parameters(outlook.scorer, scorer=True)}"
    return [_line(", ".join(roles), source)] if roles else []


def _supervised_step(outlook: Outlook, step: Step) -> list[str]:
    settings = outlook.config.supervised(step)
    learned = outlook.config.rows_of(step)
    unit, together = outlook.config.unit_of(step), learned.answers
    reference = outlook.config.reference_model or "the model before its first update"
    rows = rows_per_micro_batch(settings.micro_batch_tokens, outlook.config.data.longest, together) // together
    if settings.max_steps:
        updates = f"{settings.max_steps:,}, or {settings.epochs} x {unit} / {settings.batch_size} if that is less"
    else:
        updates = f"{settings.epochs} x {unit} / {settings.batch_size} ({unit} are known once the data is prepared)"
    tokens = settings.batch_size * together * outlook.config.data.longest
    return [
        _line("trains", _training(settings.optimizer)),
        *([_line("reference", f"{reference}, asked once")] if step.has_reference else []),
        *([_line("reference point", "a forward pass more for each answer")] if learned is ANSWERS else []),
        _line("batch", _batch(settings.batch_size, rows, outlook, unit)),
        _line("optimiser steps", updates),
        *_compute(outlook.shape_of(step), settings.optimizer, tokens),
    ]


def _rlhf_step(outlook: Outlook) -> list[str]:
    rlhf, plan = outlook.config.rlhf.as_planned, outlook.plan
    samples = rlhf.prompts_per_iteration * rlhf.samples_per_prompt
    mini_batch = math.ceil(samples / rlhf.mini_batches)
    updates = rlhf.iterations * rlhf.ppo_epochs * rlhf.mini_batches
    actor_updates = max(rlhf.iterations - rlhf.critic_warmup, 0) * rlhf.ppo_epochs * rlhf.mini_batches
    rows = rows_per_micro_batch(rlhf.micro_batch_tokens, outlook.config.data.longest)
    steps = f"critic {updates:,}, actor {actor_updates:,}" if actor_updates != updates else f"{updates:,} of each"
    if not rlhf.has_critic:
        steps = f"{updates:,}"
    if rlhf.mask_truncated or rlhf.ppo_kl_stop:
        steps = f"at most {steps}"
    reference = _frozen(rlhf.reference, rlhf.scoring_tensor_parallel.reference)
    at_a_time = f"{min(slots(rlhf), math.ceil(samples / outlook.ranks))} at a time on a rank"
    batch = _batch(mini_batch, rows, outlook, "samples")
    if rlhf.plan:
        at_a_time, batch = "where the plan says", f"{mini_batch} samples, in the micro-batches of the plan"
    if not rlhf.has_reference:
        reference = "none: rlhf.kl has no coefficient, target or stop (measure=true brings one back)"
    elif outlook.plan.actor_is_reference(rlhf.reference_is_actor):
        reference = "the actor with its adapters off"
    elif own := outlook.config.reference_model:
        reference = f"{own}, {_parameters(outlook.reference)}, {reference}"
    return [
        _line("actor", _training(rlhf.actor) + (f", average with decay {rlhf.ema:g}" if rlhf.ema else "")),
        _line("critic", _training(rlhf.critic) if rlhf.has_critic else f"none: advantages by {rlhf.advantage}"),
        _line("reference", reference),
        *[_line("reward", line) for line in _rewards(rlhf)],
        _line(
            "iteration",
            f"{rlhf.prompts_per_iteration} prompts x {rlhf.samples_per_prompt} = {samples} samples, {at_a_time}",
        ),
        _line("mini-batch", batch),
        _line(
            "optimiser steps",
            f"{steps}: {rlhf.iterations} iterations x {rlhf.ppo_epochs} PPO epochs x {rlhf.mini_batches} mini-batches",
        ),
        *_compute(outlook.actor, rlhf.actor, mini_batch * outlook.config.data.longest),
        *(_line(name, described(assignment)) for name, assignment in plan.assignments.items() if rlhf.plan),
    ]


def _evaluations(outlook: Outlook, step: Step) -> list[str]:
    config = outlook.config
    if step.draws_samples:
        count, prompts = config.rlhf.evaluations, config.rlhf.eval_prompts
        text = (
            f"{count} x {prompts} held-out prompts: at the start, every {config.rlhf.eval_every} iterations, at the end"
        )
        lines = [text] * bool(count)
    else:
        settings = config.supervised(step)
        every = f", every {settings.eval_every} optimiser steps" if settings.eval_every else ""
        lines = [f"at the start{every} and at the end: {settings.eval_rows} held-out {config.rows_of(step).unit}"]
        lines += ["the texts that people rated, where the data has them"] * step.leaves_scorer
    if step.compared_with and config.evaluation.prompts:
        lines += [
            f"in the end: {config.evaluation.prompts} prompts, answered also by the {step.compared_with.name} model"
        ]
    return [_line("evaluations" if line is lines[0] else "", line) for line in lines]


def described(assignment: Assignment) -> str:
    layout = assignment.layout
    degrees = {"data": layout.data, "tensor": layout.tensor, "pipeline": layout.pipeline}
    parts = [f"{name} {degree}" for name, degree in degrees.items() if degree > 1]
    parts += [f"ZeRO stage {layout.zero_stage}"] if layout.zero_stage else []
    parts += [f"micro-batches {assignment.micro_batches}"] if not assignment.micro_batch_limit else []
    return f"on {'rank' if len(layout.mesh) == 1 else 'ranks'} {', '.join([mesh_text(layout.mesh), *parts])}"


def _rewards(rlhf: RLHFSettings) -> list[str]:
    weights = rlhf.reward_weights
    sources = [_frozen(rlhf.reward, rlhf.scoring_tensor_parallel.reward)] if rlhf.has_reward_model else []
    sources += [f"{function.weight:g} x {function.text}" for function in rlhf.asked_functions]
    sources += [f"{weights.url:g} x {redacted(rlhf.reward_url)}"] if rlhf.reward_url and weights.url else []
    return sources


def _training(settings: OptimizerSettings) -> str:
    what = f"LoRA adapters of rank {settings.lora.rank}" if settings.lora.rank else "all weights"
    rate = settings.adapter_learning_rate if settings.lora.rank else settings.learning_rate
    extras = [f"learning rate {rate:g}", f"ZeRO stage {settings.zero_stage}"]
    if settings.offload != "none":
        extras.append(f"offload of {settings.offload.replace('+', ' and ')}")
    if settings.gradient_checkpointing:
        extras.append("gradient checkpointing")
    return ", ".join([what, *extras])


def _frozen(settings: FrozenSettings, tensor: int) -> str:
    where = "divided over the ranks (ZeRO stage 3)" if settings.zero_stage == 3 else "whole on each rank"
    if tensor > 1:
        where = f"tensor-parallel, 1 of {tensor} parts on each rank"
    return f"frozen, {where}" + (", offload of parameters" if settings.offload == "parameters" else "")


def _batch(batch: int, rows: int, outlook: Outlook, unit: str) -> str:
    """The arithmetic for rows of the longest length; shorter ones share a micro-batch with more."""
    share = math.ceil(batch / outlook.ranks)
    rows = min(rows, share)
    accumulation = math.ceil(share / rows)
    equal = "=" if rows * accumulation * outlook.ranks == batch else "<="
    return (
        f"{batch} {unit} {equal} {rows} in a micro-batch x {accumulation} accumulated x {outlook.ranks} ranks "
        f"({unit} of {outlook.config.data.longest} tokens)"
    )


def _compute(shape: Shape | None, settings: OptimizerSettings, tokens: int) -> list[str]:
    """6 operations per weight and token, 8 with recomputation (arXiv 2104.04473, section 5, without attention)."""
    if shape is None:
        return []
    operations = (8 if settings.gradient_checkpointing else 6) * shape.parameters * tokens
    amount, unit = (operations / 1e15, "PFLOP") if operations >= 1e15 else (operations / 1e12, "TFLOP")
    text = f"{amount:,.0f}" if amount >= 10 else f"{amount:.1g}" if amount < 0.1 else f"{amount:.1f}"
    return [_line("compute", f"at most {text} {unit} an optimiser step, attention not counted")]


def _time(outlook: Outlook, step: Step) -> list[str]:
    expected = expected_time(outlook, step)
    if expected is None:
        return [_line("time", "unknown; `rlhf-chat profile` measures this machine, `rlhf-chat plan` costs others")]
    unit = "an iteration" if step.draws_samples else "an optimiser step"
    text = f"about {rough_duration(expected.seconds)} {unit}"
    if len(expected.by_kind) > 1:
        text += f" ({', '.join(f'{kind} {rough_duration(s)}' for kind, s in expected.by_kind.items())})"
    if step.draws_samples:
        text += f", {rough_duration(expected.seconds * outlook.config.rlhf.iterations)} for all"
        if expected.evaluations:
            text += f", at most {rough_duration(expected.evaluations)} for evaluations"
    lines = wrap(f"{text}, every row as long as it may be; rates: {expected.source}", len(_line("", "")))
    return [_line("time", lines[0]), *(_line("", line) for line in lines[1:])]


def rough_duration(seconds: float) -> str:
    """`40 ms`, `0.4 s`, `12 s`, `3.5 min`, `2.1 h`."""
    for size_, unit in ((1e-3, "ms"), (1.0, "s"), (60.0, "min"), (3600.0, "h")):
        amount = seconds / size_
        if amount < 100 or unit == "h":
            break
    return f"{amount:.1f} {unit}" if amount < 9.95 else f"{amount:.0f} {unit}"


def _memory(outlook: Outlook, step: Step) -> list[str]:
    memory = outlook.memory(step)
    if memory is None:
        return [_line("memory", "unknown without the hub")]
    lines = ["  memory of one process"]
    on_host = {"host": " in main memory"} if outlook.machine.gpus else {}
    for part in sorted(memory.parts, key=lambda part: _PHASE_ORDER[part.phase.rpartition(" ")[2]]):
        if part.bytes:
            during = f"{part.phase}: " if part.phase else ""
            lines.append(f"  {size(part.bytes):>12}  {during}{part.name}{on_host.get(part.location, '')}")
    where = " of the GPU" if outlook.machine.gpus else ""
    lines.append(f"  {size(memory.peak(*outlook.machine.locations)):>12}  most at one time{where}")
    if outlook.machine.gpus:
        host = memory.host_peak(outlook.config.processes)
        lines.append(f"  {size(host):>12}  most at one time of main memory, all processes together")
    return lines


def _where(outlook: Outlook, run_directory: Path) -> list[str]:
    free = size(shutil.disk_usage(nearest_existing(run_directory)).free)
    is_known = all(outlook.memory(step) is not None for step in outlook.steps)
    needed = f"up to {size(disk_needed(outlook))}" if is_known else "an unknown amount"
    state = "there already" if run_directory.exists() else "to be made"
    return [
        _line("run directory", f"{run_directory} ({state})"),
        *(_line(f"step {step.label}", str(run_directory / step.folder / "model")) for step in outlook.steps),
        _line("disk", f"{needed} for models and checkpoints, {free} free"),
    ]


def _parameters(shape: Shape | None, scorer: bool = False) -> str:
    if shape is None:
        return "parameters unknown without the hub"
    count = shape.scorer_parameters if scorer else shape.parameters
    return f"{count / 1e9:.2f} B parameters" if count >= 1e9 else f"{count / 1e6:.1f} M parameters"


def _line(name: str, text: str) -> str:
    return f"  {name:<17}{text}"


def shell_lines(command: Sequence[str]) -> list[str]:
    """A command to copy: between its words it goes on in the next line, as a shell reads it."""
    lines = [" "]
    for word in map(shlex.quote, command):
        if lines[-1].strip() and len(lines[-1]) + len(word) + len("  \\") > columns():
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {word}"
    return lines


def wrap(text: str, indent: int = 0) -> list[str]:
    """Lines for a terminal, `indent` columns narrower."""
    width = max(20, min(columns(), USUAL_COLUMNS) - indent)
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
