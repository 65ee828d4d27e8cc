"""PPO for language models: set-up, the loop over iterations, and one iteration on one screen."""

import math
import random
import resource
import sys
import time

import torch
from torch import Tensor

from inference.chat_format import ChatFormat
from inference.generation.sample import SamplingKey
from training.data.batching import MicroBatch, TokenBatch, plan_micro_batches
from training.models.loading import load_causal_lm
from training.stage import Stage
from training.step3_rlhf import ppo_math
from training.step3_rlhf.experience import Experience, Targets, token_batch
from training.step3_rlhf.invariants import check_first_update
from training.step3_rlhf.roles import Roles, response_values
from training.step3_rlhf.rollout import Rollout


def train(stage: Stage) -> None:
    """The whole step: set up, iterate, save."""
    config, settings = stage.config, stage.config.rlhf
    sft, reward = stage.earlier_model(1), stage.earlier_model(2)
    chat_format = stage.chat_format(sft, reward)
    rows, held_out = stage.rows(chat_format)
    prompts = [prompt for (prompt,) in stage.tokens(rows, ("prompt",), chat_format)]
    fixed = [encode_prompt(row, chat_format, config.data.max_prompt_tokens) for row in (held_out or rows)]

    per_iteration = settings.ppo_epochs * settings.mini_batches
    actor_iterations = max(1, settings.iterations - settings.critic_warmup)
    roles = Roles(
        stage, sft, reward, chat_format, (actor_iterations * per_iteration, settings.iterations * per_iteration)
    )
    ppo = PPO(stage, roles, chat_format, prompts, fixed[: settings.sample_prompts])
    iterations = ppo.fit()

    stage.save_trained(roles.actor, lambda: load_causal_lm(sft, chat_format, torch.float32), chat_format)
    stage.finish({"iterations": iterations, "kl_coefficient": ppo.kl.coefficient})


def encode_prompt(row: dict, chat_format: ChatFormat, max_tokens: int) -> Tensor:
    return torch.tensor(chat_format.prompt_ids(row["prompt"], max_tokens))


