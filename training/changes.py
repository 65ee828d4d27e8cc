"""Which settings of a run may change later: those that teach nothing freely, lengths by growing, the rest never."""

import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from enum import Enum
from itertools import count
from pathlib import Path
from typing import Any

from inference.disk import writing
from inference.errors import UserError, typed
from training.config import RunConfig
from training.data.rows import count_updates
from training.inputs import link_or_copy, name_base
from training.metrics import Journal
from training.run_directory import RunDirectory, StepDirectory, numbered, read_json, write_directory, write_json
from training.steps import COMPARED, STEPS, Step, step_of


class SettingKind(Enum):
    """What a setting decides, and so whether it may change."""

    FREE = "memory, disk, processes and what lies on each, what is shown: teaches nothing"
    RECORD = "what is recorded while training: teaches nothing, and a fork that asks for it trains the step"
    EVALUATION = "decides which model is left with keep=best, and else is a record"
    LENGTH = "may grow (training/changes.py)"
    LEARNED = "decides what is learned, and stays for the life of a run"


NAMES = {
    SettingKind.FREE: """
        announce method processes threads zero_stage offload generation_tensor_parallel micro_batch_tokens
        generation_batch release_generation gradient_checkpointing checkpoint_every keep_checkpoints reward_url
        reward_timeout reward_retries architecture plan""",
    SettingKind.RECORD: "measure samples_every sample_prompts rollouts_every",
    SettingKind.EVALUATION: "eval_every eval_rows eval_prompts",
    SettingKind.LENGTH: "epochs max_steps iterations",
    SettingKind.LEARNED: """
        model reward_model sft_model trained_reward_model reference_model fork_of seed dtype save_dtype source
        eval_source split held_out split_seed max_prompt_tokens max_response_tokens parent limit comparisons bad_rows
        batch_size
        keep dropout learning_rate schedule warmup weight_decay betas epsilon gradient_clipping master_weights rank
        alpha targets deepspeed token_budget initialize_from layers normalize beta label_smoothing length_normalized
        sft_coefficient by_prompt margin undesirable_weight
        advantage loss prompts_per_iteration samples_per_prompt mini_batches ppo_epochs temperature min_response_tokens
        clip clip_high ratio loss_mean mask_truncated ppo_kl_stop value_clip gamma lam whiten_advantages reward_function
        function url reward_normalization
        score_clip missing_end_penalty critic_warmup align_overflow ema coefficient rows exact old_logprobs centering
        target horizon stop place""",
}
"""Settings of each kind, by the last part of their keys."""
KINDS = {name: kind for kind, names in NAMES.items() for name in names.split()} | {
    "reward.eval_rows": SettingKind.LEARNED,  # the scores are normalised on them
    **dict.fromkeys(("rlhf.fusion", "rlhf.scoring_tensor_parallel", "logging", "evaluation"), SettingKind.FREE),
}
"""The kind of a setting by its name, or by its key or group where the name alone does not tell."""


def kind_of(key: str) -> SettingKind:
    """Look up the kind of a dotted key, which may lead into a mapping. Raises LookupError for one without a kind."""
    parts = key.split(".")
    names = [name for depth, part in enumerate(parts, 1) for name in (".".join(parts[:depth]), part)]
    known = [name for name in names if name in KINDS]
    return KINDS[known[0]]


def teaches(key: str, config: RunConfig) -> bool:
    """Whether what a run with these settings learns, or the model that it leaves, depends on the setting."""
    kind = kind_of(key)
    if key == "rlhf.reward_url":  # from another address come the same scores, from none there are none
        return not config.rlhf.reward_url
    if kind is SettingKind.EVALUATION:
        return getattr(config, key.partition(".")[0]).keep == "best"
    return kind not in (SettingKind.FREE, SettingKind.RECORD)


def is_recorded(key: str) -> bool:
    """Whether the setting says what a step records while it trains."""
    return kind_of(key) in (SettingKind.RECORD, SettingKind.EVALUATION)


