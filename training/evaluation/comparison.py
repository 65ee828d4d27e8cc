"""SFT and RLHF (or DPO) answer the same held-out prompts; scores, KL, length, variety and fluency of the answers."""

import gc
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from inference.chat_format import ChatFormat
from inference.generation.engine import GenerationEngine
from inference.generation.sample import Sample, SamplingKey, SamplingSettings
from training.data.batching import TokenBatch, plan_micro_batches
from training.data.rows import read_rows
from training.data.upbeat import upbeat_score
from training.evaluation import statistics
from training.models.loading import load_causal_lm, load_scorer
from training.models.policy import Policy
from training.models.scorer import Scorer, at_last_token
from training.run_directory import COMPARED, write_json, write_text
from training.stage import Stage

EVALUATION_ITERATION = 1_000_000  # draws apart from every training iteration's


@dataclass
class Answers:
    """One model's answers to the same prompts, in order."""

    samples: list[Sample]
    texts: list[str]

    @property
    def rows(self) -> list[tuple[Tensor, Tensor]]:
        return [(sample.prompt_ids, torch.tensor(sample.response_ids)) for sample in self.samples]


def win_rate(scores: tuple[list[float], list[float]], chosen: Sequence[int]) -> dict[str, float]:
    """Of the second model over the first, on the chosen prompts."""
    theirs, ours = ([each[i] for i in chosen] for each in scores)
    rate, low, high = statistics.win_rate(ours, theirs)
    return {"prompts": len(chosen), "rate": rate, "low": low, "high": high}


