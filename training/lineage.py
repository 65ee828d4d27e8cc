"""Where models come from: the runs and steps that they went through, what the first began with, and which rows that
are held out now were trained on there."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from inference.errors import UserError
from training.config import RunConfig
from training.data.rows import Row, read_rows
from training.data.split import choose_groups
from training.run_directory import RunDirectory
from training.steps import DEMONSTRATIONS, PAIRS, PPO, PROMPTS, REWARD, SFT, STEPS, Step

HELD_OUT = {PROMPTS: "prompts", PAIRS: "pairs", DEMONSTRATIONS: "demonstrations"}
SHARED_OUT_BY = ("source", "eval_source", "split", "held_out", "limit", "bad_rows")
"""Settings of the data that decide which rows are held out, beside the split's seed."""


@dataclass(frozen=True)
class Origin:
    """A step of a run that left a model."""

    run: RunDirectory
    step: Step
    at: str = ""
    """`@12` for a checkpoint; empty for the step's model."""

    @property
    def name(self) -> str:
        """`demo (SFT)`."""
        return f"{self.run.path.name} ({self.step.name}{self.at})"


def origin_of(source: str | Path) -> Origin | None:
    """Find the step that left the model in a directory; None for one that lies in no run."""
    if not source:
        return None
    folder, at = Path(source).expanduser().resolve().parent, ""
    if folder.parent.name == "checkpoints":
        folder, at = folder.parent.parent, f"@{folder.name}"
    run = RunDirectory(folder.parent)
    step = next((step for step in STEPS if step.folder == folder.name), None)
    return Origin(run, step, at) if step is not None and run.config_file.exists() else None


def label_of(model: str | Path, name: str = "") -> str:
    """Name a model `demo/sft`, as preferences do; one that lies in no run has `name`, or its directory's."""
    origin = origin_of(model)
    return f"{origin.run.path.name}/{origin.step.command}{origin.at}" if origin else name or Path(model).resolve().name


def label_of_step(run: RunDirectory, config: RunConfig, step: Step) -> str:
    """Name the model that a step of the run leaves, or that is used instead."""
    return label_of(config.given_model(step) or run.step(step).model)


def inherit(config: RunConfig, run: RunDirectory | None) -> RunConfig:
    """`config` with what a run that is to begin at `run` has of the run that its models come from: the seed of the
    split, and, of an SFT model that was given for the base as well, the base. A run that is there keeps its own, and
    what it is a fork of."""
    stored = run.read_config() if run is not None and run.config_file.exists() else None
    if stored and not config.fork_of:
        config.fork_of = stored.fork_of
    given = filter(None, (config.sft_model, config.trained_reward_model, config.model, config.reward_model))
    if config.data.split_seed < 0:
        parent = next((origin for source in given if (origin := origin_of(source))), None)
        inherited = parent.run.read_config().split_seed if parent else config.data.split_seed
        config.data.split_seed = stored.data.split_seed if stored else inherited
    if config.model == config.sft_model:
        known = stored.model if stored and stored.sft_model == config.sft_model else base_model(config)
        is_gone = Path(known).is_absolute() and not Path(known).exists()
        config.model = config.model if is_gone else known or config.model
    return config


def base_model(config: RunConfig) -> str:
    """Find what the model of a run was before any training here; empty where only the SFT model is known."""
    seen: set[str] = set()
    while config.model == config.sft_model and config.model not in seen:
        seen.add(config.model)
        origin = origin_of(config.model)
        if origin is None:
            return ""
        config = origin.run.read_config()
    return "" if config.model in seen else config.model


def rounds_of(run: RunDirectory) -> list[RunDirectory]:
    """List the run and those that it goes on from, the first one first; a parent that is gone ends them."""
    rounds = [run]
    while parent := rounds[-1].read_config().round_of:
        before = RunDirectory(Path(parent))
        if before in rounds or not before.config_file.exists():
            break
        rounds.append(before)
    return rounds[::-1]


def newest_reward_model(run: RunDirectory) -> str:
    """Find the reward model of the newest round that trained one or was given one; else empty."""
    for earlier in reversed(rounds_of(run)):
        if earlier.step(REWARD).is_finished:
            return str(earlier.step(REWARD).model.resolve())
        if given := earlier.read_config().trained_reward_model:
            return given
    return ""


def reward_model_before(config: RunConfig) -> str:
    """Find the newest reward model of the runs that one with these settings goes on from; empty without one."""
    parent = RunDirectory(Path(config.round_of))
    return newest_reward_model(parent) if config.round_of and parent.config_file.exists() else ""


@dataclass(frozen=True)
class ModelSource:
    """A model that another one began with, or was trained with."""

    name: str
    path: str
    is_base: bool = False
    """Whether it is a pretrained model as far as anybody says, so that nobody asks what it was trained on."""


def sources_of(config: RunConfig) -> Iterator[ModelSource]:
    """Yield the models that the settings of a run name."""
    for path, is_base in (
        (config.sft_model, False),
        (config.trained_reward_model, False),
        (config.reference_model, config.reference_model == config.model),
        (config.model, True),
        (config.reward_model, True),
    ):
        if path:
            yield ModelSource(path, path, is_base)


