"""Opening a run whose lock is held: a new one gets its settings, one that is there keeps its own; what those are."""

import json
from pathlib import Path
from typing import Any

from inference.errors import UserError, typed
from inference.streams import redacted
from training.changes import Kind, differences, kind_of, make_way, may_have_length, plan_change, teaches
from training.config import EMBEDDED_DATA, RunConfig
from training.config_files import as_typed, load_config
from training.data.find_files import find_files, find_set
from training.data.reasoning import require_task
from training.data.sources import parse_source
from training.lineage import inherit, sources_of, trace
from training.merging import merge
from training.paths import found_from_anywhere
from training.run_directory import RunDirectory
from training.steps import STEPS, step_of
from training.trust import made_here, of_reading, require_yes
from training.uses import inherited, of_models, of_training, shared
from training.versions import versions


def settings_of_new_run(
    preset: dict[str, Any],
    files: list[Path],
    overrides: list[str],
    given: dict[str, Any],
    run: RunDirectory | None,
) -> RunConfig:
    """A preset's settings, then files, then `key=value`, then options, and what a parent run hands on."""
    config = load_config(files, overrides, preset, given)
    if config.data.source != EMBEDDED_DATA:  # what a preset says of the embedded dialogues does not hold for other data
        preset = merge(preset, {"evaluation": {"true_score": "none"}, "announce": ""})
        config = load_config(files, overrides, preset, given)
    return inherit(found_from_anywhere(config), run)


def open_run(run: RunDirectory, config: RunConfig | None, trusts: bool = False) -> RunConfig:
    """The settings of `run`; a new one is made from `config`. What they ask for needs a yes (`trusts`) unless it is
    typed now, or was when the run was made here. Raises UserError without it, and where the settings disagree.
    """
    make_way(run)
    stored = run.read_config() if config is None or run.config_file.exists() else None
    config = config or run.read_config()
    wanted, before = of_training(run, config), []
    if stored is not None:
        refuse_others(run, stored, config)
        before = of_training(run, stored)
        require_yes(run.path, [use for use in wanted if use in before], trusts)
    for parent in map(RunDirectory, map(Path, config.begun_from)):
        uses = inherited(parent, wanted) if stored is None else of_reading(parent.path)
        require_yes(parent.path, uses, trusts)
    for parent in {origin.run for origin in trace(sources_of(config))[0]} if stored is None else ():
        require_yes(parent.path, shared(of_models(parent, parent.read_config()), wanted), trusts)
    if config != stored:
        refuse_secret(config.rlhf.reward_url)
        if stored is not None:
            plan_change(run, stored, config)
        run.write_config(config, versions())
        make_way(run)
    made_here(run.path, [use for use in wanted if use not in before])
    return config


def refuse_secret(address: str) -> None:
    """Raise UserError for an address that holds one: settings are kept, and shown."""
    if redacted(address) != address:
        raise UserError(
            f"rlhf.reward_url={redacted(address)} holds a secret, and settings are written into files: put it into an "
            f"environment variable and name that, as in 'https://me:${{REWARD_KEY}}@host' or '?token=${{REWARD_KEY}}'."
        )


def refuse_others(run: RunDirectory, stored: RunConfig, config: RunConfig) -> None:
    """Raise UserError where settings differ that a run keeps for life."""
    found = differences(stored.model_dump(mode="json"), config.model_dump(mode="json"))
    others = {key: values for key, values in found.items() if teaches(key, config) or teaches(key, stored)}
    for step in STEPS:
        if stored.seed_of(step) == config.seed_of(step):
            others.pop(f"{step.command}.seed", None)
    for key in [key for key in others if kind_of(key) is Kind.LENGTH]:
        if may_have_length(run, step_of(key.partition(".")[0]), stored, config):
            del others[key]
    if not others:
        return
    require_sources(config)
    first = dict(list(others.items())[:3])
    differ = ", ".join(f"{as_typed(key)}: {old!r} there, {new!r} now" for key, (old, new) in first.items())
    changed = " ".join(f"--set {typed(f'{key}={text_of(new)}')}" for key, (_, new) in first.items())
    another = f"rlhf-chat run --from {typed(run.path)} --name NEW {changed}{' ...' * (len(others) > 3)}"
    raise UserError(
        f"{run.path} was made with other settings ({differ}); leave these out to go on with the run's own, or "
        f"{'give a new run another name' if 'model' in others else f'begin another run: {another}'}."
    )


def text_of(value: Any) -> str:
    """As --set takes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def require_sources(config: RunConfig) -> None:
    """Raise UserError where a data source is not there: a mistyped one is not another setting."""
    for text in (*config.data.sources, *config.data.eval_sources):
        source = parse_source(text)
        if source.is_task:
            require_task(source.name)
        elif text != EMBEDDED_DATA and not source.is_hub_id and find_set(source.name) is None:
            find_files(source.copy or source.path)
