"""What the settings of a run make a command execute, send to, fetch or read, each as a `Use` that needs a yes."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from inference.model_store import TINY
from training.config import EMBEDDED_DATA, RunConfig
from training.data.rows import DEMONSTRATIONS_FILE
from training.data.sources import parse_source
from training.formulas.tables import own_files
from training.inputs import code_files, files_of, kept_model
from training.lineage import base_model, reward_model_before
from training.paths import MODELS
from training.run_directory import RunDirectory
from training.trust import Use, of_reading


def of_training(run: RunDirectory, config: RunConfig) -> list[Use]:
    """Of `run`, `sft`, `reward`, `dpo`, `rlhf` and the stage scripts."""
    roles = {f"{step}.optimizer": getattr(config, step).optimizer for step in ("sft", "reward", "dpo")}
    roles |= {"rlhf.actor": config.rlhf.actor, "rlhf.critic": config.rlhf.critic}
    return [
        *of_reading(run.path),
        *of_rewards(run, config),
        *of_formulas(run, config),
        *of_models(run, config),
        *of_data(run, config),
        *of_parents(run, config),
        *of_trackers(run, config),
        *(
            Use(f"give DeepSpeed {json.dumps(role.deepspeed)}", f"{name}.deepspeed")
            for name, role in roles.items()
            if role.deepspeed
        ),
    ]


def inherited(parent: RunDirectory, wanted: Iterable[Use]) -> list[Use]:
    """Of a run that goes on from `parent`, or is a fork of it: what both ask for, and reading."""
    config = parent.read_config()
    anew = [*of_data(parent, config, unread=True), *of_parents(parent, config, unread=True)]  # as a fork may
    theirs = [*of_training(parent, config), *anew]
    return [*of_reading(parent.path), *shared(theirs, wanted)]


def shared(theirs: Iterable[Use], ours: Iterable[Use]) -> list[Use]:
    """Those of `theirs` that use what `ours` do, whichever setting names it."""
    used = {use.what for use in ours}
    return [use for use in theirs if use.what in used]


def of_evaluation(run: RunDirectory, config: RunConfig, judge: str) -> list[Use]:
    """Of `eval`: the reward function and the address only where they judge."""
    return [*of_reading(run.path), *(of_rewards(run, config) if judge == "reward" else ()), *of_models(run, config)]


def of_looking(run: RunDirectory, config: RunConfig) -> list[Use]:
    """Of `data show` and `data lint`."""
    return [*of_reading(run.path), *of_models(run, config), *of_data(run, config)]


def of_rewards(run: RunDirectory, config: RunConfig) -> Iterator[Use]:
    """The reward function's files and the reward service's address."""
    for _, file in code_files(config, "reward_function") if config.rlhf.reward_weights.function else ():
        yield of_file(run, file, f"run {file}", "rlhf.reward_function")
    if any(each.name == "reasoning" for each in config.rlhf.asked_functions):
        yield Use("let reasoning-gym evaluate answers, in some tasks as Python", "rlhf.reward_function")
    if config.rlhf.reward_url and config.rlhf.reward_weights.url:
        yield Use(f"send prompts and answers to {config.rlhf.reward_url}", "rlhf.reward_url")


def of_formulas(run: RunDirectory, config: RunConfig) -> Iterator[Use]:
    """The files of entries of the user's own."""
    for setting, path in own_files(config):
        for _, file in files_of("formulas", path):
            yield of_file(run, file, f"run {file}", setting)


def of_models(run: RunDirectory, config: RunConfig) -> Iterator[Use]:
    """Models of the hub; no code of a model is ever run, so that one on this machine needs no yes."""
    named = [(setting, getattr(config, setting)) for setting in MODELS]
    for setting, name in [*named, ("model", base_model(config)), ("trained_reward_model", reward_model_before(config))]:
        is_here = name.startswith("package:") or Path(name).is_absolute() or kept_model(run, name).is_dir()
        if name and name != TINY and not is_here:
            yield Use(f"fetch the model {name} from the hub", setting)


def of_data(run: RunDirectory, config: RunConfig, unread: bool = False) -> Iterator[Use]:
    """Sources that lie outside of the run and are yet to be read; `unread`: as if none had been."""
    from training.data.prepare import COUNTS_FILE  # imports transformers, and chat goes without

    named = [("data.source", config.data.sources), ("data.eval_source", config.data.eval_sources)]
    sources = [(key, text) for key, texts in named for text in texts if unread or not (run.data / COUNTS_FILE).exists()]
    mixes = config.rlhf.ptx.coefficient and (unread or not (run.data / DEMONSTRATIONS_FILE).exists())
    sources += [("rlhf.ptx.source", config.rlhf.ptx.source)] if mixes else []
    for setting, text in sources:
        source = parse_source(text)
        if text and text != EMBEDDED_DATA and not source.is_task:
            place = source.copy or source.path
            if not place.resolve().is_relative_to(run.path.resolve()):
                how = "read" if place.exists() else "fetch from the hub"
                yield Use(f"{how} the data {source.label}", setting)


def of_parents(run: RunDirectory, config: RunConfig, unread: bool = False) -> Iterator[Use]:
    """Runs whose steps, and rows that are yet to be made, may be taken over."""
    from training.data.prepare import COUNTS_FILE  # imports transformers, and chat goes without

    rows = config.data.parent if unread or not (run.data / COUNTS_FILE).exists() else ""
    for setting, path in (("fork_of", config.fork_of), ("data.parent", rows)):
        if path and RunDirectory(Path(path)).config_file.exists():
            yield Use(f"take over what is in the run {path}", setting)


def of_trackers(run: RunDirectory, config: RunConfig) -> Iterator[Use]:
    if config.logging.wandb:
        project = config.logging.wandb_project
        yield Use(f"send settings and metrics to Weights & Biases, project {project}", "logging.wandb")
        theirs = run.path / "wandb" / "settings"  # which may name another address
        if theirs.is_file():
            yield of_file(run, theirs, f"let {theirs.resolve()} say where they are sent")


def of_file(run: RunDirectory, file: Path, what: str, setting: str = "") -> Use:
    """A file that is executed or obeyed, as it is now."""
    with open(file, "rb") as handle:
        content = hashlib.file_digest(handle, "sha256").hexdigest()
    return Use(what, setting, content, file.resolve().is_relative_to(run.path.resolve()))