def differences(old: dict, new: dict, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ -> both values."""
    changed: dict[str, tuple[Any, Any]] = {}
    for key in {**old, **new}:
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            changed |= differences(before, now, f"{prefix}{key}.")
        elif before != now:
            changed[prefix + key] = (before, now)
    return changed


PLAN = ".longer.json"  # what a change of the settings still has to set aside


def may_have_length(run: RunDirectory, step: Step, before: RunConfig, now: RunConfig) -> bool:
    """Whether the step is at least as long now as before, or has learned nothing yet."""

    def bounds(config: RunConfig) -> list[float]:
        settings = config.of_step(step)
        return [settings.iterations] if step.draws_samples else [settings.epochs, settings.max_steps or math.inf]

    directory = run.step(step)
    if updates := updates_of(directory, before, now):
        return updates[0] <= updates[1]
    is_longer = all(old <= new for old, new in zip(bounds(before), bounds(now), strict=True))
    return is_longer or not (directory.is_finished or numbered(directory.checkpoints))


def updates_of(directory: StepDirectory, before: RunConfig, now: RunConfig) -> tuple[int, int] | None:
    """Count the optimiser steps of a finished step that learns from rows, then and now; None for any other."""
    result = directory.read_result() if directory.is_finished else {}
    if directory.step.draws_samples or "rows" not in result:
        return None
    then = count_updates(result["rows"], before.supervised(directory.step))
    return then, count_updates(result["rows"], now.supervised(directory.step))


def lengthened(run: RunDirectory, before: RunConfig, now: RunConfig) -> dict[Step, dict[str, tuple[Any, Any]]]:
    """Steps that go on to another length -> their lengths, then and now, by key; a step that begins with the model of
    another one of them is trained again instead. Raises UserError for one that cannot go on."""
    lengths: dict[Step, dict[str, tuple[Any, Any]]] = {}
    for key, values in differences(before.model_dump(), now.model_dump()).items():
        if kind_of(key) is SettingKind.LENGTH:
            lengths.setdefault(step_of(key.partition(".")[0]), {})[key] = values
    longer: dict[Step, dict[str, tuple[Any, Any]]] = {}
    for step in sorted(lengths, key=STEPS.index):
        directory, checkpoints = run.step(step), numbered(run.step(step).checkpoints)
        updates = updates_of(directory, before, now)
        if (updates and updates[0] == updates[1]) or longer.keys() & set(steps_under(before, step)):
            continue
        fork = f"rlhf-chat run --from {typed(run.path)} --name NEW"
        if checkpoints:
            state = read_json(directory.checkpoints / str(checkpoints[-1]) / "state.json", "delete that checkpoint")
            if state.get("stopped"):
                raise UserError(
                    f"Step {step.label} of {run.path} was ended by rlhf.kl.stop, so it cannot be longer: a larger one "
                    f"is for another run, as in {fork} --set rlhf.kl.stop={2 * before.rlhf.kl.stop:g}"
                )
            longer[step] = lengths[step]
        elif directory.is_finished:
            options = " ".join(f"--set {key}={new}" for key, (_, new) in lengths[step].items())
            raise UserError(
                f"Step {step.label} of {run.path} has no checkpoint to go on from: train it again in another run, as "
                f"in {fork} {options}"
            )
    return longer


def plan_change(run: RunDirectory, before: RunConfig, now: RunConfig) -> None:
    """Write down what makes way for what is longer, or compared otherwise, and where it is set aside. `make_way` does
    it once the run has the settings `now`, at the next opening if this command is killed."""
    longer = lengthened(run, before, now)
    if not longer and (before.evaluation == now.evaluation or not now.evaluation.prompts):
        return
    finished = [step for step in longer if run.step(step).is_finished]
    later = [step for step in STEPS if longer.keys() & set(steps_under(before, step)) and run.step(step).path.exists()]
    measured = [file for file in measurements(run) if file.exists()]
    earlier = next(name for n in count(1) if not (run.path / (name := f"earlier_{n}")).exists())
    for step in (*finished, *later):
        with run.step(step).locked():
            pass
    plan = {
        "settings": run.config_file.read_text(encoding="utf-8"),
        "place": earlier if finished or later or measured else "",
        "finished": [step.command for step in finished],
        "later": [step.folder for step in later],
        "measured": [str(file.relative_to(run.path)) for file in measured],
        "longer": {s.command: (numbered(run.step(s).checkpoints)[-1], lengths) for s, lengths in longer.items()},
    }
    write_json(run.path / PLAN, plan)


def make_way(run: RunDirectory) -> None:
    """Do what `plan_change` has written down, if the run has got its new settings, from where another command ended."""
    if not (file := run.path / PLAN).exists():
        return
    plan = read_json(file, "delete it")
    if not re.fullmatch(r"(earlier_\d+)?", plan["place"]):
        raise UserError(f"{file} names a place that no run sets anything aside in: delete it.")
    if run.config_file.read_text(encoding="utf-8") != plan["settings"]:
        directories = {step.command: run.step(step) for step in STEPS}
        finished = [directories[command] for command in plan["finished"]]
        later = [directory for directory in directories.values() if directory.path.name in plan["later"]]
        with ExitStack() as held:
            for directory in (*finished, *later):
                held.enter_context(directory.locked())
            _make_way(run, plan, finished, later)
            for command, (number, lengths) in plan["longer"].items():
                note(journal_of(directories[command]), number, {"lengths": lengths, "earlier": plan["place"]})
            for directory in finished:
                directory.result_file.unlink(missing_ok=True)
    file.unlink()


def _make_way(
    run: RunDirectory, plan: dict[str, Any], finished: list[StepDirectory], later: list[StepDirectory]
) -> None:
    target = run.path / plan["place"]
    measured = [file for file in measurements(run) if str(file.relative_to(run.path)) in plan["measured"]]

    def write(directory: Path) -> None:
        (directory / run.config_file.name).write_text(plan["settings"], encoding="utf-8")
        for path in [*(step.path for step in finished), *measured]:
            if path.is_dir():
                unwanted = shutil.ignore_patterns("checkpoints", "best")
                shutil.copytree(path, directory / path.name, ignore=unwanted, copy_function=link_weights)
            else:
                shutil.copyfile(path, directory / path.name)

    if plan["place"]:
        with writing("what there was of the shorter one", run.path):
            write_directory(target, write, replaces=False)
    for directory in later:
        if directory.path.exists():
            os.rename(directory.path, target / directory.path.name)
    for directory in finished:
        for earlier in run.path.glob("earlier_*"):
            name_base(earlier, directory.path, target / directory.path.name)
    for file in measured:
        if file.exists():
            shutil.rmtree(file) if file.is_dir() else file.unlink()


def steps_under(config: RunConfig, step: Step) -> Iterator[Step]:
    """Yield all steps with whose models a step of the run, or one before it, began."""
    for earlier in config.earlier_steps(step):
        yield earlier
        yield from steps_under(config, earlier)


def measurements(run: RunDirectory) -> Iterator[Path]:
    """Yield the files and directories that say how good the models of the run are."""
    for step in COMPARED:
        yield from run.comparison_of(step)
    yield run.path / "evaluations"
    yield run.path / "report.html"


def link_weights(source: str, target: str) -> None:
    """Link weights, into which nobody writes, and copy other files."""
    if source.endswith(".safetensors"):
        link_or_copy(Path(source), Path(target))
    else:
        shutil.copyfile(source, target)


def note(journal: Journal, number: int, values: dict[str, Any]) -> None:
    """Write the line, unless a command that was killed has; one that it has cut short goes."""
    journal.rewind(number)
    if {"number": number, **values} not in journal.read():
        journal.write(number, values)


def journal_of(directory: StepDirectory) -> Journal:
    return Journal(directory.path / "lengthened.jsonl")


def was_lengthened(directory: StepDirectory) -> list[str]:
    """Describe each time, as `lengthened after iteration 10 (rlhf.iterations 10, then 20)`."""
    return [
        f"lengthened after {directory.step.unit} {row['number']} "
        f"({', '.join(f'{key} {old}, then {new}' for key, (old, new) in row['lengths'].items())})"
        for row in journal_of(directory).read()
    ]


def not_planned_so(directory: StepDirectory) -> str:
    """Return what people are told of a step that was lengthened; empty for any other."""
    if not (times := was_lengthened(directory)):
        return ""
    earlier = ", ".join(dict.fromkeys(row["earlier"] for row in journal_of(directory).read() if row["earlier"]))
    return (
        f"This step was {' and '.join(times)}: until then its learning rate was that of a shorter one, so it is not "
        f"what a run planned so gives" + (f"; what there was of the shorter one is in {earlier}." if earlier else ".")
    )