class Comparison:
    """Loads one model at a time: a laptop holds no four. `stage` is that of the step whose model is compared with SFT.

    Without a reward model there is no learned reward, and without a known rule either there is no win rate.
    """

    def __init__(self, stage: Stage):
        self.stage = stage
        self.step = stage.directory.number
        self.name = COMPARED[self.step]
        self.has_reward_model = bool(stage.config.trained_reward_model) or stage.run.step(2).is_finished
        self.chat_format = ChatFormat.load(stage.earlier_model(1))
        self.budget = stage.config.rlhf.micro_batch_tokens

    def run(self) -> dict:
        """Measure and write evaluation.json and comparison.jsonl; returns what the former holds."""
        stage, config = self.stage, self.stage.config
        held_out = read_rows(stage.run.data / "prompts_eval.jsonl")[: config.evaluation.prompts]
        limit = config.data.max_prompt_tokens
        prompts = [torch.tensor(self.chat_format.prompt_ids(row["prompt"], limit)) for row in held_out]

        sft_model, our_model = stage.earlier_model(1), stage.run.require_model(self.step)
        sft, ours = self.answer(sft_model, prompts), self.answer(our_model, prompts)
        untouched = stage.model_directory(config.model)
        sft_rewards, our_rewards = (self.rewards(each) if self.has_reward_model else None for each in (sft, ours))
        result: dict[str, Any] = {
            "prompts": len(prompts),
            "sampling": {"temperature": config.rlhf.temperature, "max_tokens": config.data.max_response_tokens},
            "sft": self.measure(sft, sft_rewards, untouched),
            self.name: self.measure(ours, our_rewards, untouched),
        }
        temperature = config.rlhf.temperature
        logratios = [
            float((after - before).sum())
            for after, before in zip(
                self.logprobs(our_model, ours, temperature), self.logprobs(sft_model, ours, temperature), strict=True
            )
        ]
        result[self.name]["kl"] = statistics.mean(logratios)
        result["sft"]["kl"] = 0.0
        rows: list[dict[str, Any]] = [
            {"prompt": row["prompt"], "sft": sft.texts[i], self.name: ours.texts[i]} for i, row in enumerate(held_out)
        ]
        scores = self.judge(sft, sft_rewards), self.judge(ours, our_rewards)
        if scores[0] is not None and scores[1] is not None:
            judged = scores[0], scores[1]
            result["win_rate"] = win_rate(judged, range(len(prompts))) | {"judge": self.judge_name}
            unseen = [i for i, row in enumerate(held_out) if row.get("held_out_question")]
            if 0 < len(unseen) < len(prompts):  # only the embedded default knows its questions
                result["win_rate_unseen_questions"] = win_rate(judged, unseen)
            for i, row in enumerate(rows):
                row |= {"sft_score": judged[0][i], f"{self.name}_score": judged[1][i]}
        evaluation_file, comparison_file = stage.run.comparison_of(self.step)
        write_text(comparison_file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_json(evaluation_file, result)
        return result

    @property
    def judge_name(self) -> str:
        return "upbeat score (known rule)" if self.stage.config.evaluation.true_score == "upbeat" else "learned reward"

    def judge(self, answers: Answers, rewards: list[float] | None) -> list[float] | None:
        """The true score where the rule is known, else the learned reward, if there is one."""
        if self.stage.config.evaluation.true_score == "upbeat":
            return [upbeat_score(text) for text in answers.texts]
        return rewards

    def answer(self, directory: Path, prompts: list[Tensor]) -> Answers:
        """Sampled as in PPO's rollouts; the same random numbers for every model."""
        settings = self.stage.config.rlhf
        model = (
            cast(Any, load_causal_lm(directory, self.chat_format, self.stage.dtype)).to(self.stage.ranks.device).eval()
        )
        engine = GenerationEngine(
            model, self.chat_format.end_of_turn_id, self.chat_format.pad_id, settings.generation_batch
        )
        sampling = SamplingSettings(
            self.stage.config.data.max_response_tokens, settings.temperature, min_tokens=settings.min_response_tokens
        )
        samples: list[Sample] = []
        with self.stage.display.progress(f"answers of {directory.parent.name}", len(prompts)) as bar:
            for sample in engine.generate(prompts, sampling, SamplingKey(self.stage.config.seed, EVALUATION_ITERATION)):
                samples.append(sample)
                bar.advance()
        samples.sort(key=lambda sample: sample.index)
        return Answers(samples, [self.chat_format.decode(sample.response_ids) for sample in samples])

    def measure(self, answers: Answers, rewards: list[float] | None, untouched: Path) -> dict[str, float]:
        """Everything about one model's answers that needs no second model's."""
        logprobs = self.logprobs(untouched, answers, 1.0)
        tokens = sum(len(row) for row in logprobs)
        lengths = [len(sample.response_ids) for sample in answers.samples]
        measured = {
            "length": statistics.mean(lengths),
            "ended_fraction": statistics.mean([float(sample.ended) for sample in answers.samples]),
            "distinct_bigrams": statistics.distinct_bigrams(answers.texts),
            "most_frequent_share": statistics.most_frequent_share(answers.texts),
            "perplexity_untouched": math.exp(-float(sum(row.sum() for row in logprobs)) / tokens),
        }
        if rewards is not None:
            measured["learned_reward"] = statistics.mean(rewards)
        if self.stage.config.evaluation.true_score == "upbeat":
            measured["true_score"] = statistics.mean([upbeat_score(text) for text in answers.texts])
        return measured

    @torch.no_grad()
    def logprobs(self, directory: Path, answers: Answers, temperature: float) -> list[Tensor]:
        """Of a model, for each answer's tokens; float32 (response tokens) each."""
        model = Policy(load_causal_lm(directory, self.chat_format, self.stage.dtype)).to(self.stage.ranks.device).eval()
        found: list[Tensor] = [torch.empty(0)] * len(answers.samples)
        for rows, batch in self.batches(answers.rows):
            sizes = [len(answers.samples[row].response_ids) for row in rows]
            for row, values in zip(rows, model(batch, temperature)[0].cpu().split(sizes), strict=True):
                found[row] = values
        del model
        gc.collect()
        return found

    @torch.no_grad()
    def rewards(self, answers: Answers) -> list[float]:
        """The reward model's scores."""
        directory = self.stage.earlier_model(2)
        model = Scorer(load_scorer(directory, self.chat_format, self.stage.dtype)).to(self.stage.ranks.device).eval()
        found = [0.0] * len(answers.samples)
        for rows, batch in self.batches(answers.rows):
            for row, score in zip(rows, at_last_token(model(batch), batch).tolist(), strict=True):
                found[row] = score
        return found

    def batches(self, rows: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[list[int], TokenBatch]]:
        plan = plan_micro_batches([len(prompt) + len(response) for prompt, response in rows], self.budget)[0]
        device = self.stage.ranks.device
        return [(m.rows, TokenBatch.of([rows[row] for row in m.rows], device)) for m in plan]
