"""The updates of one iteration: mini-batches of its samples, an optimiser step of each trained role on each of them."""

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from training.data.batching import MicroBatch, TokenBatch, plan_micro_batches
from training.hybrid_engine.overflow import step_together
from training.hybrid_engine.zero_engine import ZeroEngine
from training.stage import Diverged, Stage
from training.step3_rlhf import ppo_math
from training.step3_rlhf.experience import Experience, Targets, token_batch
from training.step3_rlhf.ptx import Demonstrations
from training.step3_rlhf.roles import Roles, response_values


@dataclass(frozen=True)
class Pass:
    """A micro-batch with the loss that it takes."""

    micro_batch: MicroBatch
    loss: Callable[[MicroBatch], Tensor]

    @property
    def weight(self) -> float:
        return self.micro_batch.weight

    def run(self) -> Tensor:
        return self.loss(self.micro_batch)


class Updates:
    """Of the run; `mini_batches` are the statistics of each one of the present iteration."""

    def __init__(self, stage: Stage, roles: Roles, trained: list[str], ptx: Demonstrations | None):
        """`trained` names the roles that are, in order."""
        self.stage, self.settings, self.ranks, self.roles = stage, stage.config.rlhf, stage.ranks, roles
        self.roles_trained, self.ptx = trained, ptx
        self.mini_batches: list[dict[str, float]] = []
        self.seats: list[int] = []
        """Places in the data of the prompts of an iteration's samples."""

    def run(
        self, experience: list[Experience], targets: Targets, number: int, kl_coefficient: float
    ) -> dict[str, float]:
        """Every PPO epoch: mini-batches of shuffled samples, an optimiser step of actor and critic on each.

        Ends before its time where a mini-batch shows that the policy has left the old one by rlhf.ppo_kl_stop.
        """
        settings = self.settings
        self.mini_batches = []
        totals: dict[str, float] = {}
        last: dict[str, float] = {}
        tokens = 0
        for epoch, place in itertools.product(range(settings.ppo_epochs), range(settings.mini_batches)):
            order = list(range(len(experience)))
            random.Random(f"{self.stage.config.seed}/samples/{number}/{epoch}").shuffle(order)
            chosen = order[place :: settings.mini_batches]
            update = ((number - 1) * settings.ppo_epochs + epoch) * settings.mini_batches + place
            sums, of_steps = self.mini_batch(chosen, experience, targets, number, update, kl_coefficient)
            size = sum(len(experience[row].response) for row in chosen)
            means = {name: value if name.endswith("_max") else value / size for name, value in sums.items()}
            self.mini_batches.append({"epoch": epoch, "mini_batch": place, **means, **of_steps})
            for name, value in sums.items():
                kept = totals.get(name, 0.0)
                totals[name] = max(kept, value) if name.endswith("_max") else kept + value
            last |= of_steps
            tokens += size
            if 0 < settings.ppo_kl_stop < means.get("kl/old_k3", 0.0):
                break
        means = {name: value if name.endswith("_max") else value / tokens for name, value in totals.items()}
        if "kl/old_k3" in means:  # not in the critic's warm-up
            means["kl/old_k3_max"] = max(mini_batch["kl/old_k3"] for mini_batch in self.mini_batches)
        return means | last | {"update/mini_batches": len(self.mini_batches)}

    def mini_batch(
        self,
        chosen: list[int],
        experience: list[Experience],
        targets: Targets,
        number: int,
        update: int,
        kl_coefficient: float,
    ) -> tuple[dict[str, float], dict[str, float]]:
        """One optimiser step of each trained role, number `update` of the run.

        Returns statistics summed over the response tokens of all ranks (largest ones of `..._max`), and what the steps
        themselves gave.
        """
        settings = self.settings
        lengths = [experience[row].length for row in chosen]
        plan = plan_micro_batches(lengths, settings.micro_batch_tokens, self.ranks.size)[self.ranks.rank]
        tokens = sum(len(experience[row].response) for row in chosen)  # of all ranks
        sums: dict[str, float] = {}

        def note(weight: float, **statistics: Tensor) -> None:
            for name, value in statistics.items():
                name = name.replace("_", "/", 1)
                sums[name] = sums.get(name, 0.0) + float(value.detach().sum()) * weight

        def gather(micro_batch: MicroBatch) -> tuple[list[int], TokenBatch, Tensor]:
            rows = [chosen[i] for i in micro_batch.rows]
            return rows, token_batch([experience[row] for row in rows], self.ranks.device), targets.mask[rows]

        def flat(padded: Tensor, rows: list[int], mask: Tensor) -> Tensor:
            return padded[rows][mask].to(self.ranks.device)

        def actor_loss(micro_batch: MicroBatch) -> Tensor:
            rows, batch, mask = gather(micro_batch)
            logprobs, entropy = self.roles.actor(batch, settings.temperature)
            old = flat(targets.logprobs, rows, mask)
            loss, ratio = ppo_math.policy_loss(logprobs, old, flat(targets.advantages, rows, mask), settings.clip)
            self.require_finite(loss, "The policy loss", number, rows)
            note(
                micro_batch.weight,
                policy_loss=loss,
                policy_entropy=entropy,
                policy_ratio_mean=ratio,
                policy_clip_fraction=((ratio - 1).abs() > settings.clip).float(),
                kl_old_k1=ppo_math.kl_k1(old, logprobs),
                kl_old_k3=ppo_math.kl_k3(old, logprobs),
            )
            sums["policy/ratio_max"] = max(sums.get("policy/ratio_max", 0.0), float(ratio.detach().max()))
            if settings.kl_in_loss:
                k3 = ppo_math.kl_k3(logprobs, flat(targets.reference_logprobs, rows, mask))
                loss = loss + kl_coefficient * k3.sum()
                note(micro_batch.weight, policy_kl_penalty=kl_coefficient * k3)
            return loss / tokens

        def critic_loss(micro_batch: MicroBatch) -> Tensor:
            rows, batch, mask = gather(micro_batch)
            values = response_values(self.roles.critic(batch), batch)
            old, returns = flat(targets.values, rows, mask), flat(targets.returns, rows, mask)
            loss, clipped = ppo_math.value_loss(values, old, returns, settings.value_clip)
            self.require_finite(loss, "The value loss", number, rows)
            note(micro_batch.weight, value_loss=loss, value_clip_fraction=clipped.float())
            return loss / tokens

        def actor_passes() -> list[Pass]:
            passes = [Pass(micro_batch, actor_loss) for micro_batch in plan]
            if self.ptx is not None:
                drawn = self.ptx.draw(*self.demonstrations_of(update, len(experience)))

                def ptx_loss(micro_batch: MicroBatch) -> Tensor:
                    logprobs, _ = self.roles.actor(drawn.batch(micro_batch, self.ranks.device))
                    loss = -logprobs.sum() / drawn.tokens
                    note(micro_batch.weight, ptx_loss=loss * tokens)  # a mean already
                    return settings.ptx.coefficient * loss

                shares = plan_micro_batches(drawn.lengths, settings.micro_batch_tokens, self.ranks.size)
                passes += [Pass(micro_batch, ptx_loss) for micro_batch in shares[self.ranks.rank]]
            return passes

        jobs = []
        for role in self.roles_trained:
            if role == "critic":
                jobs.append(("value", self.roles.critic, [Pass(micro_batch, critic_loss) for micro_batch in plan]))
            elif number > settings.critic_warmup:
                jobs.append(("policy", self.roles.actor, actor_passes()))
        steps, stepped = self.step([(engine, passes) for _, engine, passes in jobs])
        result = {
            f"{prefix}/{name}": value
            for (prefix, _, _), step in zip(jobs, steps, strict=True)
            for name, value in step.items()
        }
        norms = [value for name, value in result.items() if name.endswith("grad_norm")]
        if self.stage.dtype != torch.float16 and not all(map(math.isfinite, norms)):  # fp16 skips such steps by itself
            raise self.diverged(number, "The gradient is not finite", chosen)
        if self.roles.ema is not None and stepped and any(prefix == "policy" for prefix, _, _ in jobs):
            self.roles.ema.update()
        shares = self.ranks.gather(sums)
        pooled = {name: (max if name.endswith("_max") else sum)(share[name] for share in shares) for name in sums}
        return pooled, result

    def demonstrations_of(self, update: int, samples: int) -> tuple[int, int]:
        """Where those of an optimiser step begin, counted through all updates of the run, and how many they are: each
        begins where the one before ends, also where `samples` do not divide evenly."""
        if self.settings.ptx.rows:
            return update * self.settings.ptx.rows, self.settings.ptx.rows
        passes, place = divmod(update, self.settings.mini_batches)
        sizes = [len(range(each, samples, self.settings.mini_batches)) for each in range(place + 1)]
        return passes * samples + sum(sizes[:-1]), sizes[-1]

    def step(self, jobs: list[tuple[ZeroEngine, list["Pass"]]]) -> tuple[list[dict[str, float]], bool]:
        """An optimiser step of each engine on the sum of its passes, and whether it was made.

        In fp16 with rlhf.align_overflow all engines step, or none.
        """
        if self.stage.dtype != torch.float16 or not self.settings.align_overflow or len(jobs) == 1:
            return [engine.update(passes, Pass.run) for engine, passes in jobs], True
        for engine, passes in jobs:
            engine.accumulate(passes, Pass.run)
        return step_together([engine for engine, _ in jobs])

    def require_finite(self, loss: Tensor, name: str, number: int, rows: list[int]) -> None:
        if not torch.isfinite(loss):
            raise self.diverged(number, f"{name} is not a finite number", rows)

    def diverged(self, number: int, what: str, samples: list[int]) -> Diverged:
        """Of samples of this iteration: their prompts' rows are named."""
        return self.stage.diverged(number, what, sorted({self.seats[sample] for sample in samples}))