def before(origin: Origin) -> Iterator[ModelSource]:
    """Yield what a step began with, and whose judgement it followed."""
    config, step = origin.run.read_config(), origin.step
    for earlier in config.steps_before(step):
        path = config.given_model(earlier) or str(origin.run.step(earlier).model)
        yield ModelSource(path, path)
    if step.compared_with and config.reference_model:
        yield ModelSource(config.reference_model, config.reference_model, config.reference_model == config.model)
    if step is SFT:
        yield ModelSource(config.model, config.model, is_base=True)
    elif step is REWARD and config.reward.initialize_from == "base":
        yield ModelSource(config.reward_model_source, config.reward_model_source, is_base=True)


def trace(sources: Iterable[ModelSource]) -> tuple[list[Origin], list[str]]:
    """Find all steps that the models went through, and the models of which nobody knows where they come from."""
    origins: dict[tuple[Path, Step], Origin] = {}
    unknown: dict[str, None] = {}
    left = list(sources)
    while left:
        source = left.pop(0)
        origin = origin_of(source.path)
        if origin is None:
            unknown |= {} if source.is_base else {source.name: None}
        elif (key := (origin.run.path, origin.step)) not in origins:
            origins[key] = origin
            try:
                left += before(origin)
            except UserError:
                unknown[source.name] = None
    return list(origins.values()), list(unknown)


def trained_elsewhere(run: RunDirectory, sources: Iterable[ModelSource]) -> list[str]:
    """Write a sentence for each other run that the models went through: how many of the rows that `run` holds out have
    a question that was trained on there; and one for each model of which nobody can know."""
    origins, unknown = trace(sources)
    here = run.path.resolve()
    steps: dict[Path, list[Step]] = {}
    for origin in origins:
        if origin.run.path != here:
            steps.setdefault(origin.run.path, []).append(origin.step)
    sentences = [overlap(run, RunDirectory(path), trained) for path, trained in steps.items()]
    return sentences + [
        f"It is not known what {name} was trained on: rows that are held out here may be among it." for name in unknown
    ]


def overlap(run: RunDirectory, other: RunDirectory, steps: list[Step]) -> str:
    """Say what of `run`'s held-out rows, and of its prompts for PPO where a reward model of `other` judges, was trained
    on in `other`."""
    try:
        trained = [row for file in sorted(files_read(other, steps)) for row in rows_of(file)]
        held_out = {name: rows_of(run.data / f"{kind.name}_eval.jsonl") for kind, name in HELD_OUT.items()}
        judge = origin_of(run.read_config().trained_reward_model)
        judged = judge is not None and judge.run.path == other.path
        prompts = rows_of(run.data / f"{PROMPTS.name}_train.jsonl") if judged else []
    except (UserError, OSError):
        return (
            f"It is not known whether rows that are held out here were trained on in {other.path}: the prepared rows "
            f"(data/) of one of the two runs cannot be read."
        )
    group_of = choose_groups([*trained, *prompts, *(row for rows in held_out.values() for row in rows)])
    known = {group_of(row) for row in trained}
    counts = {name: sum(group_of(row) in known for row in rows) for name, rows in held_out.items() if rows}
    where = f"{other.path} (step {', '.join(step.label for step in STEPS if step in steps)})"
    if not any(counts.values()):
        those = ", ".join(f"{len(held_out[name]):,} {name}" for name in counts)
        return f"Nothing that is held out here ({those}) has a question that was trained on in {where}."
    some = ", ".join(f"{count:,} of {len(held_out[name]):,} {name}" for name, count in counts.items())
    seen = sum(group_of(row) in known for row in prompts)
    also = f", and so have {seen:,} of {len(prompts):,} prompts that step 3 trains on" if seen else ""
    return (
        f"Of what is held out here, {some} have a question that was trained on in {where}{also}"
        f"{why_differently(run, other)}."
    )


def rows_of(file: Path) -> list[Row]:
    return cast(list[Row], read_rows(file))


def files_read(run: RunDirectory, steps: list[Step]) -> set[Path]:
    """Name the files of rows that the steps trained on; PPO also on the demonstrations of rlhf.ptx."""
    kinds = {step.rows for step in steps}
    if PPO in steps and run.read_config().rlhf.ptx.coefficient:
        kinds.add(DEMONSTRATIONS)
    return {run.data / f"{kind.name}_train.jsonl" for kind in kinds}


def why_differently(run: RunDirectory, other: RunDirectory) -> str:
    """Say which settings shared the rows out otherwise there."""
    ours, theirs = run.read_config(), other.read_config()
    differ = [f"data.{key}" for key in SHARED_OUT_BY if getattr(ours.data, key) != getattr(theirs.data, key)]
    if ours.split_seed != theirs.split_seed:
        differ.insert(0, f"data.split_seed, {theirs.split_seed} there and {ours.split_seed} here")
    return f"; it was shared out otherwise ({', '.join(differ)})" if differ else ""
