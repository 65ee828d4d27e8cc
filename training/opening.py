"""Opening a run whose lock is held: a new one gets its settings, an existing one keeps its own; what those are."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from inference.disk import writing
from inference.errors import UserError, typed
from inference.streams import redacted, redacted_arguments
from training.changes import SettingKind, differences, kind_of, make_way, may_have_length, plan_change, teaches
from training.config import RunConfig
from training.config_files import as_typed, load_config, with_absolute_paths
from training.data.find_files import find_files, find_set
from training.data.reasoning import dataset_of
from training.data.sources import parse_source
from training.data_settings import EMBEDDED_DATA
from training.inputs import CODE, code_of
from training.lineage import inherit, sources_of, trace
from training.merging import merge
from training.metrics import read_line
from training.run_directory import RunDirectory, processor, versions
from training.steps import STEPS, Step, step_of
from training.trust import inherited, made_here, of_models, of_reading, of_training, require_yes, shared


def settings_of_new_run(
    preset: dict[str, Any],
    files: list[Path],
    overrides: list[str],
    given: dict[str, Any],
    run: RunDirectory | None,
) -> RunConfig:
    """Lay over each other a preset's settings, files, `key=value` and options, with what a parent run hands on."""
    config = load_config(files, overrides, preset, given)
    if config.data.source != EMBEDDED_DATA:  # what a preset says of the embedded dialogues does not hold for other data
        preset = merge(preset, {"evaluation": {"true_score": "none"}, "announce": ""})
        config = load_config(files, overrides, preset, given)
    return inherit(with_absolute_paths(config), run)


def open_run(run: RunDirectory, config: RunConfig | None, trusts: bool = False) -> RunConfig:
    """Return the settings of `run`; a new one is made from `config`. What they ask for needs a yes (`trusts`) unless it
    is typed now, or was when the run was made here. Raises UserError without it, and where the settings disagree.
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
    """Raise UserError for an address that holds a secret: settings are written down, and shown."""
    if redacted(address) != address:
        raise UserError(
            f"rlhf.reward_url={redacted(address)} holds a secret, and settings are written into files: put it into an "
            f"environment variable and name that, as in 'https://me:${{REWARD_KEY}}@host' or '?token=${{REWARD_KEY}}'."
        )


def refuse_others(run: RunDirectory, stored: RunConfig, config: RunConfig) -> None:
    """Raise UserError where settings differ that a run has for life."""
    changed = differences(stored.model_dump(mode="json"), config.model_dump(mode="json"))
    others = {key: values for key, values in changed.items() if teaches(key, config) or teaches(key, stored)}
    for step in STEPS:
        if stored.seed_of(step) == config.seed_of(step):
            others.pop(f"{step.command}.seed", None)
    for key in [key for key in others if kind_of(key) is SettingKind.LENGTH]:
        if may_have_length(run, step_of(key.partition(".")[0]), stored, config):
            del others[key]
    if not others:
        return
    require_sources(config)
    first = dict(list(others.items())[:3])
    differ = ", ".join(f"{as_typed(key)}: {old!r} there, {new!r} now" for key, (old, new) in first.items())
    options = " ".join(f"--set {typed(f'{key}={text_of(new)}')}" for key, (_, new) in first.items())
    another = f"rlhf-chat run --from {typed(run.path)} --name NEW {options}{' ...' * (len(others) > 3)}"
    raise UserError(
        f"{run.path} was made with other settings ({differ}); leave these out to go on with the run's own, or "
        f"{'give a new run another name' if 'model' in others else f'begin another run: {another}'}."
    )


def text_of(value: Any) -> str:
    """Write a value as --set takes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def require_sources(config: RunConfig) -> None:
    """Raise UserError where a data source does not exist: a mistyped one is not another setting."""
    for text in (*config.data.sources, *config.data.eval_sources):
        source = parse_source(text)
        if source.is_task:
            dataset_of(source.name)
        elif text != EMBEDDED_DATA and not source.is_hub_id and find_set(source.name) is None:
            find_files(source.copy or source.path)


COMMAND_VARIABLE = "RLHF_CHAT_COMMAND_LINE"  # the command line of the command that starts a script, as JSON
GIT_SECONDS = 10.0


def record_start(run: RunDirectory, what: str, config: RunConfig, processes: int) -> None:
    """Append what runs now. `what` is the folder of a step, `preparation` or `evaluation`."""
    import torch  # seconds, and whoever reads the journal does without

    commit, changed = checkout(Path(__file__).parent)
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    values = {
        "number": len(read_starts(run)) + 1,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "what": what,
        "command": shlex.join(redacted_arguments(command_line())),
        "directory": os.getcwd(),
        "host": platform.node(),
        "processes": processes,
        "processor": processor()[0],
        "gpus": gpus,
        "commit": commit,
        "changed_since_commit": changed,
        **{kind: code_of(config, kind) for kind in CODE},
        "versions": versions(),
    }
    line = json.dumps(values, ensure_ascii=False) + "\n"
    with writing("a line of it", run.starts_file), open(run.starts_file, "a", encoding="utf-8") as handle:
        handle.write(line)


def read_starts(run: RunDirectory) -> list[dict[str, Any]]:
    """Read the starts in order, those of steps that were taken over too (`of`: which run's); old runs have none. What a
    crash cut short, or is no start, is left out."""
    lines = run.starts_file.read_bytes().splitlines() if run.starts_file.exists() else []
    return [start for line in lines if (start := read_line(line)) is not None and is_start(start)]


def begun_at(run: RunDirectory) -> str:
    """Return the time of the run's own first start; empty where it has none."""
    return next((start["time"] for start in read_starts(run) if "of" not in start), "")


def is_start(values: Mapping[str, Any]) -> bool:
    try:
        return datetime.fromisoformat(values["time"]).tzinfo is not None and isinstance(values["what"], str)
    except (LookupError, TypeError, ValueError):
        return False


def versions_of(run: RunDirectory, step: Step, made_by: Mapping[str, str]) -> Mapping[str, str]:
    """Return the versions of what ran the step last; those of `made_by`, the run's making, where nobody wrote them."""
    starts = [start for start in read_starts(run) if start["what"] == step.folder]
    return starts[-1].get("versions", made_by) if starts else made_by


def command_line() -> list[str]:
    """Return the command line of the command that started this script, else of the script itself."""
    given = os.environ.get(COMMAND_VARIABLE)
    return json.loads(given) if given else sys.argv


def checkout(directory: Path) -> tuple[str, bool]:
    """Return the commit of the code in `directory`, and whether files of it have changed since; '' where git does not
    track it, as with an installed package in an environment that lies in somebody's checkout.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=GIT_SECONDS, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "steps.py")
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return "", False
