"""Whether to fuse the next rollout, and with which threshold: the simulator's advice on measured lengths and costs."""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any, Literal

from training.fusion.board import FusionPolicy, SampleLengths
from training.fusion.costs import Costs, LengthStatistics, Measured, fit
from training.fusion.simulator import DecodingInstance, SimulatorConfig, fused, fused_from, serial

Mode = Literal["none", "inter", "auto"]
WORTH = 0.02
"""Share of generation and scoring that fusion, or another threshold, must save to be taken up."""
DRIFT = 0.05
"""Relative change of the mean length after which the threshold is chosen again."""
WRONG = 0.1
"""Relative error of the costs after which they are fitted again."""
FITTED = 4
"""Rollouts whose measurements the costs are fitted to."""
DRAWS = 4
"""Imagined rollouts that a threshold is judged by."""
THRESHOLDS = 8
FINALISTS = 4
"""Policies that are judged by all imagined rollouts: the best ones of the first."""
TICKS = 64
"""Ticks in a rollout, about."""
NOMINAL = Costs(rows=(1,), step=(1.0,), per_context=0.0, prefill=(1.0, 0.0), score=(0.0, 1e-3))
"""Before anything is measured: every step takes as long as every other."""
NOMINAL_TICK = 4.0
"""The tick in seconds of NOMINAL, which are decode steps."""


@dataclass(frozen=True)
class FusionSetup:
    """Holds what does not change during a run."""

    mode: Mode
    instances: int
    tensor: int
    slots: int
    samples: int
    """The samples of an iteration."""
    micro_batch_tokens: int
    unit_tokens: int
    threshold: int = 0
    """0: the simulator chooses."""
    rows: int = 0
    """0: the simulator chooses."""
    overlaps: bool = False
    """Whether a rank can score beside decoding (CUDA)."""
    seed: int = 0
    off: str = "switched off"
    """The reason for no fusion, where that is the mode."""

    @property
    def shape(self) -> list[int]:
        """What costs and policies hold for."""
        return [self.instances, self.tensor, self.slots]


@dataclass
class FusionChoice:
    """Gives a policy, or None for no fusion, and the reason."""

    policy: FusionPolicy | None
    reason: str
    expected: float = 0.0
    """Seconds of generation and scoring; 0: not known."""
    expected_serial: float = 0.0
    mean_length: float = 0.0
    """The mean length that it was chosen for."""

    def __str__(self) -> str:
        if self.policy is None:
            return f"fusion: none ({self.reason})"
        what = f"fusion: inter, threshold {self.policy.threshold}, {self.policy.rows} rows an instance ({self.reason})"
        return (
            f"{what}, expected {self.expected:.2f} s, {self.expected_serial:.2f} s without" if self.expected else what
        )


