"""What a collapse of PPO looks like in its metrics, iteration by iteration.

A function of the metrics alone, so a resumed run that reads its metrics.jsonl again warns like one nobody stopped.
"""

from statistics import fmean

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
"""Iterations in a row in which the critic explains less than a constant."""
LENGTH_CORRELATION, CORRELATION_RISE = 0.5, 0.3
"""Correlation of score and length over the recent past, and how far over that of the beginning."""
ALIKE, NO_SPREAD = 3, 1e-6
"""Iterations in a row whose scores do not differ, and a deviation that is none."""
CLIPPED = 0.1
"""Share of the scores beyond rlhf.score_clip."""
PENALTY = 10.0
"""The penalty for a missing end over the spread of the scores beside it."""


class Watch:
    """Reads each iteration's metrics once, in order."""

    def __init__(self, end_penalty: float = 0.0, iterations: int = ALIKE) -> None:
        """`end_penalty` is rlhf.missing_end_penalty, `iterations` how many the run has."""
        self.end_penalty, self.alike = end_penalty, min(ALIKE, iterations)
        self.history: list[dict[str, float]] = []
        self.said: set[str] = set()

    def look(self, metrics: dict[str, float]) -> tuple[dict[str, float], list[str]]:
        """Metrics of every kind, 1 where it shows in this iteration, else 0 (none of KL where it is not measured); and
        the sentences of new ones."""
        self.history.append(metrics)
        found: dict[str, str] = {}
        if "kl/reference" in metrics:
            found |= {
                "warning/kl": self._kl(),
                "warning/kl_far": self._kl_far(metrics),
                "warning/kl_drift": self._kl_drift(),
            }
        found |= {
            "warning/length": self._length(),
            "warning/repetition": self._repetition(),
            "warning/critic": self._critic(),
            "warning/length_reward": self._length_reward(),
            "warning/alike": self._alike(),
            "warning/clip": self._clip(metrics),
            "warning/end_penalty": self._end_penalty(metrics),
            "warning/truncated": self._truncated(metrics),
        }
        new = [sentence for name, sentence in found.items() if sentence and name not in self.said]
        self.said |= {name for name, sentence in found.items() if sentence}
        return {name: float(bool(sentence)) for name, sentence in found.items()}, new

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
        now, each = metrics.get("kl/reference", 0.0), metrics.get("kl/reference_per_token", 0.0)
        if now < KL_FLOOR or each < KL_PER_TOKEN:
            return ""
        return (
            f"the policy is {each:.2f} nats a token from the reference ({now:.1f} a response), where a reward says "
            f"little about it; raise rlhf.kl.coefficient, or bound it with rlhf.kl.stop"
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
        """Mean over the first iterations, and the value now; 0 and 0 while it is the beginning."""
        values = self._values(name)
        return (fmean(values[:WINDOW]), values[-1]) if len(values) > WINDOW else (0.0, 0.0)
