"""SFT and RLHF answer the same held-out prompts; scores, KL, length, variety and fluency of the answers."""

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
from training.data.upbeat import upbeat_score
from training.evaluation import statistics
from training.models.loading import load_causal_lm, load_scorer
from training.models.policy import Policy
from training.models.scorer import Scorer, at_last_token
from training.rewards import Rewards
from training.run_directory import write_json, write_text
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
    """Loads one model at a time: a laptop holds no four."""

    def __init__(self, stage: Stage):
        self.stage = stage
        self.chat_format = ChatFormat.load(stage.earlier_model(1))
        self.budget = stage.config.rlhf.micro_batch_tokens
        self.sources = Rewards(stage.config.rlhf, stage.ranks)

    def run(self) -> dict:
        """Measure and write evaluation.json and comparison.jsonl; returns what the former holds."""
        stage, config = self.stage, self.stage.config
        _, held_out = stage.rows(self.chat_format)
        held_out = held_out[: config.evaluation.prompts]
        limit = config.data.max_prompt_tokens
        prompts = [torch.tensor(self.chat_format.prompt_ids(row["prompt"], limit)) for row in held_out]

        sft_model, rlhf_model = stage.earlier_model(1), stage.run.require_model(3)
        sft, rlhf = self.answer(sft_model, prompts), self.answer(rlhf_model, prompts)
        untouched = stage.model_directory(config.model)
        sft_rewards, rlhf_rewards = self.rewards(sft, held_out), self.rewards(rlhf, held_out)
        result: dict[str, Any] = {
            "prompts": len(prompts),
            "sampling": {"temperature": config.rlhf.temperature, "max_tokens": config.data.max_response_tokens},
            "sft": self.measure(sft, sft_rewards, untouched),
            "rlhf": self.measure(rlhf, rlhf_rewards, untouched),
        }
        temperature = config.rlhf.temperature
        logratios = [
            float((ours - theirs).sum())
            for ours, theirs in zip(
                self.logprobs(rlhf_model, rlhf, temperature), self.logprobs(sft_model, rlhf, temperature), strict=True
            )
        ]
        result["rlhf"]["kl"] = statistics.mean(logratios)
        result["sft"]["kl"] = 0.0
        scores = self.judge(sft, sft_rewards), self.judge(rlhf, rlhf_rewards)
        result["win_rate"] = win_rate(scores, range(len(prompts))) | {"judge": self.judge_name}
        unseen = [i for i, row in enumerate(held_out) if row.get("held_out_question")]
        if 0 < len(unseen) < len(prompts):  # only the embedded default knows its questions
            result["win_rate_unseen_questions"] = win_rate(scores, unseen)
        rows = [
            {
                "prompt": row["prompt"],
                "sft": sft.texts[i],
                "rlhf": rlhf.texts[i],
                "sft_score": scores[0][i],
                "rlhf_score": scores[1][i],
            }
            for i, row in enumerate(held_out)
        ]
        write_text(stage.run.comparison_file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_json(stage.run.evaluation_file, result)
        return result

    @property
    def judge_name(self) -> str:
        if self.stage.config.evaluation.true_score == "upbeat":
            return "upbeat score (known rule)"
        return "reward" if self.sources.sources else "learned reward"

    def judge(self, answers: Answers, rewards: list[float]) -> list[float]:
        """The true score where the rule is known, else what PPO was told to raise."""
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

    def measure(self, answers: Answers, rewards: list[float], untouched: Path) -> dict[str, float]:
        """Everything about one model's answers that needs no second model's."""
        logprobs = self.logprobs(untouched, answers, 1.0)
        tokens = sum(len(row) for row in logprobs)
        lengths = [len(sample.response_ids) for sample in answers.samples]
        measured = {
            "reward" if self.sources.sources else "learned_reward": statistics.mean(rewards),
            "length": statistics.mean(lengths),
            "ended_fraction": statistics.mean([float(sample.ended) for sample in answers.samples]),
            "distinct_bigrams": statistics.distinct_bigrams(answers.texts),
            "most_frequent_share": statistics.most_frequent_share(answers.texts),
            "perplexity_untouched": math.exp(-float(sum(row.sum() for row in logprobs)) / tokens),
        }
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

    def rewards(self, answers: Answers, rows: list[dict]) -> list[float]:
        """What PPO was told to raise: the reward model's scores, with or without those of the user's sources."""
        of_model = self.learned_rewards(answers) if self.sources.has_model else []
        if not self.sources.sources:
            return of_model
        prompts, extras = [row["prompt"] for row in rows], [row.get("extra", {}) for row in rows]
        return self.sources.total(of_model, prompts, answers.texts, extras, group=1)[0]

    @torch.no_grad()
    def learned_rewards(self, answers: Answers) -> list[float]:
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