@dataclass
class FusionChooser:
    """Chooses before each rollout and learns after it; checkpoints save it.

    The first rank chooses and learns, and tells the others: `decided`, `take`. Lengths are known to all.
    """

    setting: FusionSetup
    lengths: LengthStatistics
    costs: Costs | None = None
    current: FusionChoice | None = None
    prompts: list[int] = field(default_factory=list)
    """Prompt lengths of the last rollout."""
    measured: deque[list[Measured]] = field(default_factory=lambda: deque(maxlen=FITTED))
    """Measurements of the last rollouts; checkpoints save the costs instead."""
    bandwidth: float = 1e9
    cache_bytes: int = 0
    overlap: float | None = None
    """Seconds of a rollout that scored beside decoding over those that it would have taken without; None: not tried."""
    is_warm: bool = False
    """Whether this process has made a rollout: the first one runs cold code, and its seconds say nothing."""

    def next(self, number: int) -> FusionChoice:
        if self.current is None or self._is_stale():
            self.current = self.choose(number)
        return self.current

    def _is_stale(self) -> bool:
        assert self.current is not None
        was = self.current.mean_length
        return self.costs is not None and (was == 0 or abs(self.lengths.mean / was - 1) > DRIFT)

    def choose(self, number: int) -> FusionChoice:
        """Decide again, from what is known now."""
        setting = self.setting
        if setting.mode == "none":
            return FusionChoice(None, setting.off)
        if setting.instances == 1:
            return self._for_one_instance()
        if self.costs is None or not self.prompts:
            if setting.mode == "inter":
                threshold = setting.threshold or max(1, setting.samples // 5)  # RLHFuse found the best near 20 %
                return FusionChoice(
                    self._policy(threshold, setting.rows or setting.slots, NOMINAL_TICK), "asked for; not measured yet"
                )
            return FusionChoice(None, "costs are being measured")
        return self._simulated(number)

    def _for_one_instance(self) -> FusionChoice:
        """Score between or beside the decode steps of the only instance: as asked for, or if a trial paid."""
        setting = self.setting
        interleaved = self._policy(0, setting.slots, NOMINAL_TICK, interleaves=True)
        if setting.mode == "inter":
            return FusionChoice(interleaved, "asked for")
        if not setting.overlaps:
            return FusionChoice(None, "one instance: its ranks decode and score with the same cores", mean_length=1.0)
        if self.costs is None:
            return FusionChoice(None, "costs are being measured")
        if self.overlap is None:
            return FusionChoice(interleaved, "tried once, to see what it saves", mean_length=self.lengths.mean)
        saved = 1 - self.overlap
        if saved < WORTH:
            return FusionChoice(None, f"tried once, it saved {max(0.0, saved):.1%}", mean_length=self.lengths.mean)
        return FusionChoice(interleaved, f"it saves {saved:.1%}", mean_length=self.lengths.mean)

    def _simulated(self, number: int) -> FusionChoice:
        """Choose the best of a grid of thresholds over imagined rollouts; the current one stays unless another is
        better."""
        setting, costs = self.setting, self.costs
        assert costs is not None
        config = SimulatorConfig(costs, setting.slots, setting.tensor, setting.micro_batch_tokens)
        drawn = random.Random(f"{setting.seed}/fusion/{number}")
        rollouts = [self._imagined(drawn) for _ in range(DRAWS)]
        begun = [[DecodingInstance(samples, config) for samples in shares] for shares in rollouts]
        without = [serial(shares, config) for shares in rollouts]
        expected_serial = sum(outcome.seconds for outcome in without) / DRAWS
        decoding = (
            sum(outcome.generated for outcome in without) / DRAWS
            - costs.prefill_seconds(sum(self.prompts)) / setting.instances
        )
        tick = max(2 * costs.step_seconds(1), decoding / TICKS)

        remaining = cache(self.lengths.remaining)

        def seconds(policy: FusionPolicy, draws: int = DRAWS) -> float:
            outcomes = [fused_from(instances, policy, remaining) for instances in begun[:draws]]
            return sum(outcome.seconds for outcome in outcomes) / draws

        policies = [self._policy(threshold, rows, tick) for threshold, rows in self._grid()]
        finalists = sorted(policies, key=lambda policy: seconds(policy, draws=1))[:FINALISTS]
        best_seconds, best = min(((seconds(policy), policy) for policy in finalists), key=lambda pair: pair[0])
        if self.current is not None and self.current.policy is not None:
            current = replace(self.current.policy, tick=tick)
            if (current_seconds := seconds(current)) <= best_seconds * (1 + WORTH):
                best_seconds, best = current_seconds, current
        gain = 1 - best_seconds / expected_serial
        if setting.mode == "auto" and gain < WORTH:
            return FusionChoice(
                None, f"it would save {max(0.0, gain):.1%}", expected_serial, expected_serial, self.lengths.mean
            )
        reason = "asked for" if setting.mode == "inter" else f"it saves {gain:.1%}"
        return FusionChoice(best, reason, best_seconds, expected_serial, self.lengths.mean)

    def _grid(self) -> list[tuple[int, int]]:
        """Return the (threshold, rows) to try: shares of the samples, and whole instances full of them (the curve has
        its teeth there)."""
        setting = self.setting
        if setting.threshold:
            return [(setting.threshold, setting.rows or setting.slots)]
        grid = []
        for rows in sorted({setting.rows or setting.slots, setting.rows or max(1, setting.slots // 2)}):
            shares = {round(setting.samples * k / THRESHOLDS) for k in range(THRESHOLDS)}
            teeth = {rows * k for k in range(1, setting.instances) if rows * k < setting.samples}
            grid += [(threshold, rows) for threshold in sorted(shares | set(list(sorted(teeth))[:THRESHOLDS]))]
        return grid

    def _policy(self, threshold: int, rows: int, tick: float, interleaves: bool = False) -> FusionPolicy:
        return FusionPolicy(threshold, rows, tick, self.setting.unit_tokens, interleaves)

    def _imagined(self, drawn: random.Random) -> list[list[SampleLengths]]:
        """Draw a rollout with lengths from the histogram, dealt out one by one."""
        setting = self.setting
        samples = [
            SampleLengths(index, self.prompts[index % len(self.prompts)], drawn.choice(self.lengths.recent))
            for index in range(setting.samples)
        ]
        return [samples[instance :: setting.instances] for instance in range(setting.instances)]

    def learn(
        self,
        shares: Sequence[Sequence[SampleLengths]],
        by_prompt: dict[int, list[int]],
        achieved: float,
        measured: Sequence[Measured],
        bandwidth: float,
        cache_bytes: int,
    ) -> float:
        """Learn from a rollout; returns the seconds that it should have taken by the costs (0: not known).

        `shares` are its samples by the instance that began them; `by_prompt` the lengths of responses by prompt.
        """
        predicted = self.predict(shares)
        self.note(shares, by_prompt)
        self.bandwidth, self.cache_bytes = bandwidth, cache_bytes
        if not self.is_warm:
            self.is_warm = True
            return predicted
        if self.current is not None and self.current.policy is not None and self.current.policy.interleaves:
            if predicted and self.overlap is None:
                self.overlap, self.current = achieved / predicted, None
            return predicted  # steps that share the device with scoring say nothing of either alone
        self.measured.append(list(measured))
        if not predicted or abs(predicted / achieved - 1) > WRONG:
            self.refit()
        return predicted

    def note(self, shares: Sequence[Sequence[SampleLengths]], by_prompt: dict[int, list[int]]) -> None:
        """Take in the lengths of a rollout, which all ranks know."""
        self.lengths.add(by_prompt)
        self.prompts = [sample.prompt for samples in shares for sample in samples]

    def refit(self) -> None:
        """Fit costs to the last measurements; the next choice is made with them."""
        measured = [measurement for rollout in self.measured for measurement in rollout]
        self.costs = fit(measured, self.bandwidth, self.cache_bytes) or self.costs
        if self.current is not None:
            self.current = replace(self.current, mean_length=0.0)

    def predict(self, shares: Sequence[Sequence[SampleLengths]]) -> float:
        """Return the seconds of a rollout with these lengths under the current policy; 0: not known."""
        if self.costs is None or self.current is None:
            return 0.0
        setting = self.setting
        config = SimulatorConfig(self.costs, setting.slots, setting.tensor, setting.micro_batch_tokens)
        if self.current.policy is None:
            return serial(shares, config).seconds
        if self.current.policy.interleaves:
            return serial(shares, config).seconds * (self.overlap or 1.0)
        return fused(shares, config, self.current.policy, self.lengths.remaining).seconds

    def decided(self) -> dict[str, Any]:
        """Return what the other ranks have to be told."""
        return {
            "costs": asdict(self.costs) if self.costs else None,
            "current": asdict(self.current) if self.current is not None else None,
            "overlap": self.overlap,
        }

    def take(self, decided: dict[str, Any]) -> None:
        self.costs = Costs.from_dict(decided["costs"]) if decided["costs"] else None
        self.overlap = decided["overlap"]
        if (current := decided["current"]) is not None:
            policy = FusionPolicy(**current["policy"]) if current["policy"] else None
            self.current = FusionChoice(**{**current, "policy": policy})

    def as_dict(self) -> dict[str, Any]:
        decided = {**self.decided(), "instances": self.setting.shape}
        return {"lengths": self.lengths.as_dict(), "prompts": self.prompts, **decided}

    def restore(self, values: dict[str, Any]) -> None:
        """Go on from what `as_dict` gave; what was decided for other instances is decided again."""
        self.lengths.restore(values["lengths"])
        self.prompts = list(values["prompts"])
        if values.get("instances") == self.setting.shape:
            self.take(values)
