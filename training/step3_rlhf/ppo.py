"""PPO for language models and its critic-free variants: set-up, the loop over iterations, one iteration on a screen."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from inference.chat_format import ChatFormat
from inference.generation.sampler import SamplingKey
from training.calls import ACTOR_SCORE, ACTOR_TRAIN
from training.checkpoints import Best
from training.data.rows import Epochs
from training.evaluation.statistics import distinct_bigrams
from training.fusion.board import Span
from training.hybrid_engine.stored_weights import WeightsBackup
from training.metrics import held_out_line
from training.models.loading import load_causal_lm
from training.reward_sources import RewardFailed
from training.rewards import Rewarded, Rewards
from training.run_directory import write_json
from training.stage import Stage
from training.step3_rlhf import ppo_math
from training.step3_rlhf.experience import Experience, Targets, score_metrics
from training.step3_rlhf.roles import Roles, starting_scorer
from training.step3_rlhf.rollout import Rollouts, rollout_lines
from training.step3_rlhf.timing import Clock, Forecast, as_data, beside, metrics_of, update_data
from training.step3_rlhf.update import Batch, Demonstrations, Update, Updates, learned_rows
from training.step3_rlhf.watch import (
    HeldOut,
    Watch,
    check_first_update,
    encode_prompt,
    look_at_reward_model,
    mean_kl,
    rank_within,
)
from training.steps import PROMPTS, SFT


def train(stage: Stage) -> None:
    """Run the whole step: set up, iterate, save."""
    settings = stage.config.rlhf
    sft, scorer, reference = stage.earlier_model(SFT), starting_scorer(stage), stage.own_reference()
    chat_format = stage.chat_format(sft, scorer)
    rows, held_out = stage.rows(chat_format)
    prompts = [prompt for (prompt,) in stage.tokens(rows, PROMPTS, chat_format)]

    per_iteration = settings.ppo_epochs * settings.mini_batches
    actor_iterations = settings.iterations - settings.critic_warmup
    updates = actor_iterations * per_iteration, settings.iterations * per_iteration
    roles = Roles(stage, sft, scorer, chat_format, updates, reference)
    look_at_reward_model(stage, roles, chat_format)
    if not settings.has_reference:
        stage.display.say(
            "PPO: rlhf.kl has no coefficient, target or stop, so no reference is loaded: KL to it is not measured, and "
            "the warnings of it are off (rlhf.kl.measure=true brings both back)"
        )
    waiting = [name for name, assignment in roles.plan.assignments.items() if assignment.offload]
    if waiting and stage.ranks.device.type == "cpu":
        stage.display.say(
            f"PPO: offload of {' and '.join(waiting)} changes nothing on a CPU, whose memory is that of the host"
        )
    forecast = None
    if stage.ranks.is_first:
        forecast = Forecast.of(stage, roles.plan, roles.calls, sft, scorer, reference)
    ppo = PPO(stage, roles, chat_format, prompts, rows, held_out, forecast)
    iterations = ppo.fit()
    result = {"iterations": iterations, "kl_coefficient": ppo.kl.coefficient}
    if ppo.best is not None:
        ppo.best.put_back(iterations)
        result["kept"] = ppo.best.number

    save_actor(stage, roles, sft, chat_format)
    stage.finish(result)


def save_actor(stage: Stage, roles: Roles, sft: Path, chat_format: ChatFormat) -> None:
    """Write the models of the actor and of its average. All ranks call it; one that trains the actor writes."""
    directory, lora = stage.directory, stage.config.rlhf.actor.lora
    actor = roles.actor if roles.trains("actor") else None

    def load() -> PreTrainedModel:
        return load_causal_lm(sft, chat_format, torch.float32)

    def write(weights: dict[str, Tensor], directories: tuple[Path, Path]) -> None:
        members = None if actor is None else actor.savers
        stage.save_weights(weights, lora, directories, load, chat_format, members=members)

    write(actor.trained_weights() if actor is not None else {}, (directory.model, directory.adapter))
    if stage.config.rlhf.ema:
        write(roles.ema.weights() if roles.ema is not None else {}, (directory.ema_model, directory.ema_adapter))


@dataclass(frozen=True)
class Iteration:
    """Holds the results of an iteration."""

    metrics: dict[str, float]
    mini_batches: list[dict[str, float]]
    """The metrics of the mini-batches."""
    stopped: bool
    """The KL to the reference was over rlhf.kl.stop: no update was made, and training ends here."""
    clock: Clock


class PPO:
    """Trains. Everything random is a function of (seed, iteration), so a checkpoint holds weights and numbers."""

    def __init__(
        self,
        stage: Stage,
        roles: Roles,
        chat_format: ChatFormat,
        prompts: list[Tensor],
        rows: list[dict],
        held_out: Sequence[dict] = (),
        forecast: Forecast | None = None,
    ):
        """`rows` are those of the prompts, for rewards that read text. The seconds that a `forecast` gives become
        metrics beside those that iterations take."""
        self.stage, self.settings, self.ranks, self.roles = stage, stage.config.rlhf, stage.ranks, roles
        self.chat_format, self.prompts, self.rows, self.forecast = chat_format, prompts, rows, forecast
        shown, limit = (held_out or rows)[: self.settings.sample_prompts], stage.config.data.max_prompt_tokens
        self.fixed_prompts = [encode_prompt(row, chat_format, limit) for row in shown]
        kl = self.settings.kl
        self.kl = ppo_math.KLController(kl.coefficient, kl.target, kl.horizon)
        self.rollouts = Rollouts(stage, roles, chat_format)
        self.rewards = Rewards(self.settings, stage.ranks, roles.reward_is_normalized)
        self.held_out = HeldOut(stage, self.rollouts, self.rewards, chat_format, held_out)
        self.best = None
        if self.settings.keep == "best":
            weights = WeightsBackup(roles.actor if roles.trains("actor") else None, roles.ema)
            self.best = Best(stage, weights, partial(rank_within, kl.bound), "iteration")
        self.order = Epochs(len(prompts), f"{stage.seed}/prompts")
        self.inside = WeightsBackup(roles.actor if roles.trains("actor") else None, roles.ema) if kl.stop else None
        """The model before the newest update, whose KL was within rlhf.kl.stop."""
        ptx = Demonstrations(stage, chat_format) if self.settings.ptx.coefficient else None
        self.updates = Updates(stage, roles, ptx)
        self.watch = Watch(self.settings.missing_end_penalty, self.settings.iterations)
        self.mini_batch_lines = stage.journal("updates.jsonl")
        self.sample_lines = stage.journal(stage.directory.rollouts_file.name)
        self.saved = 0
        """Iteration of the newest checkpoint."""

    def fit(self) -> int:
        """Run all iterations, from the newest checkpoint if there is one. Returns how many were made."""
        settings, stage = self.settings, self.stage
        number, stopped = self.resume()
        stage.expect_checkpoints("iteration")
        checked = False
        with stage.display.progress("PPO", settings.iterations, number) as bar:
            while number < settings.iterations and not stopped:
                number += 1
                try:
                    iteration = self.iterate(number, check=not checked)
                except RewardFailed:  # nothing of what was learned is lost
                    if settings.checkpoint_every and self.saved < number - 1:
                        self.save(number - 1, stopped=False)
                    raise
                checked, stopped = True, iteration.stopped
                signs, sentences = self.watch.look(iteration.metrics)
                for sentence in sentences:
                    stage.display.say(f"Warning: PPO iteration {number}: {sentence}")
                metrics = iteration.metrics | signs
                stage.metrics.write(number, metrics)
                for mini_batch in iteration.mini_batches:
                    self.mini_batch_lines.write(number, mini_batch)
                kl = f" · KL {metrics['kl/reference']:z.2f}" if settings.has_reference else ""
                bar.advance(f"score {metrics['reward/score_mean']:z.2f}{kl}{beside(metrics)}")
                ends = stopped or number == settings.iterations
                if ends and self.inside is not None:
                    stopped = self.end_inside(self.inside, number, stopped)
                if ends or number % settings.samples_every == 0:
                    self.show_fixed_prompts(number)
                if self.held_out.rows and (ends or number % settings.eval_every == 0):
                    self.evaluate(number, stopped)
                terminated = stage.told_to_end()
                if terminated or (settings.checkpoint_every and (ends or number % settings.checkpoint_every == 0)):
                    self.save(number, stopped)
                if terminated:
                    raise stage.terminated(number)
        return number

    def end_inside(self, inside: WeightsBackup, number: int, stopped: bool) -> bool:
        """Leave a model within rlhf.kl.stop: an update shows its KL only in the samples of the next iteration, so that
        of the last one is measured here. Returns whether the last one was undone."""
        display, updated = self.stage.display, number - 1 if stopped else number
        if not stopped:
            prompts = [self.prompts[row] for row in self.choose_prompts(number + 1)]
            kl = mean_kl(self.rollouts.answers(prompts, SamplingKey(self.stage.seed, number + 1)))
            if kl <= self.settings.kl.stop:
                display.say(f"PPO: the KL of the last model is {kl:z.2f} nats a response, within rlhf.kl.stop")
                return False
        which = ""
        if inside.is_stored:
            inside.put_back()
            which = f"; the model is that of iteration {updated - 1}, the last one within it"
        after = f"stopped after iteration {number}" if stopped else f"the update of iteration {number} is undone"
        display.say(f"PPO: {after}: KL to the reference is over rlhf.kl.stop{which}")
        return True

    def evaluate(self, number: int, stopped: bool) -> None:
        """Evaluate on held-out prompts, after iteration `number`. All ranks call it."""
        try:
            evaluation = self.held_out.measure()
        except RewardFailed:
            if number and self.settings.checkpoint_every:
                self.save(number, stopped, to_evaluate=True)
            raise
        self.stage.metrics.write(number, evaluation)
        is_best = self.best is not None and self.best.look(number, evaluation)
        self.stage.display.say(held_out_line("PPO", number, evaluation, is_best))

    def save(self, number: int, stopped: bool, to_evaluate: bool = False) -> None:
        """Write a checkpoint after iteration `number`; `to_evaluate`: a run that goes on from it evaluates first."""
        state = {
            "kl_coefficient": self.kl.coefficient,
            "stopped": stopped,
            "fusion": self.rollouts.fusion.chooser.as_dict(),
            "to_evaluate": to_evaluate,
            "rewards": self.rewards.state(),
            "critic_scale": self.roles.critic_scale,
        }

        def write(directory: Path) -> None:
            self.roles.save(directory)
            if self.inside is not None and self.inside.is_stored:
                self.inside.save(directory / "inside")

        self.stage.checkpoints.save(number, write, state)
        self.saved = number

    def resume(self) -> tuple[int, bool]:
        """Return the iterations done, and whether the run had stopped early; the journals forget what came after."""
        checkpoint = self.stage.checkpoints.newest()
        if self.best is not None:
            self.best.go_on_after(checkpoint[1]["number"] if checkpoint else -1)
        if checkpoint is None:
            self.rewind(-1)
            self.show_fixed_prompts(0)
            if self.held_out.rows:
                self.evaluate(0, stopped=False)
            return 0, False
        directory, state = checkpoint
        with self.stage.checkpoints.reading(directory):
            self.roles.load(directory)
            self.kl.coefficient = state["kl_coefficient"]
            self.rollouts.fusion.chooser.restore(state["fusion"])
            self.rewards.restore(state.get("rewards"))
            if state.get("critic_scale"):
                self.roles.scale_critic(*state["critic_scale"])
            if self.inside is not None and (directory / "inside").exists():
                self.inside.load(directory / "inside")
        self.rewind(state["number"])
        for metrics in self.stage.metrics.read():
            if "reward/total" in metrics:  # else it is of an evaluation
                self.watch.look(metrics)
        self.saved = state["number"]
        self.stage.say_goes_on("PPO", "iteration", state)
        if state.get("to_evaluate"):
            self.evaluate(state["number"], state["stopped"])
        return state["number"], state["stopped"]

    def rewind(self, number: int) -> None:
        """Remove from the journals what came after iteration `number`."""
        for journal in (self.stage.metrics, self.stage.samples, self.mini_batch_lines, self.sample_lines):
            journal.rewind(number)

    def iterate(self, number: int, check: bool) -> Iteration:
        """Run iteration `number`: prompts, generate, score, advantages, update, log. `check` tests the first update."""
        settings, coefficient, clock = self.settings, self.kl.coefficient, Clock()

        # prompts
        prompt_rows = self.choose_prompts(number)
        prompts = [self.prompts[row] for row in prompt_rows]

        # generate and score: each sample when it has ended, or all samples after one another
        rollout = self.rollouts.start(prompts, prompt_rows, number, clock)
        if rollout.is_fused:
            experience = rollout.generate_and_score()
        else:
            experience = rollout.generate()
            experience = rollout.score(experience)
        of_rollout = rollout.learn(experience)
        self.rollouts.end()
        texts = [self.chat_format.decode(e.response.tolist()) for e in experience]
        experience, rewarded = self.reward(experience, texts, prompt_rows, clock)

        # advantages
        targets = Targets.of(experience, settings, coefficient)
        metrics = targets.metrics(experience, settings, coefficient) | score_metrics(rewarded.raw, experience)
        metrics |= rewarded.metrics
        metrics["response/distinct_bigrams"] = distinct_bigrams(texts)
        if check:
            check_first_update(self.stage, self.roles, experience)

        # update
        kl = metrics.get("kl/reference", 0.0)
        stopped = 0 < settings.kl.stop < kl
        batch, update = Batch(number, experience, targets, prompt_rows, coefficient), Update()
        if not stopped:
            if self.inside is not None:
                self.inside.store()
            with clock.phase("time/train"), clock.timeline.span("train"):
                update = self.updates.run(batch, clock.calls)
            self.kl.update(kl, len(experience))

        # log
        if settings.rollouts_every and number % settings.rollouts_every == 0 and self.ranks.is_first:
            with clock.phase("time/rollouts"):
                self.sample_lines.extend(number, rollout_lines(batch, rewarded, self.chat_format, settings))
        metrics |= update.metrics | self.generation_gap(experience, update) | self.rollouts.work() | of_rollout
        metrics |= clock.metrics(sum(len(e.response) for e in experience), self.ranks.device)
        metrics |= self.beside_forecast(number, experience, clock)
        return Iteration(metrics, update.mini_batches, stopped, clock)

    def reward(
        self, experience: list[Experience], texts: list[str], prompt_rows: list[int], clock: Clock
    ) -> tuple[list[Experience], Rewarded]:
        """Return the experience with the scores that PPO raises, those of all sources on one scale; and each of
        them."""
        rewards, asks = self.rewards, bool(self.rewards.sources)
        with clock.phase("time/reward") if asks else nullcontext():
            rewarded = rewards.reward(
                [e.score for e in experience],
                [self.rows[row]["prompt"] for row in prompt_rows] if asks else [],
                texts,
                [self.rows[row].get("extra", {}) for row in prompt_rows] if asks else [],
                self.settings.samples_per_prompt,
            )
        experience = [replace(e, score=score) for e, score in zip(experience, rewarded.scores, strict=True)]
        if rewarded.scale_of_model and self.settings.has_critic and not self.roles.critic_scale:
            shift, scale = rewarded.scale_of_model
            self.roles.scale_critic(shift, scale)
            experience = [replace(e, values=(e.values - shift) / scale) for e in experience]  # what it said before
        return experience, rewarded

    def generation_gap(self, experience: list[Experience], update: Update) -> dict[str, float]:
        """Return the largest difference, in nats a token, between generation and training before the first update: of
        all samples where the old log-probabilities were recomputed, else of the first mini-batch."""
        if self.settings.min_response_tokens:  # generation drew from a distribution without the end tokens
            return {}
        gaps = [float((e.logprobs - e.generation_logprobs).abs().max()) for e in experience]
        if ACTOR_SCORE not in self.roles.calls:
            gaps = [row["policy/log_ratio_max"] for row in update.mini_batches[:1] if "policy/log_ratio_max" in row]
        return {"policy/generation_gap": max(gaps)} if gaps else {}

    def choose_prompts(self, number: int) -> list[int]:
        """Return the rows of the prompts of an iteration, each repeated `samples_per_prompt` times in sequence.

        They come from epochs over all prompts, each shuffled by (seed, epoch).
        """
        count = self.settings.prompts_per_iteration
        prompt_rows = self.order.rows((number - 1) * count, count)
        return [row for row in prompt_rows for _ in range(self.settings.samples_per_prompt)]

    def show_fixed_prompts(self, number: int) -> None:
        """Write the actor's answers to the same few held-out prompts into samples.jsonl. All ranks call it."""
        key = SamplingKey(self.stage.seed, 0)
        for sample in self.rollouts.answers(self.fixed_prompts, key, scored=False):
            prompt, response = (self.chat_format.decode(ids.tolist()) for ids in (sample.prompt, sample.response))
            self.stage.samples.write(number, {"prompt": prompt, "response": response, "ended": sample.ended})

    def beside_forecast(self, number: int, experience: list[Experience], clock: Clock) -> dict[str, float]:
        """Return the seconds of each call as predicted for samples of these lengths and as achieved, on the first rank;
        all ranks call it."""
        seconds = clock.elapsed()
        ours = [Span(span.kind, span.start - clock.begun, span.end - clock.begun) for span in clock.calls.spans]
        of_ranks = self.ranks.gather_on_first((ours, self.roles.staged.picture(clock.begun)), "what each rank did")
        if not self.ranks.is_first:
            return {}
        spans = [calls for calls, _ in of_ranks]
        schedule = None
        if self.forecast is not None:
            idle = [ACTOR_TRAIN.name] if number <= self.settings.critic_warmup else []
            lengths = [len(e.prompt) for e in experience], [len(e.response) for e in experience]
            learned = learned_rows(experience, self.settings)
            schedule = self.forecast.schedule(*lengths, learned, left_out=idle)
        data = as_data(number, schedule, spans) | {"update": update_data([newest for _, newest in of_ranks])}
        write_json(self.stage.directory.iteration_file, data)
        return {} if schedule is None else metrics_of(schedule, spans, seconds)
