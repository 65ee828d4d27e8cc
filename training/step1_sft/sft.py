"""Supervised fine-tuning on top of the shared loop."""

import torch
from torch import Tensor

from inference.chat_format import ChatFormat
from inference.generation.engine import GenerationEngine
from inference.generation.sampler import SamplingKey, SamplingSettings
from training.data.batching import TokenBatch, plan_micro_batches
from training.data.rows import count_updates
from training.data.token_cache import TokenRows, Tokens
from training.evaluation.statistics import perplexity
from training.hybrid_engine.deepspeed_setup import loads
from training.hybrid_engine.zero_engine import ZeroEngine
from training.models.loading import load_causal_lm
from training.models.policy import Policy
from training.stage import Stage
from training.steps import DEMONSTRATIONS
from training.supervised import Task, fit

FIRST_ANSWER_TOKENS = 32


def train(stage: Stage) -> None:
    config, settings = stage.config, stage.config.sft
    source = stage.model_directory(config.model)
    chat_format = stage.chat_format(source)
    rows, held_out = stage.rows(chat_format)
    encoded = within_budget(stage.tokens(rows, DEMONSTRATIONS, chat_format), settings.token_budget)
    total = count_updates(len(encoded), settings)

    dtype, with_weights = loads(settings.optimizer.zero_stage, stage.dtype, stage.ranks)
    model = load_causal_lm(source, chat_format, dtype, settings.dropout, with_weights)
    policy = Policy(model, settings.optimizer.lora)
    fits = settings.optimizer.zero_stage < 3 or stage.ranks.device.type == "cpu"
    if stage.ranks.is_first and fits and not stage.checkpoints.numbers():
        say_first_answer(stage, policy.to(stage.ranks.device), chat_format, (held_out or rows)[0])
    engine = ZeroEngine(policy, settings.optimizer, stage.dtype, total, stage.ranks, settings.dropout > 0)
    evaluated = stage.tokens(held_out[: settings.eval_rows], DEMONSTRATIONS, chat_format)
    task = SFTTask(stage, engine, encoded, evaluated)
    evaluation = fit(stage, task, settings, total)

    stage.save_trained(engine, lambda: load_causal_lm(source, chat_format, torch.float32), chat_format)
    stage.finish({"optimizer_steps": total, "rows": len(encoded), **evaluation})


def say_first_answer(stage: Stage, policy: Policy, chat_format: ChatFormat, row: dict) -> None:
    """Say what the untrained model answers: a template or tokenizer that does not fit shows here, before training."""
    prompt = torch.tensor(chat_format.prompt_ids(row["prompt"], stage.config.data.max_prompt_tokens))
    engine = GenerationEngine(policy.model.eval(), chat_format.end_ids, chat_format.pad_id, slots=1)
    greedy = SamplingSettings(min(FIRST_ANSWER_TOKENS, stage.config.data.max_response_tokens), temperature=0.0)
    (sample,) = engine.generate([prompt], greedy, SamplingKey(stage.seed))
    question, answer = row["prompt"][-1]["content"], chat_format.decode(sample.response_ids)
    stage.display.say(f"SFT: before training, the answer to {question[:80]!r} is {answer!r}")


def within_budget(rows: TokenRows, token_budget: int) -> TokenRows:
    """Take the first rows that together have at most `token_budget` tokens (0: all), but one at least."""
    return rows.first(max(1, int((rows.ends <= token_budget).sum()))) if token_budget else rows


class SFTTask(Task):
    name = "SFT"

    def __init__(self, stage: Stage, engine: ZeroEngine, rows: TokenRows, held_out: TokenRows):
        self.stage, self.engine, self.rows, self.held_out = stage, engine, rows, held_out
        self.lengths: list[int] = rows.sizes.tolist()

    def file_index(self, row: int) -> int:
        return row

    def size(self, rows: list[int]) -> int:
        return int(self.rows.lengths[rows, 1].sum())

    def loss(self, rows: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the negative log-likelihood of the response tokens."""
        logprobs, entropy = self.engine(self._batch([self.rows[row] for row in rows]))
        return -logprobs.sum(), {"entropy": entropy.sum()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Measure loss per response token and perplexity on held-out rows."""
        lengths = self.held_out.sizes.tolist()
        if not lengths:
            return {}
        ranks = self.stage.ranks
        plan = plan_micro_batches(lengths, self.stage.config.sft.micro_batch_tokens, ranks.size)
        sums = {"loss": 0.0, "tokens": 0.0}
        for micro_batch in plan[ranks.rank]:
            logprobs, _ = self.engine(self._batch([self.held_out[row] for row in micro_batch.rows]))
            sums["loss"] -= float(logprobs.sum()) * micro_batch.weight
            sums["tokens"] += len(logprobs) * micro_batch.weight
        sums = ranks.sum_values(sums)
        loss = sums["loss"] / sums["tokens"]
        return {"eval/loss": loss, "eval/perplexity": perplexity(loss)}

    def _batch(self, rows: list[Tokens]) -> TokenBatch:
        return TokenBatch.of(rows, self.stage.ranks.device)