class PPO:
    """The trainer. Everything random is a function of (seed, iteration), so a checkpoint holds weights and numbers."""

    def __init__(
        self, stage: Stage, roles: Roles, chat_format: ChatFormat, prompts: list[Tensor], fixed_prompts: list[Tensor]
    ):
        self.stage, self.settings, self.ranks, self.roles = stage, stage.config.rlhf, stage.ranks, roles
        self.chat_format, self.prompts, self.fixed_prompts = chat_format, prompts, fixed_prompts
        kl = self.settings.kl
        self.kl = ppo_math.KLController(kl.coefficient, kl.target, kl.horizon)
        self.rollout = Rollout(stage, roles, chat_format)

    def fit(self) -> int:
        """All iterations, from the newest checkpoint if there is one. Returns how many were made."""
        settings, stage = self.settings, self.stage
        number, stopped = self.resume()
        checked = False
        with stage.display.progress("PPO", settings.iterations, number) as bar:
            while number < settings.iterations and not stopped:
                number += 1
                metrics, stopped = self.iterate(number, check=not checked)
                checked = True
                stage.metrics.write(number, metrics)
                bar.advance(f"score {metrics['reward/score_mean']:.2f} · KL {metrics['kl/reference']:.2f}")
                ends = stopped or number == settings.iterations
                if ends or number % settings.samples_every == 0:
                    self.show_fixed_prompts(number)
                if settings.checkpoint_every and (ends or number % settings.checkpoint_every == 0):
                    fusion = self.rollout.fusion.as_dict()
                    state = {"kl_coefficient": self.kl.coefficient, "stopped": stopped, "fusion": fusion}
                    stage.checkpoints.save(number, self.roles.save, state)
        if stopped:
            stage.display.say(f"PPO: stopped after iteration {number}: KL to the reference is over rlhf.kl.stop")
        return number

    def resume(self) -> tuple[int, bool]:
        """Iterations done, and whether the run had stopped early; the journals forget what came after."""
        checkpoint = self.stage.checkpoints.newest()
        if checkpoint is None:
            self.stage.metrics.rewind(-1)
            self.stage.samples.rewind(-1)
            self.show_fixed_prompts(0)
            return 0, False
        directory, state = checkpoint
        self.roles.load(directory)
        self.kl.coefficient = state["kl_coefficient"]
        self.rollout.fusion.restore(state["fusion"])
        self.stage.metrics.rewind(state["number"])
        self.stage.samples.rewind(state["number"])
        self.stage.display.say(f"PPO: going on after iteration {state['number']}")
        return state["number"], state["stopped"]

    def iterate(self, number: int, check: bool) -> tuple[dict[str, float], bool]:
        """One iteration; returns its metrics and whether training ends here (KL over the bound: no update is made)."""
        begun = time.perf_counter()
        seats = self.choose_prompts(number)
        experience = self.rollout.run([self.prompts[seat] for seat in seats], seats, number)  # generate and score
        coefficient = self.kl.coefficient
        targets = Targets.of(experience, self.settings, coefficient)
        metrics = targets.metrics(experience, coefficient)
        stop = 0 < self.settings.kl.stop < metrics["kl/reference"]
        if check:
            check_first_update(self.stage, self.roles, experience)
        if not stop:
            metrics |= self.update(experience, targets, number)
            self.kl.update(metrics["kl/reference"], len(experience))
        metrics |= self.rollout.work() | self.rollout.fusion_metrics
        return metrics | self.timing(experience, time.perf_counter() - begun), stop

    def choose_prompts(self, number: int) -> list[int]:
        """Places of the prompts of an iteration, each repeated `samples_per_prompt` times in a row.

        They come from epochs over all prompts, each epoch shuffled anew by (seed, epoch).
        """
        chosen: list[int] = []
        first = (number - 1) * self.settings.prompts_per_iteration
        for place in range(first, first + self.settings.prompts_per_iteration):
            epoch, seat = divmod(place, len(self.prompts))
            order = list(range(len(self.prompts)))
            random.Random(f"{self.stage.config.seed}/prompts/{epoch}").shuffle(order)
            chosen += [order[seat]] * self.settings.samples_per_prompt
        return chosen

    def update(self, experience: list[Experience], targets: Targets, number: int) -> dict[str, float]:
        """Every PPO epoch: mini-batches of shuffled samples, an optimiser step of actor and critic on each."""
        with self.rollout.timed("train"), self.rollout.timeline.span("train"):
            sums: dict[str, float] = {}
            last: dict[str, float] = {}
            tokens = 0
            for epoch in range(self.settings.ppo_epochs):
                order = list(range(len(experience)))
                random.Random(f"{self.stage.config.seed}/samples/{number}/{epoch}").shuffle(order)
                for place in range(self.settings.mini_batches):
                    chosen = order[place :: self.settings.mini_batches]
                    tokens += sum(len(experience[row].response) for row in chosen)
                    last |= self.update_mini_batch(chosen, experience, targets, number, sums)
            largest = max(self.ranks.gather(sums.pop("policy/ratio_max", 0.0)))
            means = {name: total / tokens for name, total in self.ranks.sum_values(sums).items()}
            return means | last | ({"policy/ratio_max": largest} if largest else {})  # none in the critic's warm-up

    def update_mini_batch(
        self,
        chosen: list[int],
        experience: list[Experience],
        targets: Targets,
        number: int,
        sums: dict[str, float],
    ) -> dict[str, float]:
        """One optimiser step of each trained role; adds summed statistics to `sums`."""
        settings = self.settings
        lengths = [experience[row].length for row in chosen]
        plan = plan_micro_batches(lengths, settings.micro_batch_tokens, self.ranks.size)[self.ranks.rank]
        tokens = sum(len(experience[row].response) for row in chosen)  # of all ranks

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
            return loss / tokens

        def critic_loss(micro_batch: MicroBatch) -> Tensor:
            rows, batch, mask = gather(micro_batch)
            values = response_values(self.roles.critic(batch), batch)
            old, returns = flat(targets.values, rows, mask), flat(targets.returns, rows, mask)
            loss, clipped = ppo_math.value_loss(values, old, returns, settings.value_clip)
            self.require_finite(loss, "The value loss", number, rows)
            note(micro_batch.weight, value_loss=loss, value_clip_fraction=clipped.float())
            return loss / tokens

        result: dict[str, float] = {}
        for call in (call for call in self.rollout.calls if call.kind == "train"):
            engine, loss, prefix = {
                "actor": (self.roles.actor, actor_loss, "policy"),
                "critic": (self.roles.critic, critic_loss, "value"),
            }[call.role]
            if call.role == "critic" or number > settings.critic_warmup:
                result |= {f"{prefix}/{name}": value for name, value in engine.update(plan, loss).items()}
        norms = [value for name, value in result.items() if name.endswith("grad_norm")]
        if self.stage.dtype != torch.float16 and not all(map(math.isfinite, norms)):  # fp16 skips such steps by itself
            raise self.stage.diverged(number, "The gradient is not finite", chosen)
        return result

    def show_fixed_prompts(self, number: int) -> None:
        """What the actor answers now to the same few held-out prompts, into samples.jsonl. All ranks call it."""
        engine = self.rollout.generation_engine()
        key = SamplingKey(self.stage.config.seed, 0)
        samples = sorted(
            engine.generate(self.fixed_prompts, self.rollout.sampling, key), key=lambda sample: sample.index
        )
        for sample in sorted(samples, key=lambda sample: sample.index):
            prompt = self.chat_format.decode(sample.prompt_ids.tolist())
            response = self.chat_format.decode(sample.response_ids)
            self.stage.samples.write(number, {"prompt": prompt, "response": response, "ended": sample.ended})

    def require_finite(self, loss: Tensor, name: str, number: int, rows: list[int]) -> None:
        if not torch.isfinite(loss):
            raise self.stage.diverged(number, f"{name} is not a finite number", rows)

    def timing(self, experience: list[Experience], seconds: float) -> dict[str, float]:
        """Seconds by phase, tokens generated a second, and this process's peak memory."""
        phases = {f"time/{name}": value for name, value in self.rollout.seconds.items()}
        tokens = sum(len(e.response) for e in experience)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        if self.ranks.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        other = seconds - sum(self.rollout.seconds.values())
        return {**phases, "time/other": other, "tokens_per_second": tokens / seconds, "memory/peak_gb": peak / 1e9}
