"""What is compared: a model with a name for people and a key for the files; and who judges."""

import gc
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from inference.chat_format import ChatFormat
from inference.chat_target import find_chat_models, refuse_reward_model
from inference.chat_template import Message, same_rendering
from inference.errors import UserError
from inference.generation.sampler import Sample
from training.checkpoints import checkpoint_of
from training.data.batching import TokenBatch, plan_micro_batches
from training.data_settings import DataSettings
from training.lineage import ModelSource, base_model, label_of, origin_of, reward_model_before
from training.models.loading import load_causal_lm, load_scorer, require_scorer
from training.models.policy import Policy, Scorer, at_last_token
from training.run_directory import RunDirectory
from training.stage import Stage
from training.steps import COMPARED, REWARD, SFT, WRITING, step_of

NAMES = {"base": "base model", **{step.command: step.name for step in WRITING}}


@dataclass(frozen=True)
class Request:
    """What to compare is asked here; '', 0 and None leave the choice to the run."""

    model: str = ""
    """One of NAMES, a run (its newest model), a checkpoint (RUN@12), a model directory or a hub id."""
    against: str = ""
    judge: str = ""
    """true, learned, reward (all that PPO was told to raise), or a reward model's directory or hub id."""
    prompts: int = 0
    seed: int | None = None  # of the answers
    eval_data: tuple[str, ...] = ()  # sources of the rows to measure on, instead of those that the run holds out


@dataclass(frozen=True)
class Candidate:
    key: str
    name: str
    directory: Path

    def label(self, run: RunDirectory) -> str:
        """Preferences that a run has collected call it so."""
        return f"{run.path.resolve().name}/base" if self.key == "base" else label_of(self.directory, self.name)


@dataclass(frozen=True)
class Judge:
    name: str
    source: Path | Literal["truth", "reward"]  # a reward model, the lexicon, or all that PPO was told to raise


def find_pair(stage: Stage, request: Request) -> tuple[Candidate, Candidate]:
    """Find the model and what it is measured against: by default RLHF or DPO against SFT, SFT against the base."""
    has_sft = bool(stage.config.sft_model) or stage.run.step(SFT).is_finished
    trained = [step.command for step in COMPARED if stage.run.step(step).is_finished]
    source = request.model or (trained[0] if trained else "sft")
    other = request.against or ("sft" if has_sft and source != "sft" else "base")
    model, against = find_candidate(stage, source, "model"), find_candidate(stage, other, "against")
    if model.directory.resolve() == against.directory.resolve():
        raise UserError(f"{source} and {other} are the same model; give another one with --against.")
    return model, against


def find_candidate(stage: Stage, source: str, key: str) -> Candidate:
    """Find the model that `source` stands for. Raises UserError where it is not finished or cannot write."""
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
    """Find what the run's models were before any training. Raises UserError where nobody knows."""
    if base := base_model(stage.config):
        return stage.model_directory(base)
    raise UserError(
        f"The base model of {stage.run.path} is not known: the run began with {stage.config.sft_model}, which lies in "
        f"no run; name the base model itself."
    )


def sources(stage: Stage, candidates: Iterable[Candidate], judge: Judge | None) -> list[ModelSource]:
    result = [ModelSource(model.name, str(model.directory), model.key == "base") for model in candidates]
    if judge is not None and isinstance(judge.source, Path):
        result.append(ModelSource(judge.name.removeprefix("reward of "), str(judge.source)))
    return result


def find_reward_model(stage: Stage) -> Path | None:
    given = stage.config.trained_reward_model or stage.run.step(REWARD).is_finished
    return stage.earlier_model(REWARD) if given else None


def find_judge_before(stage: Stage) -> Judge | None:
    """Find the reward model of the run that this one goes on from, or of one before that; None without one."""
    source = reward_model_before(stage.config)
    if not source:
        return None
    origin = origin_of(source)
    return Judge(f"reward of {origin.run.path.name if origin else source}", stage.model_directory(source))


def find_judge(stage: Stage, wanted: str, reward_model: Path | None, before: Judge | None = None) -> Judge | None:
    """Choose who says which of two answers is better: what is wanted, else the true score where it is known, else the
    learned reward, at last that of the run `before`; None where the run has neither. A reward function or service of
    the run is asked only where that is wanted. Raises UserError where what is wanted does not exist.
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


Row = tuple[Tensor, Tensor]  # prompt ids, response ids: int64 (length) each


@dataclass
class ModelAnswers:
    """A model's answers in the order of the prompts, and in the tokens of `chat_format`."""

    chat_format: ChatFormat
    prompts: list[list[Message]]
    samples: list[Sample]
    texts: list[str]

    def first(self, count: int) -> "ModelAnswers":
        return ModelAnswers(self.chat_format, self.prompts[:count], self.samples[:count], self.texts[:count])

    def rows(self, reader: ChatFormat, data: DataSettings, to_score: bool = False) -> list[Row]:
        """Return them as `reader` has them: the same tokens, or the text tokenised again; no end token where the answer
        did not end. A reward model reads an answer `to_score` with the end that it was taught, whatever token ended it.
        """
        if same_tokens(reader, self.chat_format):
            as_read = self.chat_format.as_taught if to_score else list
            return [(sample.prompt_ids, torch.tensor(as_read(sample.response_ids))) for sample in self.samples]
        rows = []
        for prompt, text, sample in zip(self.prompts, self.texts, self.samples, strict=True):
            prompt_ids, response_ids = reader.prompt_ids(prompt, data.max_prompt_tokens), reader.response_ids(text)
            if not sample.ended and len(response_ids) > 1:
                response_ids.pop()
            rows.append((torch.tensor(prompt_ids), torch.tensor(response_ids)))
        return rows


