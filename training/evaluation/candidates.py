"""What is compared: a model with a name for people and a key for the files; and who judges."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inference.chat_target import find_chat_models, refuse_reward_model
from inference.errors import UserError
from training.checkpoint_models import checkpoint_of
from training.lineage import Source, base_model, label_of, origin_of, reward_model_before
from training.models.loading import require_scorer
from training.run_directory import RunDirectory
from training.stage import Stage
from training.steps import COMPARED, REWARD, SFT, WRITING, step_of

NAMES = {"base": "base model", **{step.command: step.name for step in WRITING}}
"""A run's own models, by the words for them."""


@dataclass(frozen=True)
class Request:
    """What to compare; '', 0 and None leave the choice to the run."""

    model: str = ""
    """One of NAMES, a run (its newest model), a checkpoint (RUN@12), a model directory or a hub id."""
    against: str = ""
    judge: str = ""
    """true, learned, reward (all that PPO was told to raise), or a reward model's directory or hub id."""
    prompts: int = 0
    seed: int | None = None
    """Of the answers."""
    eval_data: tuple[str, ...] = ()
    """Sources of the rows to measure on, in place of those that the run holds out."""


@dataclass(frozen=True)
class Candidate:
    key: str
    name: str
    directory: Path

    def label(self, run: RunDirectory) -> str:
        """What preferences that a run has collected call it."""
        return f"{run.path.resolve().name}/base" if self.key == "base" else label_of(self.directory, self.name)


@dataclass(frozen=True)
class Judge:
    name: str
    source: Path | Literal["truth", "reward"]
    """A reward model, the lexicon, or all that PPO was told to raise."""


def find_pair(stage: Stage, request: Request) -> tuple[Candidate, Candidate]:
    """The model and what it is measured against: by default RLHF or DPO against SFT, SFT against the base model."""
    has_sft = bool(stage.config.sft_model) or stage.run.step(SFT).is_finished
    trained = [step.command for step in COMPARED if stage.run.step(step).is_finished]
    source = request.model or (trained[0] if trained else "sft")
    other = request.against or ("sft" if has_sft and source != "sft" else "base")
    model, against = find_candidate(stage, source, "model"), find_candidate(stage, other, "against")
    if model.directory.resolve() == against.directory.resolve():
        raise UserError(f"{source} and {other} are the same model; give another one with --against.")
    return model, against


def find_candidate(stage: Stage, source: str, key: str) -> Candidate:
    """The model that `source` stands for. Raises UserError where it is not finished or cannot write."""
    if source in NAMES:
        base = source == "base"
        directory = base_directory(stage) if base else stage.earlier_model(step_of(source))
        before = origin_of(stage.config.sft_model) if source == SFT.command else None
        return Candidate(source, before.name if before and before.step is not SFT else NAMES[source], directory)
    if at := checkpoint_of(source):
        source = str(at.model())
    path = Path(source).expanduser()
    if (path / "config.yaml").is_file():
        ((label, directory),) = find_chat_models(path, compare=False)
        return Candidate(key, f"{path.resolve().name} ({label})", directory)
    directory = stage.model_directory(source)
    refuse_reward_model(directory)
    origin = origin_of(directory)
    return Candidate(key, origin.name if origin else path.resolve().name if path.is_dir() else source, directory)


def base_directory(stage: Stage) -> Path:
    """What the run's models were before any training. Raises UserError where nobody knows."""
    if base := base_model(stage.config):
        return stage.model_directory(base)
    raise UserError(
        f"The base model of {stage.run.path} is not known: the run began with {stage.config.sft_model}, which lies in "
        f"no run; name the base model itself."
    )


def sources(stage: Stage, candidates: Iterable[Candidate], judge: Judge | None) -> list[Source]:
    """Where the compared models and their judge come from."""
    found = [Source(each.name, str(each.directory), each.key == "base") for each in candidates]
    if judge is not None and isinstance(judge.source, Path):
        found.append(Source(judge.name.removeprefix("reward of "), str(judge.source)))
    return found


def find_reward_model(stage: Stage) -> Path | None:
    """The run's, if it has a finished one."""
    given = stage.config.trained_reward_model or stage.run.step(REWARD).is_finished
    return stage.earlier_model(REWARD) if given else None


def find_judge_before(stage: Stage) -> Judge | None:
    """The reward model of the run that this one goes on from, or of one before that; None where there is none."""
    source = reward_model_before(stage.config)
    if not source:
        return None
    origin = origin_of(source)
    return Judge(f"reward of {origin.run.path.name if origin else source}", stage.model_directory(source))


def find_judge(stage: Stage, wanted: str, reward_model: Path | None, before: Judge | None = None) -> Judge | None:
    """Who says which of two answers is better: what is wanted, else the true score where it is known, else the learned
    reward, at last that of the run `before`. A reward function or service of the run is asked only where that is
    wanted.

    None where the run has neither. Raises UserError where what is wanted is not there.
    """
    knows_truth = stage.config.evaluation.true_score == "upbeat"
    if wanted == "true" and not knows_truth:
        raise UserError("This run has no true score (evaluation.true_score); judge by --judge learned or a model.")
    if wanted == "learned" and reward_model is None:
        stage.run.require_model(REWARD)
    if wanted == "true" or (not wanted and knows_truth):
        return Judge("upbeat score (lexicon)", "truth")
    if wanted == "reward":
        if stage.config.rlhf.has_reward_model and reward_model is None:
            stage.run.require_model(REWARD)
        return Judge("reward", "reward")
    if wanted in ("", "learned"):
        return Judge("learned reward", reward_model) if reward_model is not None else before
    directory = stage.model_directory(wanted)
    require_scorer(directory, wanted, trained=True)
    return Judge(f"reward of {Path(wanted).name}", directory)
