"""Is PPO well? The reward model and the first update are checked, held-out prompts measured, metrics watched."""

import time
from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from inference.chat_format import ChatFormat
from inference.generation.sampler import SamplingKey
from training.calls import REWARD_SCORE
from training.data.batching import MicroBatch, TokenBatch, plan_micro_batches
from training.data.rows import read_rows
from training.data.split import once
from training.data.token_cache import TokenPair, rows_of
from training.evaluation.comparison import EVALUATION_ITERATION
from training.evaluation.statistics import DOUBTFUL_ACCURACY, distinct_bigrams, mean
from training.rewards import Rewards
from training.run_directory import read_json, write_json
from training.stage import Diverged, Stage
from training.step3_rlhf import ppo_math
from training.step3_rlhf.experience import Experience, token_batch
from training.step3_rlhf.positions import CallPosition
from training.step3_rlhf.ppo_math import kl_k3
from training.step3_rlhf.roles import Roles
from training.step3_rlhf.rollout import Rollouts
from training.steps import REWARD

WINDOW = 5
"""Iterations that make a beginning, and a recent past."""
KL_GROWTH, KL_FLOOR = 3.0, 5.0
"""KL to the reference this many times its recent mean, and over so many nats a response."""
KL_PER_TOKEN = 0.5
"""Nats a token, at KL_FLOOR or more a response: far from the reference, however slowly it got there."""
KL_DRIFT, DRIFT_FLOOR = 5.0, 20.0
"""KL to the reference this many times that of the beginning, and over so many nats a response."""
LENGTH_CHANGE = 3.0
"""Responses this many times longer, or shorter, than in the beginning."""
REPETITION = 0.5
"""Share of the beginning's distinct bigrams that is left."""
CRITIC_PATIENCE = 10
"""Consecutive iterations in which the critic explains less than a constant."""
LENGTH_CORRELATION, CORRELATION_RISE = 0.5, 0.3
"""Correlation of score and length over the recent past, and how far over that of the beginning."""
ALIKE, NO_SPREAD = 3, 1e-6
"""Consecutive iterations whose scores do not differ, and a deviation that is none."""
CLIPPED = 0.1
"""Share of the scores beyond rlhf.score_clip."""
PENALTY = 10.0
"""The penalty for a missing end over the spread of the scores beside it."""


