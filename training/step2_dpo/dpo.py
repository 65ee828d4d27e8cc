"""Direct preference optimisation on top of the shared loop."""

from typing import Any

import torch
from torch import Tensor

from inference.chat_format import ChatFormat
from training import calls
from training.data.batching import plan_micro_batches, sent
from training.data.rows import count_updates
from training.data.token_cache import TokenPair, grouped, shares_of, tokens_of
from training.formulas.losses import DPO_LOSSES, Pairs, implicit_rewards
from training.formulas.own import loaded
from training.hybrid_engine.deepspeed_setup import loads
from training.hybrid_engine.zero_engine import ZeroEngine
from training.models.loading import load_causal_lm
from training.models.policy import Policy
from training.stage import Stage, read_at_once
from training.step2_dpo.reference import Work, load_own_reference, reference_logprobs, response_logprobs
from training.step2_dpo.unpaired import unpaired_work
from training.steps import SFT
from training.supervised import Task, fit, rows_trained_on

HELD_OUT = {
    "loss": "eval/loss",
    "accuracy": "eval/accuracy",
    "margin": "eval/margin",
    "reward/chosen": "eval/reward/chosen",
    "reward/rejected": "eval/reward/rejected",
    "logprobs/chosen": "eval/logprobs/chosen",
    "logprobs/rejected": "eval/logprobs/rejected",
    "nll": "eval/nll",
}
"""Metric of training pairs -> that of held-out pairs."""


def train(stage: Stage) -> None:
    """Run the whole step: set up, ask the reference, fit, save."""
    settings = stage.settings
    source = stage.earlier_model(SFT)
    chat_format = ChatFormat.load(source)
    for note in chat_format.notes:
        stage.display.say(note)
    rows, held_out = stage.rows(chat_format)
    work = (unpaired_work if settings.is_unpaired else paired_work)(stage, rows, held_out, chat_format)
    total = count_updates(work.rows, settings)

    if own := stage.own_reference():  # asked, and forgotten, before the policy is there
        reference_logprobs(stage, lambda: load_own_reference(stage, own, chat_format), work.sets, work.needed)
    dtype, with_weights = loads(settings.optimizer.zero_stage, stage.dtype, stage.ranks)
    model = load_causal_lm(source, chat_format, dtype, settings.dropout, with_weights)
    policy = Policy(model, settings.optimizer.lora)
    engine = ZeroEngine(policy, settings.optimizer, stage.dtype, total, stage.ranks, settings.dropout > 0)
    made: dict[str, Any] = {"pairs": work.sets}
    evaluation: dict[str, float] = {}
    for call in calls.DPO:
        inputs = {key: made[key] for key in call.inputs}
        if call.kind == "score":
            made[call.outputs[0]] = reference_logprobs(stage, lambda: engine, **inputs, needed=work.needed)
        else:
            evaluation = fit(stage, work.task(stage, engine, **inputs), settings, total)

    stage.save_trained(engine, lambda: load_causal_lm(source, chat_format, torch.float32), chat_format)
    stage.finish({"optimizer_steps": total, "rows": work.rows, "held_out": work.compared, **evaluation})


def paired_work(stage: Stage, rows: list[dict], held_out: list[dict], chat_format: ChatFormat) -> Work:
    pairs = stage.token_pairs(rows, chat_format)
    evaluated = stage.token_pairs(held_out[: stage.settings.eval_rows], chat_format)
    groups = grouped(pairs, stage.settings.by_prompt)
    needed = [groups[row] for row in rows_trained_on(len(groups), stage.settings, stage.seed)]
    return Work({"train": pairs, "eval": evaluated}, needed, len(groups), len(evaluated), DPOTask)


class DPOTask(Task):
    name = "DPO"

    def __init__(
        self,
        stage: Stage,
        engine: ZeroEngine,
        pairs: dict[str, list[TokenPair]],
        reference_logprobs: dict[str, Tensor],
    ):
        """Both have a `train` and an `eval` set."""
        self.stage, self.engine, self.settings = stage, engine, stage.settings
        self.pairs, self.reference_logprobs = pairs, reference_logprobs
        self.of_pairs = loaded(DPO_LOSSES, self.settings.loss)
        self.groups = {name: grouped(each, self.settings.by_prompt and name == "train") for name, each in pairs.items()}
        self.lengths = [tokens_of([pairs["train"][place] for place in group]) for group in self.groups["train"]]

    def place(self, row: int) -> int:
        return self.pairs["train"][self.groups["train"][row][0]].place

    def size(self, rows: list[int]) -> int:
        """Count pairs, or prompts."""
        return len(rows)

    def loss(self, rows: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss of the pairs, and what the policy thinks of them."""
        return self._losses("train", rows)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Measure the same on held-out pairs."""
        held_out = self.pairs["eval"]
        if not held_out:
            return {}
        ranks = self.stage.ranks
        plan = plan_micro_batches([pair.tokens for pair in held_out], self.settings.micro_batch_tokens, ranks.size)
        sums: dict[str, float] = {}
        found = [self._losses("eval", micro_batch.rows) for micro_batch in plan[ranks.rank]]
        values = read_at_once([{"loss": loss, **measured} for loss, measured in found])
        for micro_batch, measured in zip(plan[ranks.rank], values, strict=True):
            for name, value in measured.items():
                sums[name] = sums.get(name, 0.0) + value * micro_batch.weight
        return {HELD_OUT[name]: value / len(held_out) for name, value in ranks.sum_values(sums).items()}

    def _losses(self, name: str, rows: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss of pairs of a set, with sums of accuracy, margin, rewards and log-probabilities; of a prompt the
        means of its pairs."""
        groups, device = [self.groups[name][row] for row in rows], self.stage.ranks.device
        logprobs = response_logprobs(self.engine, [[self.pairs[name][i] for i in group] for group in groups], device)
        places = [place for group in groups for place in group]
        pairs, shares = [self.pairs[name][place] for place in places], shares_of(groups, device)
        lengths = sent([[len(p.chosen) for p in pairs], [len(p.rejected) for p in pairs]], device)
        reference = self.reference_logprobs[name][:, places].to(device, non_blocking=True)
        divided_by = lengths if self.settings.length_normalized else None
        rewards = implicit_rewards(logprobs, reference, divided_by, self.settings.beta)
        loss = self.of_pairs.formula(Pairs(rewards[0], rewards[1], self.settings.beta, self.settings.label_smoothing))
        margins = rewards[0] - rewards[1]
        measured = {
            "accuracy": (margins > 0).float() + 0.5 * (margins == 0),  # a tie counts half
            "margin": margins,
            "reward/chosen": rewards[0],
            "reward/rejected": rewards[1],
            "logprobs/chosen": logprobs[0],
            "logprobs/rejected": logprobs[1],
        }
        if self.settings.sft_coefficient:
            nll = -logprobs[0] / lengths[0]
            loss, measured["nll"] = loss + self.settings.sft_coefficient * nll, nll
        return (loss * shares).sum(), {name: (value * shares).sum().detach() for name, value in measured.items()}
