"""Two models answer the same held-out prompts: scores, win rate, KL, perplexity, length and variety of the answers.

Of a run these are SFT and RLHF; `Request` names any others.
"""

import json
from collections.abc import Hashable, Sequence
from itertools import compress
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedModel

from inference.chat_format import ChatFormat
from inference.errors import UserError
from inference.generation.engine import GenerationEngine
from inference.generation.sampler import Sample, SamplingKey, SamplingSettings
from inference.preferences import PreferenceFile
from training.config import EvaluationSettings
from training.data.chitchat import upbeat_score
from training.data.prepare import read_eval_data
from training.data.rows import RowSets, read_rows
from training.data.split import choose_groups, once
from training.data.token_cache import LENGTH_BUCKETS, TokenPair, left_out, length_bucket, rows_of
from training.data_settings import DataSettings
from training.evaluation import statistics
from training.evaluation.candidates import (
    Candidate,
    ModelAnswers,
    Reader,
    Request,
    RewardModel,
    base_directory,
    encode,
    find_judge,
    find_judge_before,
    find_pair,
    find_reward_model,
    reading,
    same_tokens,
    sources,
)
from training.evaluation.panel import panel_agreement, read_panel, rows_to_score
from training.evaluation.preferences import win_rates
from training.evaluation.statistics import effective_size, share
from training.lineage import trained_elsewhere
from training.memory import slots_in
from training.plan import slots
from training.rewards import Rewards, means_by_name
from training.run_directory import write_json, write_text
from training.shape import Shape
from training.stage import Stage
from training.steps import REWARD


class Accuracy(TypedDict):
    pairs: int
    questions: int  # different ones; pairs under one are not independent, and the interval knows it
    rate: float
    low: float
    high: float


def reward_accuracy(model: "RewardModel", rows: Sequence[Any], data: DataSettings) -> dict[str, Accuracy]:
    """Measure `all`, `up_to_N_tokens` for each length that occurs, and `unseen_questions` where the data know them.

    As in step 2, pairs whose answers are the same within data.max_response_tokens are left out: there is nothing to
    rank. Empty where no pair is left.
    """
    used = [(row, pair) for row in rows if (pair := token_pair(model, row, data)).differs]
    if len(used) < len(rows):
        model.stage.display.say(left_out(len(rows) - len(used), len(rows), data.max_response_tokens))
    pairs = [pair for _, pair in used]
    scores = model.scores(rows_of(pairs))
    right = [a > b for a, b in zip(scores[: len(pairs)], scores[len(pairs) :], strict=True)]
    lengths, unseen = [pair.longer for pair in pairs], [pair.is_unseen for pair in pairs]
    return accuracy_by_length(right, lengths, unseen, groups_of([row for row, _ in used]))


def groups_of(rows: Sequence[Any]) -> Sequence[Hashable]:
    """Return the question of each pair. Where all share one, a pair stands for itself: what is drawn are answers."""
    groups = list(map(choose_groups(rows), rows))
    return groups if len(set(groups)) > 1 else range(len(rows))


def token_pair(model: "RewardModel", row: Any, data: DataSettings) -> TokenPair:
    """Encode a row of pairs as `model` reads it, within the limits that training has too."""
    prompt, chosen = encode(model.chat_format, row["prompt"], row["chosen"], data)
    _, rejected = encode(model.chat_format, row["prompt"], row["rejected"], data)
    return TokenPair.of(row, (prompt, chosen, rejected))


def accuracy_by_length(
    right: Sequence[bool],
    lengths: Sequence[int],
    unseen: Sequence[bool],
    questions: Sequence[Hashable] | None = None,
) -> dict[str, Accuracy]:
    """One entry a pair in each: ranked right, tokens of the longer answer, question not trained on, question (all are
    different where it is left out)."""
    questions = range(len(right)) if questions is None else questions
    buckets = [length_bucket(length) for length in lengths]
    members = {"all": [True] * len(right)}
    for bucket in LENGTH_BUCKETS:
        members[f"up_to_{bucket}_tokens"] = [of_pair == bucket for of_pair in buckets]
    members["unseen_questions"] = list(unseen)
    return {
        name: accuracy(list(compress(right, belongs)), list(compress(questions, belongs)))
        for name, belongs in members.items()
        if any(belongs)
    }


def accuracy(right: Sequence[bool], questions: Sequence[Hashable]) -> Accuracy:
    rate, low, high = share(sum(right), len(right), effective_size(right, questions))
    return {"pairs": len(right), "questions": len(set(questions)), "rate": rate, "low": low, "high": high}