class Watch:
    """Says what a collapse of PPO looks like, from the metrics of each iteration in order and from nothing else.

    So a resumed run that reads its metrics.jsonl again warns like one nobody stopped.
    """

    def __init__(self, end_penalty: float = 0.0, iterations: int = ALIKE) -> None:
        """`end_penalty` is rlhf.missing_end_penalty, `iterations` how many the run has."""
        self.end_penalty, self.alike = end_penalty, min(ALIKE, iterations)
        self.history: list[dict[str, float]] = []
        self.said: set[str] = set()

    def look(self, metrics: dict[str, float]) -> tuple[dict[str, float], list[str]]:
        """Return a metric of every sign, 1 where it shows in this iteration, else 0 (none of KL where it is not
        measured); and the sentences of new ones."""
        self.history.append(metrics)
        signs: dict[str, str] = {}
        if "kl/reference" in metrics:
            signs |= {
                "warning/kl": self._kl(),
                "warning/kl_far": self._kl_far(metrics),
                "warning/kl_drift": self._kl_drift(),
            }
        signs |= {
            "warning/length": self._length(),
            "warning/repetition": self._repetition(),
            "warning/critic": self._critic(),
            "warning/length_reward": self._length_reward(),
            "warning/alike": self._alike(),
            "warning/clip": self._clip(metrics),
            "warning/end_penalty": self._end_penalty(metrics),
            "warning/truncated": self._truncated(metrics),
        }
        new = [sentence for name, sentence in signs.items() if sentence and name not in self.said]
        self.said |= {name for name, sentence in signs.items() if sentence}
        return {name: float(bool(sentence)) for name, sentence in signs.items()}, new

    def _values(self, name: str) -> list[float]:
        return [metrics[name] for metrics in self.history if name in metrics]

    def _kl(self) -> str:
        *before, now = self._values("kl/reference")
        if len(before) < WINDOW or now < max(KL_FLOOR, KL_GROWTH * fmean(before[-WINDOW:])):
            return ""
        return (
            f"the KL to the reference jumped to {now:.1f} nats a response, from {fmean(before[-WINDOW:]):.1f}; raise "
            f"rlhf.kl.coefficient or lower the actor's learning rate"
        )

    def _kl_far(self, metrics: dict[str, float]) -> str:
        now, per_token = metrics.get("kl/reference", 0.0), metrics.get("kl/reference_per_token", 0.0)
        if now < KL_FLOOR or per_token < KL_PER_TOKEN:
            return ""
        return (
            f"the policy is {per_token:.2f} nats a token from the reference ({now:.1f} a response), where a reward "
            f"says little about it; raise rlhf.kl.coefficient, or bound it with rlhf.kl.stop"
        )

    def _kl_drift(self) -> str:
        first, now = self._beginning("kl/reference")
        if now < max(DRIFT_FLOOR, KL_DRIFT * first):
            return ""
        return (
            f"the KL to the reference has grown to {now:.1f} nats a response, from {first:.1f} in the beginning; read "
            f"samples.jsonl, raise rlhf.kl.coefficient, or bound it with rlhf.kl.stop"
        )

    def _length(self) -> str:
        first, now = self._beginning("response/length_mean")
        if not first or first / LENGTH_CHANGE < now < first * LENGTH_CHANGE:
            return ""
        return (
            f"responses have {now:.0f} tokens, in the beginning they had {first:.0f}; read samples.jsonl, and see "
            f"whether the reward likes this length"
        )

    def _repetition(self) -> str:
        first, now = self._beginning("response/distinct_bigrams")
        if not first or now > REPETITION * first:
            return ""
        return (
            f"responses repeat themselves ({now:.0%} distinct bigrams, {first:.0%} in the beginning); read "
            f"samples.jsonl, raise rlhf.kl.coefficient or go back to an earlier checkpoint"
        )

    def _critic(self) -> str:
        recent = self._values("value/explained_variance")[-CRITIC_PATIENCE:]
        if len(recent) < CRITIC_PATIENCE or max(recent) >= 0:
            return ""
        return (
            f"the critic has explained less than a constant for {CRITIC_PATIENCE} iterations; raise its learning rate "
            f"or rlhf.critic_warmup"
        )

    def _length_reward(self) -> str:
        values = self._values("reward/length_correlation")
        if len(values) < 2 * WINDOW:
            return ""
        first, now = fmean(values[:WINDOW]), fmean(values[-WINDOW:])
        if now < LENGTH_CORRELATION or now - first < CORRELATION_RISE:
            return ""
        return (
            f"scores follow length (correlation {now:z.2f}, {first:z.2f} in the beginning): the policy may fool the "
            f"reward with it; balance the pairs by length"
        )

    def _alike(self) -> str:
        recent = self.history[-self.alike :]
        differ = any(
            metrics.get("reward/scaled_std", 1.0) > NO_SPREAD and metrics.get("reward/groups_alike", 0.0) < 1
            for metrics in recent
        )
        if len(recent) < self.alike or differ:
            return ""
        return (
            f"in {self.alike} iterations no answer had another score than those it is compared with, so the policy "
            f"follows noise and penalties; see what gives the scores (samples.jsonl), or compare more answers"
        )

    def _clip(self, metrics: dict[str, float]) -> str:
        share = metrics.get("reward/clipped_fraction", 0.0)
        if share <= CLIPPED:
            return ""
        return (
            f"{share:.0%} of the responses have scores beyond rlhf.score_clip, which all count the same, so nothing is "
            f"learned from their differences; raise it, or set it to 0"
        )

    def _end_penalty(self, metrics: dict[str, float]) -> str:
        spread, ended = metrics.get("reward/scaled_std", 0.0), metrics.get("response/ended_fraction", 1.0)
        if not 0 < ended < 1 or not 0 < spread * PENALTY < self.end_penalty:
            return ""
        return (
            f"a missing end costs {self.end_penalty:g}, and the scores differ by {spread:.2g}: the policy learns to "
            f"end and hardly anything else; lower rlhf.missing_end_penalty to about that"
        )

    def _truncated(self, metrics: dict[str, float]) -> str:
        if metrics.get("update/mini_batches", 1):
            return ""
        return (
            "no answer ended, and with rlhf.mask_truncated nothing is learned from such; raise "
            "data.max_response_tokens, or set it to false"
        )

    def _beginning(self, name: str) -> tuple[float, float]:
        """Return the mean over the first iterations, and the value now; 0 and 0 while it is the beginning."""
        values = self._values(name)
        return (fmean(values[:WINDOW]), values[-1]) if len(values) > WINDOW else (0.0, 0.0)


ITERATION = EVALUATION_ITERATION + 1
"""The iteration in its sampling keys: no other iteration's, and not that of the comparison at the end."""


