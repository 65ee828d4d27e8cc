"""What a collapse of PPO looks like in its metrics, iteration by iteration.

A function of the metrics alone, so a resumed run that reads its metrics.jsonl again warns like one nobody stopped.
"""

from statistics import fmean

WINDOW = 5
"""Iterations that make a beginning, and a recent past."""
KL_GROWTH, KL_FLOOR = 3.0, 5.0
"""KL to the reference this many times its recent mean, and over so many nats a response."""
LENGTH_CHANGE = 3.0
"""Responses this many times longer, or shorter, than in the beginning."""
REPETITION = 0.5
"""Share of the beginning's distinct bigrams that is left."""
CRITIC_PATIENCE = 10
"""Iterations in a row in which the critic explains less than a constant."""
LENGTH_CORRELATION, CORRELATION_RISE = 0.5, 0.3
"""Correlation of score and length over the recent past, and how far over that of the beginning."""

KINDS = ("kl", "length", "repetition", "critic", "length_reward")


class Watch:
    """Reads each iteration's metrics once, in order."""

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []
        self.said: set[str] = set()

    def look(self, metrics: dict[str, float]) -> tuple[dict[str, float], list[str]]:
        """`warning/KIND` for every kind: 1 where it shows in this iteration, else 0; and the sentences of new ones."""
        self.history.append(metrics)
        found = {
            kind: sentence
            for kind, sentence in zip(
                KINDS,
                (self._kl(), self._length(), self._repetition(), self._critic(), self._length_reward()),
                strict=True,
            )
            if sentence
        }
        new = [sentence for kind, sentence in found.items() if kind not in self.said]
        self.said |= found.keys()
        return {f"warning/{kind}": float(kind in found) for kind in KINDS}, new

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
            f"scores follow length (correlation {now:.2f}, {first:.2f} in the beginning): the policy may fool the "
            f"reward with it; balance the pairs by length"
        )

    def _beginning(self, name: str) -> tuple[float, float]:
        """Mean over the first iterations, and the value now; 0 and 0 while it is the beginning."""
        values = self._values(name)
        return (fmean(values[:WINDOW]), values[-1]) if len(values) > WINDOW else (0.0, 0.0)