EVALUATION_ITERATION = 1_000_000  # draws apart from every training iteration's


def win_rate(
    scores: tuple[list[float], list[float]], questions: Sequence[str], chosen: Sequence[int]
) -> dict[str, float]:
    """Measure how often the second model beats the first on the chosen prompts; those of one question are not
    independent. `ties` are the prompts on which both have one score.
    """
    theirs, ours = ([of_model[i] for i in chosen] for of_model in scores)
    groups = [questions[i] for i in chosen]
    rate, low, high = statistics.win_rate(ours, theirs, groups)
    ties = sum(a == b for a, b in zip(ours, theirs, strict=True))
    return {
        "prompts": len(chosen),
        "questions": len(set(groups)),
        "ties": ties,
        "rate": rate,
        "low": low,
        "high": high,
    }


class Comparison:
    def __init__(self, stage: Stage, request: Request | None = None):
        self.stage, self.request = stage, request or Request()
        self.data, self.settings = stage.config.data, stage.config.rlhf
        self.model, self.against = find_pair(stage, self.request)
        self.reward_model = find_reward_model(stage)
        self.judge_before = find_judge_before(stage)
        self.judge = find_judge(stage, self.request.judge, self.reward_model, self.judge_before)
        asks = self.judge is not None and self.judge.source == "reward"
        self.rewards = Rewards(self.settings, stage.ranks) if asks else None
        self.given = self.read_given()
        limit = self.request.prompts or stage.config.evaluation.prompts or EvaluationSettings().prompts
        self.held_out = once(self.eval_rows("prompts"), evaluation=True)[:limit]
        if not self.held_out:
            raise UserError(
                "The run holds out no prompts to answer: it needs more rows, a larger data.held_out, or --eval-data."
            )
        self.prompts = [row["prompt"] for row in self.held_out]
        self.extras = [row.get("extra", {}) for row in self.held_out]
        self.demonstrations = self.eval_rows("sft")[: stage.config.evaluation.rows]
        labels = (candidate.label(stage.run) for candidate in (self.model, self.against))
        self.preferences = win_rates(PreferenceFile(stage.run.preferences).read_or_say(stage.display.say), *labels)

    def read_given(self) -> RowSets | None:
        """Read the rows of the request; None where those that the run holds out are meant."""
        if not self.request.eval_data:
            return None
        settings = self.data.model_copy(update={"eval_source": list(self.request.eval_data)})
        chat_format = ChatFormat.load(self.model.directory)
        return read_eval_data(settings, self.stage.display.say, chat_format).sets(self.stage.config.split_seed)

    def seen_in_training(self) -> str:
        """Say how many of the prompts that were given have a question that this run trained on."""
        files = sorted(self.stage.run.data.glob("*_train.jsonl"))
        trained: list[Any] = [row for file in files for row in read_rows(file)]
        group_of = choose_groups([*trained, *self.held_out])
        known = set(map(group_of, trained))
        seen = sum(group_of(row) in known for row in self.held_out)
        given, run = f"{len(self.held_out):,} prompts that were given", self.stage.run.path
        return f"Of the {given}, {seen:,} have a question that {run} trained on."

    def eval_rows(self, kind: str) -> list[Any]:
        """Read held-out rows of the run; none where its data were never prepared for them."""
        if self.given is not None:
            return getattr(self.given, f"{kind}_eval")
        file = self.stage.run.data / f"{kind}_eval.jsonl"
        return read_rows(file) if file.exists() else []

    def run(self, result_file: Path, answers_file: Path) -> dict[str, Any]:
        """Measure and write both files; returns what the first one holds."""
        key_of_untouched, untouched = self.untouched()
        # One model after the other; the second is read again for what the first said.
        with reading(self.stage, self.against.directory) as reader:
            theirs = self.answer(reader, self.against)
            their_perplexity = self.perplexity(reader)
        with reading(self.stage, self.model.directory) as reader:
            ours = self.answer(reader, self.model)
            our_perplexity = self.perplexity(reader)
            ours_by_ours = reader.logprobs_of(self.read(ours), self.settings.temperature)
        pair = {self.against.key: self.measure(theirs), self.model.key: self.measure(ours)}
        pair[self.against.key] |= their_perplexity
        pair[self.model.key] |= our_perplexity
        if ours_by_ours and same_tokens(ours.chat_format, theirs.chat_format):
            with reading(self.stage, self.against.directory) as reader:
                ours_by_theirs = reader.logprobs_of(self.read(ours), self.settings.temperature)
            logratios = [float((p - q).sum()) for p, q in zip(ours_by_ours, ours_by_theirs, strict=True)]
            pair[self.model.key]["kl"], pair[self.against.key]["kl"] = statistics.mean(logratios), 0.0
        with reading(self.stage, untouched) as reader:
            for key, answers in ((self.against.key, theirs), (self.model.key, ours)):
                if logprobs := reader.logprobs_of(self.read(answers)):
                    pair[key][key_of_untouched] = perplexity_of(logprobs)

        result: dict[str, Any] = {
            "prompts": len(self.held_out),
            "sampling": {"temperature": self.settings.temperature, "max_tokens": self.data.max_response_tokens},
            "pair": {self.against.key: self.against.name, self.model.key: self.model.name},
        }
        elsewhere = trained_elsewhere(self.stage.run, sources(self.stage, (self.against, self.model), self.judge))
        if notes := elsewhere if self.given is None else [self.seen_in_training()]:
            result["trained_elsewhere"] = notes
        scores = self.score(theirs, ours, pair, result)
        result |= pair
        if scores is not None:
            assert self.judge is not None
            questions, everywhere = self.questions(), range(len(self.held_out))
            result["win_rate"] = win_rate(scores, questions, everywhere) | {"judge": self.judge.name}
            unseen = [i for i, row in enumerate(self.held_out) if row.get("held_out_question")]
            if 0 < len(unseen) < len(self.held_out):  # only the embedded default knows its questions
                result["win_rate_unseen_questions"] = win_rate(scores, questions, unseen)
        if self.preferences is not None:
            result["preferences"] = self.preferences
        self.write_answers(answers_file, theirs, ours, scores)
        write_json(result_file, result)
        return result

    def questions(self) -> list[str]:
        return list(map(choose_groups(self.held_out), self.held_out))

    def untouched(self) -> tuple[str, Path]:
        """Choose a model that judges how plain the answers are, and what its perplexity is called: the base model, or
        the SFT model where that was given and nothing before it is known."""
        try:
            return "perplexity_untouched", base_directory(self.stage)
        except UserError:
            if not self.stage.config.sft_model:
                raise
            return "perplexity_sft_model", self.stage.model_directory(self.stage.config.sft_model)

    def score(
        self, theirs: ModelAnswers, ours: ModelAnswers, pair: dict[str, dict[str, float]], result: dict[str, Any]
    ) -> tuple[list[float], list[float]] | None:
        """Return the judge's scores of both models' answers; rewards land in `pair`, accuracies in `result`."""
        known: dict[Path | str, tuple[list[float], list[float]]] = {"truth": (truth(theirs), truth(ours))}
        before = self.judge_before.source if self.judge_before is not None else None
        wanted = [self.reward_model, self.judge.source if self.judge is not None else None, before]
        pairs = [row for row in self.eval_rows("pairs") if "chosen" in row][: self.stage.config.evaluation.rows]
        for directory in dict.fromkeys(wanted):
            if not isinstance(directory, Path):
                continue
            model = RewardModel(self.stage, directory)
            known[directory] = model.scores_of_both(theirs, ours)
            key = "learned_reward" if directory == self.reward_model else "judge_reward"
            key = "reward_before" if directory == before else key
            for candidate, scores in zip((self.against, self.model), known[directory], strict=True):
                pair[candidate.key][key] = statistics.mean(scores)
            if directory not in wanted[:2]:
                continue
            own = self.results_of_step_2() if directory == self.reward_model else {}
            if accuracy := own.get("reward_accuracy") or reward_accuracy(model, pairs, self.data):
                name = "reward_accuracy" if directory == self.reward_model else "judge_accuracy"
                result[name] = accuracy
            if directory == self.reward_model and (panel := read_panel(self.stage.run)):
                result["panel"] = own.get("panel") or panel_agreement(
                    panel, model.scores(rows_to_score(panel, model.chat_format, self.data))
                )
        if self.judge_before is not None and self.judge_before != self.judge:
            of_before = win_rate(known[self.judge_before.source], self.questions(), range(len(self.held_out)))
            result["win_rate_before"] = of_before | {"judge": self.judge_before.name}
        if self.rewards is not None:
            of_model = known[self.reward_model] if self.reward_model and self.rewards.has_model else ([], [])
            totals = [
                self.rewards.total(learned, self.prompts, answers.texts, self.extras, group=1)
                for learned, answers in zip(of_model, (theirs, ours), strict=True)
            ]
            known["reward"] = totals[0][0], totals[1][0]
            for candidate, (scores, means) in zip((self.against, self.model), totals, strict=True):
                pair[candidate.key]["reward"] = statistics.mean(scores)
                pair[candidate.key] |= of_sources(means)
        return None if self.judge is None else known[self.judge.source]

    def results_of_step_2(self) -> dict[str, Any]:
        """Read what step 2 measured of the reward model that it trained, so that there is one figure of it; empty where
        the model comes from elsewhere."""
        trained_here = self.given is None and not self.stage.config.given_model(REWARD)
        return self.stage.run.step(REWARD).read_result() if trained_here else {}

    def answer(self, reader: Reader, candidate: Candidate) -> ModelAnswers:
        """Sample answers as in PPO's rollouts, with the same random numbers for every model."""
        chat_format, limit = reader.chat_format, self.data.max_prompt_tokens
        prompts = [torch.tensor(chat_format.prompt_ids(row["prompt"], limit)) for row in self.held_out]
        slots = self.slots(reader.policy.model)
        engine = GenerationEngine(reader.policy.model, chat_format.end_ids, chat_format.pad_id, slots)
        sampling = SamplingSettings(
            self.data.max_response_tokens, self.settings.temperature, min_tokens=self.settings.min_response_tokens
        )
        seed = self.stage.config.seed if self.request.seed is None else self.request.seed
        samples: list[Sample] = []
        with self.stage.display.progress(f"answers of {candidate.name}", len(prompts)) as bar:
            for sample in engine.generate(prompts, sampling, SamplingKey(seed, EVALUATION_ITERATION)):
                samples.append(sample)
                bar.advance()
        samples.sort(key=lambda sample: sample.index)
        texts = [chat_format.decode(sample.response_ids) for sample in samples]
        return ModelAnswers(chat_format, [row["prompt"] for row in self.held_out], samples, texts)

    def slots(self, model: PreTrainedModel) -> int:
        """Return how many answers are drawn together: as in PPO, or as many as a GPU has memory for."""
        device = self.stage.ranks.device
        if device.type != "cuda" or self.settings.generation_batch != "auto":
            return slots(self.settings)
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return slots_in(free_bytes, Shape.of(model.config), self.data.longest, model.dtype)

    def read(self, answers: ModelAnswers) -> ModelAnswers:
        """Choose the answers whose KL and perplexity are taken: they cost as much as all the rest."""
        return answers.first(self.stage.config.evaluation.rows)

    def perplexity(self, reader: Reader) -> dict[str, float]:
        """Take the perplexity of the held-out demonstrations: what a model forgets of its data in PPO shows here."""
        rows = [encode(reader.chat_format, row["prompt"], row["response"], self.data) for row in self.demonstrations]
        return {"perplexity_demonstrations": perplexity_of(reader.logprobs(rows))} if rows else {}

    def measure(self, answers: ModelAnswers) -> dict[str, float]:
        lengths = [len(sample.response_ids) for sample in answers.samples]
        measured = {
            "length": statistics.mean(lengths),
            "ended_fraction": statistics.mean([float(sample.ended) for sample in answers.samples]),
            "distinct_bigrams": statistics.distinct_bigrams(answers.texts),
            "most_frequent_share": statistics.most_frequent_share(answers.texts),
        }
        if self.stage.config.evaluation.true_score == "upbeat":
            measured["true_score"] = statistics.mean(truth(answers))
        return measured | of_sources(means_by_name(self.settings, self.prompts, answers.texts, self.extras))

    def write_answers(
        self, file: Path, theirs: ModelAnswers, ours: ModelAnswers, scores: tuple[list[float], list[float]] | None
    ) -> None:
        """Write both models' answers, prompt by prompt, with the judge's scores."""
        lines = []
        for i, row in enumerate(self.held_out):
            line: dict[str, Any] = {"prompt": row["prompt"]}
            line |= {self.against.key: theirs.texts[i], self.model.key: ours.texts[i]}
            if scores is not None:
                line |= {f"{self.against.key}_score": scores[0][i], f"{self.model.key}_score": scores[1][i]}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        write_text(file, "".join(lines))


def of_sources(means: dict[str, float]) -> dict[str, float]:
    return {f"reward/{name}": mean for name, mean in means.items()}


def truth(answers: ModelAnswers) -> list[float]:
    return [upbeat_score(text) for text in answers.texts]


def perplexity_of(logprobs: list[Tensor]) -> float:
    return statistics.perplexity(-float(torch.cat(logprobs).double().mean()))