def same_tokens(a: ChatFormat, b: ChatFormat) -> bool:
    """Whether both make the same tokens of every conversation."""
    ours, theirs = a.tokenizer, b.tokenizer
    return (
        a.end_of_turn_id == b.end_of_turn_id
        and ours.get_vocab() == theirs.get_vocab()
        and (ours.chat_template == theirs.chat_template or same_rendering(a, b))
    )


def encode(chat_format: ChatFormat, prompt: Sequence[Message], response: str, data: DataSettings) -> Row:
    """Encode a reply from the data, within the limits that training has too."""
    prompt_ids = chat_format.prompt_ids(list(prompt), data.max_prompt_tokens)
    return torch.tensor(prompt_ids), torch.tensor(chat_format.response_ids(response, data.max_response_tokens))


class Reader:
    """A language model, loaded: it generates through `policy.model` and reads through `logprobs`."""

    def __init__(self, stage: Stage, directory: Path):
        self.stage = stage
        self.chat_format = ChatFormat.load(directory)
        model = Policy(load_causal_lm(directory, self.chat_format, stage.dtype))
        self.policy = model.to(stage.ranks.device).eval()

    @torch.no_grad()
    def logprobs(self, rows: Sequence[Row], temperature: float = 1.0) -> list[Tensor]:
        """Score each row's response tokens; float32 (response tokens) each."""
        result: list[Tensor] = [torch.empty(0)] * len(rows)
        for chosen, batch in batches(self.stage, rows):
            sizes = [len(rows[row][1]) for row in chosen]
            for row, values in zip(chosen, self.policy(batch, temperature)[0].cpu().split(sizes), strict=True):
                result[row] = values
        return result

    def logprobs_of(self, answers: ModelAnswers, temperature: float = 1.0) -> list[Tensor]:
        return self.logprobs(answers.rows(self.chat_format, self.stage.config.data), temperature)


@contextmanager
def reading(stage: Stage, directory: Path) -> Iterator[Reader]:
    """Load a model, and free it at the end: a laptop holds no four models."""
    reader = Reader(stage, directory)
    try:
        yield reader
    finally:
        del reader.policy
        gc.collect()


class RewardModel:
    """Scores answers, in whatever tokens they were generated."""

    def __init__(self, stage: Stage, directory: Path):
        self.stage, self.directory = stage, directory
        self.chat_format = ChatFormat.load(directory)
        model = load_scorer(directory, self.chat_format, stage.dtype, trained=True)
        self.scorer = Scorer(model).to(stage.ranks.device).eval()

    @torch.no_grad()
    def scores(self, rows: Sequence[Row]) -> list[float]:
        """Score each row at its last token; the same row has the same score, whatever it shared a batch with.

        Raises UserError where a score is no number.
        """
        keys = [(tuple(prompt.tolist()), tuple(response.tolist())) for prompt, response in rows]
        different = dict(zip(keys, rows, strict=True))
        order, score_of = list(different), dict.fromkeys(different, math.nan)
        for chosen, batch in batches(self.stage, list(different.values())):
            scores = at_last_token(self.scorer(batch), batch).tolist()
            score_of.update(zip((order[row] for row in chosen), scores, strict=True))
        if not all(map(math.isfinite, score_of.values())):
            raise UserError(
                f"The reward model in {self.directory} gives scores that are no finite numbers, so nothing can be "
                f"judged by it; try dtype=fp32, or choose another one."
            )
        return [score_of[key] for key in keys]

    def scores_of_both(self, theirs: ModelAnswers, ours: ModelAnswers) -> tuple[list[float], list[float]]:
        """Score two models' answers; one that both gave has one score, so it is a tie."""
        first, second = (
            answers.rows(self.chat_format, self.stage.config.data, to_score=True) for answers in (theirs, ours)
        )
        scores = self.scores([*first, *second])
        return scores[: len(first)], scores[len(first) :]


def batches(stage: Stage, rows: Sequence[Row]) -> Iterator[tuple[list[int], TokenBatch]]:
    """Yield row numbers and their tokens, in micro-batches of rlhf.micro_batch_tokens."""
    if not rows:
        return
    lengths = [len(prompt) + len(response) for prompt, response in rows]
    for micro_batch in plan_micro_batches(lengths, stage.config.rlhf.micro_batch_tokens)[0]:
        chosen = micro_batch.rows
        yield chosen, TokenBatch.of([rows[row] for row in chosen], stage.ranks.device)