class HeldOut:
    """Evaluates on the prompts of rlhf.eval_every, the same each time, answered with the same random numbers.

    They are the last of the run's held-out prompts; the comparison at the end takes the first ones.
    """

    def __init__(
        self, stage: Stage, rollouts: Rollouts, rewards: Rewards, chat_format: ChatFormat, rows: Sequence[dict]
    ):
        self.stage, self.rollouts, self.rewards, self.chat_format = stage, rollouts, rewards, chat_format
        settings, limit = stage.config.rlhf, stage.config.data.max_prompt_tokens
        self.rows = once(rows, evaluation=True)[-settings.eval_prompts :] if settings.eval_every else []
        self.prompts = [encode_prompt(row, chat_format, limit) for row in self.rows]

    def measure(self) -> dict[str, float]:
        """Return the present policy's metrics. All ranks call it and get the same. Raises RewardFailed."""
        begun = time.perf_counter()
        experience = self.rollouts.answers(self.prompts, SamplingKey(self.stage.seed, ITERATION))
        texts = [self.chat_format.decode(e.response.tolist()) for e in experience]
        prompts, extras = zip(*((row["prompt"], row.get("extra", {})) for row in self.rows), strict=True)
        totals, means = self.rewards.total([e.score for e in experience], list(prompts), texts, list(extras), group=1)
        kl = {"eval/kl": mean_kl(experience)} if self.stage.config.rlhf.has_reference else {}
        return {
            "eval/reward": mean(totals),
            **{f"eval/reward/{name}": value for name, value in means.items() if len(means) > 1},
            **kl,
            "eval/length": mean([len(e.response) for e in experience]),
            "eval/ended_fraction": mean([e.ended for e in experience]),
            "eval/distinct_bigrams": distinct_bigrams(texts),
            "time/evaluate": time.perf_counter() - begun,
        }


def encode_prompt(row: dict, chat_format: ChatFormat, max_tokens: int) -> Tensor:
    return torch.tensor(chat_format.prompt_ids(row["prompt"], max_tokens))


def rank_within(bound: float, evaluation: Mapping[str, float]) -> tuple[float] | None:
    """Rank for keep=best: by reward, None where the KL is over the bound. Without a reference it is not measured."""
    return (evaluation["eval/reward"],) if evaluation.get("eval/kl", 0.0) <= bound else None


def mean_kl(experience: list[Experience]) -> float:
    """Return the mean KL to the reference, nats a response (k3)."""
    return mean([float(kl_k3(e.logprobs, e.reference_logprobs).sum()) for e in experience])


def look_at_reward_model(stage: Stage, roles: Roles, chat_format: ChatFormat) -> None:
    """Say the accuracy: as step 2 measured it, else measured here, and saved for later starts in reward_accuracy.json.

    All ranks call it.
    """
    if not stage.config.rlhf.has_reward_model:
        return
    if of_step_2 := stage.ranks.tell(accuracy_of_step_2(stage), "a look at step 2's accuracy"):
        stage.display.say(sentence(*of_step_2))
        return
    file = stage.directory.reward_accuracy_file
    known = stage.ranks.tell(file.exists(), "a look at the reward model's accuracy")
    stage.ranks.see(file)
    measured = read_json(file, f"delete {file}") if known else measure(stage, roles, chat_format)
    if not known and stage.ranks.is_first:
        write_json(file, measured)
    stage.display.say(sentence(measured["accuracy"], measured["pairs"]))


def accuracy_of_step_2(stage: Stage) -> tuple[float, int] | None:
    """Return the accuracy of the reward model that this run trained, and on how many pairs; None for another model, or
    an early version's."""
    step = stage.run.step(REWARD)
    if stage.config.given_model(REWARD) or not (stage.ranks.is_first and step.is_finished):
        return None
    accuracy = step.read_result().get("reward_accuracy", {}).get("all")
    return (accuracy["rate"], accuracy["pairs"]) if accuracy else None


def measure(stage: Stage, roles: Roles, chat_format: ChatFormat) -> dict[str, float]:
    """Measure the accuracy on the run's held-out pairs, and count them."""
    file = stage.run.data / "pairs_eval.jsonl"
    stage.ranks.see(file)
    rows = read_rows(file) if file.exists() else []
    pairs = stage.token_pairs(rows[: stage.config.reward.eval_rows], chat_format) if rows else []
    position, right = roles.positions.get(REWARD_SCORE.name), 0.0
    with roles.scoring(), roles.present([REWARD_SCORE]):
        shares = shared(pairs, position, stage.config.rlhf.micro_batch_tokens) if pairs and position else []
        texts = (rows_of([pairs[row] for row in share.rows]) for share in shares)
        scores = roles.score("reward", [TokenBatch.of(rows, stage.ranks.device) for rows in texts]) if shares else []
        for share, of_share in zip(shares, scores, strict=bool(scores)):
            chosen, rejected = of_share.chunk(2)
            right += float((chosen > rejected).sum()) * share.weight
    speaks = position is not None and position.speaks
    right = float(stage.ranks.sum(torch.tensor([right if speaks else 0.0]))[0])
    return {"accuracy": right / max(1, len(pairs)), "pairs": len(pairs)}


def shared(pairs: list[TokenPair], position: CallPosition, tokens: int) -> list[MicroBatch]:
    """Return this rank's part of the pairs, in micro-batches of so many tokens."""
    data = position.assignment.layout.data
    return plan_micro_batches([pair.tokens for pair in pairs], tokens, data)[position.data_rank]


def sentence(accuracy: float, pairs: float) -> str:
    if not pairs:
        return (
            "Warning: the data hold out no pairs of a chosen and a rejected answer, so it is not known how well the "
            "reward model ranks answers; PPO follows it unseen."
        )
    if accuracy >= DOUBTFUL_ACCURACY:
        return f"Reward model: {accuracy:.1%} of {pairs} held-out pairs ranked right"
    return (
        f"Warning: the reward model ranks only {accuracy:.1%} of {pairs} held-out pairs right, a coin 50%. PPO will "
        f"follow noise. Stop here (Ctrl-C) and give a better one (rlhf-chat rlhf RUN --reward-model MODEL, with a "
        f"new RUN), or train step 2 again in a new run: more pairs, more reward.epochs or reward.max_steps, a "
        f"higher reward.optimizer.learning_rate, or a larger --reward-model; and read twenty "
        f"pairs: can you tell which is chosen? (docs/step2_reward.md)"
    )


# Mean absolute difference of log-probabilities between cached decoding and the training forward that rounding explains.
# Logits near 16 are 1/16 apart in bf16; a wrong mask or position makes differences of several nats.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.02}


def check_first_update(stage: Stage, roles: Roles, experience: list[Experience]) -> None:
    """Compare training with generation on the shortest micro-batches of every rank.

    The actor has not changed since it generated, so the ratio must be 1 and the KL from old to new 0: a wrong mask,
    position, temperature or weight shows here. Raises Diverged with an explanation.
    """
    settings, ranks = stage.config.rlhf, stage.ranks
    whole = settings.min_response_tokens == 0  # else generation drew from a distribution without the end token
    position, ours = roles.positions.get("actor_train"), None
    if position is not None:
        shortest = sorted(experience, key=lambda e: e.length)[: -(-len(experience) // settings.mini_batches)]
        rows = [shortest[row] for row in position.micro_batches([e.length for e in shortest])[-1].rows]
        for of_rows in roles.logprobs([token_batch(rows, ranks.device)]):
            logprobs = of_rows.cpu()
            generated = torch.cat([e.generation_logprobs for e in rows])
            old = torch.cat([e.logprobs for e in rows])
            difference = float((logprobs - generated).abs().mean()) if whole else 0.0
            error, kl = float(((logprobs - old).exp() - 1).abs().mean()), float(ppo_math.kl_k3(old, logprobs).mean())
            ours = difference, error, kl
    of_ranks = [of_rank for of_rank in ranks.gather(ours) if of_rank is not None]
    worst, ratio_error = (max(of_rank[i] for of_rank in of_ranks) for i in (0, 1))
    tolerance = TOLERANCE[stage.dtype]
    if worst > tolerance or ratio_error > tolerance:
        raise Diverged(
            f"Before the first update, log-probabilities from generation and from training differ by {worst:.2g} on "
            f"average and the policy ratio from 1 by {ratio_error:.2g} (allowed: {tolerance:g}); training on them "
            f"would teach nonsense. Try dtype=fp32, and report the model: this is a bug."
        )
    checked = {"ratio_error": ratio_error, "kl_old": of_ranks[0][2]}
    if whole:
        checked["generation_logprob_difference"] = worst
    if ranks.is_first:  # beside the metrics, not in them: a resumed run has more starts, and equal metrics
        write_json(stage.directory.path / "first_update.json", checked)
    apart = "equal to the bit" if whole and worst == 0 else f"within {worst:.1e} on average"
    stage.display.say(
        f"PPO: first update checked: ratio 1 within {ratio_error:.1e}, log-probabilities of generation and training "
        f"{apart}"
    )
