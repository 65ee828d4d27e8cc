"""The roles of step 3: the actor always, reference, critic and reward model where the settings have them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from inference.chat_format import ChatFormat
from inference.generation.cpu import BlockedWeights
from training.calls import ACTOR_GENERATE, CRITIC_SCORE, Call
from training.config import RunConfig
from training.data.batching import TokenBatch
from training.hybrid_engine.deepspeed_setup import loads
from training.hybrid_engine.layout import Layout, StageCut
from training.hybrid_engine.reallocation import Reallocation
from training.hybrid_engine.stored_weights import MovingAverage, WaitingWeights, divide_to_score, freeze, gathering
from training.hybrid_engine.zero_engine import ZeroEngine
from training.memory import StepMemory, estimate_step_memory, with_slots
from training.models.loading import load_causal_lm, load_scorer
from training.models.policy import Policy, Scorer, at_last_token
from training.pipelines.stage_engine import ScoringWork, StageEngine
from training.pipelines.staged import StagedRoles
from training.plan import Cut, Plan
from training.role_settings import FrozenSettings, OptimizerSettings
from training.shape import Shape
from training.stage import Stage
from training.step3_rlhf.exactness import settle_exactness
from training.step3_rlhf.planned import iteration_calls, shape_of
from training.step3_rlhf.positions import call_positions
from training.steps import PPO, REWARD, SFT


def starting_scorer(stage: Stage) -> Path | None:
    """Return what the reward model is and the critic starts as; None where there is neither.

    Without a reward model the critic starts where step 2 would: from the reward model's base checkpoint or, with
    reward.initialize_from=sft, from the SFT model, with a fresh head.
    """
    config = stage.config
    if config.rlhf.has_reward_model or (config.rlhf.has_critic and config.trained_reward_model):
        return stage.earlier_model(REWARD)
    if not config.rlhf.has_critic:
        return None
    if config.reward.initialize_from == "sft":
        return stage.earlier_model(SFT)
    return stage.model_directory(config.reward_model_source)


def load_critic(
    stage: Stage,
    scorer: Path | None,
    chat_format: ChatFormat,
    dtype: torch.dtype,
    with_weights: bool,
    cut: StageCut | None = None,
) -> Scorer:
    assert scorer is not None
    trained, layers = critic_starts(stage.config)
    model = load_scorer(scorer, chat_format, dtype, layers, with_weights=with_weights, trained=trained, cut=cut)
    return Scorer(model, stage.config.rlhf.critic.lora, cut)


def critic_starts(config: RunConfig) -> tuple[bool, int]:
    """Whether the critic starts from a trained scorer, and how many of its layers it has; 0 means all."""
    trained = config.rlhf.has_reward_model or bool(config.trained_reward_model)
    return trained, 0 if trained else config.reward.layers


def load_reward(
    stage: Stage, scorer: Path, chat_format: ChatFormat, with_weights: bool, cut: StageCut | None = None
) -> Scorer:
    model = load_scorer(scorer, chat_format, stage.dtype, with_weights=with_weights, trained=True, cut=cut)
    return Scorer(model, cut=cut)


def shapes_of(config: RunConfig, sft: Path, scorer: Path | None, reference: Path) -> dict[str, Shape]:
    """Return the shapes of the models by role."""
    shapes = {"actor": shape_of(sft), "reference": shape_of(reference)}
    if scorer is not None:
        shapes |= dict.fromkeys(("critic", "reward"), shape_of(scorer))
        if layers := critic_starts(config)[1]:
            shapes["critic"] = replace(shapes["critic"], layers=layers)
    return shapes


def settled(stage: Stage, calls: tuple[Call, ...], sft: Path, scorer: Path | None, reference: Path) -> RunConfig:
    """Return the settings with the slots of generation that the GPUs have room for. All ranks call it."""
    config, ranks = stage.config, stage.ranks
    if ranks.device.type != "cuda" or config.rlhf.generation_batch != "auto":
        return config
    free_bytes = min(ranks.gather(torch.cuda.mem_get_info(ranks.device)[0], "the memory of the GPUs"))
    shapes = shapes_of(config, sft, scorer, reference)
    actor, of_reference = shapes["actor"], shapes["reference"]
    models = actor, shapes.get("critic", shapes.get("reward", actor))

    def memory_of(config: RunConfig) -> StepMemory:
        return estimate_step_memory(PPO, config, *models, stage.dtype, ranks.size, ("device",), calls, of_reference)

    return with_slots(config, ranks.size, free_bytes, memory_of)


class Roles:
    """Holds actor and critic under ZeRO, reference and reward frozen. The critic starts as the reward model.

    A role lies where the plan runs its calls: a rank has those whose calls it takes part in.
    """

    def __init__(
        self,
        stage: Stage,
        sft: Path,
        scorer: Path | None,
        chat_format: ChatFormat,
        updates: tuple[int, int],
        reference: Path | None = None,
    ):
        """All ranks make it. `scorer` is that of `starting_scorer`; `updates` the optimiser steps that the learning
        rates of actor and critic span; `reference` an own one, instead of the SFT model."""
        dtype, self.stage = stage.dtype, stage
        self.exact = settle_exactness(stage, sft)
        """How the actor's training and scoring equal its generation to the bit; None where they do not."""
        self.calls = iteration_calls(stage.config.rlhf, dtype, self.exact is not None)
        self.settings = settings = settled(stage, self.calls, sft, scorer, reference or sft).rlhf.as_planned
        self.plan = Plan.of(settings, stage.ranks.size, stage.config.data.longest, self.calls)
        has_stages = any(assignment.layout.pipeline > 1 for assignment in self.plan.assignments.values())
        shapes = shapes_of(stage.config, sft, scorer, reference or sft) if has_stages else {}
        layers = {role: shape.layers for role, shape in shapes.items()}
        self.positions = call_positions(self.plan, stage.ranks, layers)
        activations = {
            role: shapes[role].activation_values(1, getattr(settings, role).gradient_checkpointing) / layers[role]
            for role in shapes.keys() & {"actor", "critic"}
        }
        self.staged = StagedRoles(
            self.plan, stage.ranks, layers, settings.fusion.training, activations, lambda text: stage.display.say(text)
        )
        self.actor_is_reference = self.plan.actor_is_reference(settings.reference_is_actor)
        self._engines: dict[str, ZeroEngine] = {}
        """The roles that this rank trains."""
        self._scoring: dict[str, nn.Module] = {}
        """The modules that score here, by role, where they are not those that are trained."""
        self._waiting: dict[str, WaitingWeights] = {}
        """The weights of frozen roles that the plan offloads."""
        self.moves: dict[str, Reallocation] = {}
        """The reallocations for calls that use trained weights in another layout; calls of a role in one cut share a
        copy."""
        self.critic_scale: tuple[float, float] | None = None
        """Shift and scale that PPO gave the critic; None while it has its own."""

        def load_actor(dtype: torch.dtype, with_weights: bool, cut: StageCut | None = None) -> Policy:
            model = load_causal_lm(sft, chat_format, dtype, with_weights=with_weights, cut=cut)
            return Policy(model, settings.actor.lora, self.exact, cut)

        self._train("actor", load_actor, settings.actor, updates[0])
        if settings.has_critic:
            self._train("critic", partial(load_critic, stage, scorer, chat_format), settings.critic, updates[1])
        self.ema = MovingAverage(self.actor, settings.ema) if settings.ema and self.trains("actor") else None
        if settings.has_reference and not self.actor_is_reference:

            def load_reference(with_weights: bool, cut: StageCut | None = None) -> Policy:
                model = load_causal_lm(reference or sft, chat_format, dtype, with_weights=with_weights, cut=cut)
                return Policy(model, exact=None if reference else self.exact, cut=cut)

            self._freeze("reference", load_reference, settings.reference)
        if settings.has_reward_model:
            assert scorer is not None
            self._freeze("reward", partial(load_reward, stage, scorer, chat_format), settings.reward)
        reward = cast(Scorer | None, self._scoring.get("reward"))
        is_normalized = None if reward is None else (reward.shift, reward.scale) != (0.0, 1.0)
        of_ranks = stage.ranks.gather(is_normalized, "loading the models")
        self.reward_is_normalized = next((known for known in of_ranks if known is not None), True)
        """Whether step 2 left a scale in the reward model's config.json."""
        self._frozen_blocked = [
            BlockedWeights(module)
            for role, module in self._scoring.items()
            if self.plan[f"{role}_score"].layout.zero_stage == 0
            and role not in self._waiting
            and (role != "reference" or self.exact is None or self.exact.blocked)
        ]

    def _train(
        self, role: str, load: Callable[..., Policy | Scorer], settings: OptimizerSettings, updates: int
    ) -> None:
        """Make the engine of a role on the ranks that train it, and on all the reallocations to its other calls."""
        training, dtype = self.plan[f"{role}_train"], self.stage.dtype
        home = training.layout
        elsewhere = [call for call in self.calls if call.role == role and self.plan[call.name].cut != training.cut]
        torch.manual_seed(self.stage.seed)  # what is drawn does not depend on which roles lie here
        trained_stage: nn.Module | None = None
        if position := self.positions.get(f"{role}_train"):
            loaded, with_weights = loads(home.zero_stage, dtype, position.stage_ranks)
            module = load(loaded, with_weights, position.cut)
            if position.cut is None:
                engine = ZeroEngine(module, settings, dtype, updates, position.ranks)
            else:
                assert position.pipeline is not None
                engine = StageEngine(
                    module, settings, dtype, updates, position.stage_ranks, position.pipeline, position.cut
                )
                trained_stage = engine.language_model
            self._engines[role] = engine
            model = engine.language_model
        if elsewhere and (position is None or trained_stage is not None):
            model = load(dtype, False).to(dtype).model
        moves: dict[Cut, Reallocation] = {}
        for call in elsewhere:
            assignment, position = self.plan[call.name], self.positions.get(call.name)
            if assignment.cut not in moves:
                target, part, divide = assignment.layout, None, None
                if position is not None:
                    part = position.tensor_parallel
                    if target.zero_stage == 3:
                        divide = partial(divide_to_score, dtype=dtype, ranks=position.ranks)
                moves[assignment.cut] = Reallocation(
                    model, home, target, part, self.stage.ranks, divide=divide, stage=trained_stage
                )
            self.moves[call.name] = moves[assignment.cut]

    def _freeze(self, role: str, load: Callable[..., Policy | Scorer], settings: FrozenSettings) -> None:
        """Load a role that only scores, where it does: whole on every rank, divided by ZeRO 3, a stage, or a
        tensor-parallel part."""
        position = self.positions.get(f"{role}_score")
        if position is None:
            return
        layout, ranks = position.assignment.layout, position.ranks
        _, with_weights = loads(layout.zero_stage, self.stage.dtype, ranks)
        module = load(with_weights, position.cut)
        if layout.tensor > 1:
            order = sorted(layout.mesh)
            local = replace(layout, mesh=tuple(order.index(rank) for rank in layout.mesh))
            whole = Layout.over(ranks.size)
            part = Reallocation(module.model, whole, local, position.tensor_parallel, ranks).run()
            module.model = cast(PreTrainedModel, part)  # the whole one is forgotten here
        frozen = freeze(module, settings, self.stage.dtype, ranks)
        self._scoring[role] = frozen
        if position.assignment.offload and layout.zero_stage < 3 and ranks.device.type != "cpu":
            self._waiting[role] = WaitingWeights(frozen, ranks.device)

    def trains(self, role: str) -> bool:
        return role in self._engines

    @property
    def actor(self) -> ZeroEngine:
        """The engine of the actor, on ranks that train it."""
        return self._engines["actor"]

    @property
    def critic(self) -> ZeroEngine:
        """The engine of the critic, on ranks that train it; only `advantage=gae` has one."""
        return self._engines["critic"]

    def generator(self) -> nn.Module | None:
        """Return the actor's language model with its present weights in the layout of generation, the same module each
        time; None on ranks that do not generate. All ranks call it."""
        return self._reallocated(ACTOR_GENERATE)

    def _reallocated(self, call: Call) -> nn.Module | None:
        """Return the language model of a trained role, with its present weights in the layout of `call`."""
        if (move := self.moves.get(call.name)) is None:
            return self._engines[call.role].language_model if call.name in self.positions else None
        if call.name in self.positions or self.trains(call.role):
            return move.run()
        return None

    def scale_critic(self, shift: float, scale: float) -> None:
        """Give the critic, which starts as the reward model, the scale that the scores of that model got."""
        self.critic_scale = shift, scale
        for critic in (self._engines.get("critic"), self._scoring.get("critic")):
            if critic is not None:
                scorer = cast(Scorer, getattr(critic, "module", critic))
                scorer.shift, scorer.scale = shift, scale

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Inside, trained roles score with their present weights, and reference, reward and critic have theirs in
        blocked order on a CPU, where no ZeRO 3 divides them. All ranks enter it.

        Not the actor: old log-probabilities must round as in training.
        """
        blocked = list(self._frozen_blocked)
        for call in self.calls:
            if call.kind == "score" and (move := self.moves.get(call.name)) is not None:
                is_here = move.is_filled and move is self.moves.get(ACTOR_GENERATE.name)  # since samples were drawn
                self._use(call, move.module if is_here else self._reallocated(call))
        if CRITIC_SCORE.name in self.positions and self.plan[CRITIC_SCORE.name].layout.zero_stage < 3:
            blocked.append(BlockedWeights(self._scoring.get("critic") or self.critic.module))
        with ExitStack() as stack:
            for weights in blocked:
                stack.enter_context(weights.in_use())
            yield

    @contextmanager
    def present(self, calls: Sequence[Call]) -> Iterator[None]:
        """Inside, the weights of these calls that wait in host memory are on the device."""
        with ExitStack() as stack:
            for call in calls:
                if (waiting := self._waiting.get(call.role)) is not None:
                    stack.enter_context(waiting.present())
            yield

    def release(self, call: Call) -> None:
        """Give back the memory of the copy of the weights that `call` has, if any, until it is next wanted. All
        ranks call it."""
        if (move := self.moves.get(call.name)) is not None:
            move.release()

    def _use(self, call: Call, model: nn.Module | None) -> None:
        """Score with `model`, which is the same each time, or None where this rank does not."""
        if model is None or call.role in self._scoring:
            return
        scored = cast(PreTrainedModel, model)
        module: nn.Module = Policy(scored, exact=self.exact) if call.role == "actor" else Scorer(scored)
        if self.plan[call.name].layout.zero_stage == 3:
            module = gathering(module, self.stage.dtype, self.positions[call.name].ranks)
        self._scoring[call.role] = module
        if call.role == "critic" and self.critic_scale is not None:
            self.scale_critic(*self.critic_scale)

    @torch.no_grad()
    def logprobs(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """Return the log-probabilities of the actor as it is trained, float32 (response tokens) of each batch; none on
        a stage but the last."""
        return [logprobs for logprobs, _ in self._ask("actor_train", self.actor, batches, self.settings.temperature)]

    @torch.no_grad()
    def score(self, role: str, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """Return the results of a role's score call, on ranks that take part; none on a stage but the last.

        Float32: log-probabilities at the temperature of the policy (response tokens), of the actor as the call has it
        or of the frozen SFT model; values (response tokens); scores of the reward model at the last tokens (rows).
        """
        module: nn.Module | ZeroEngine | None = self._scoring.get(role) or self._engines.get(role)
        more = (self.settings.temperature,) if role in ("actor", "reference") else ()
        with ExitStack() as stack:
            if role == "reference" and self.actor_is_reference:
                module = self.actor
                stack.enter_context(cast(Policy, self.actor.module).without_adapter())
            outputs = self._ask(f"{role}_score", module, batches, *more)
        read = {"critic": response_values, "reward": at_last_token}.get(role, lambda output, _: output[0])
        return [read(output, batch) for output, batch in zip(outputs, batches, strict=bool(outputs))]

    def _ask(self, call: str, module: Any, batches: Sequence[TokenBatch], *more: Any) -> list[Any]:
        """Return the outputs of a role's model, or of the last stage of it; none on the other stages."""
        position = self.positions[call]
        with nullcontext() if isinstance(module, ZeroEngine) else position.stage_ranks.as_world():
            if position.cut is None:
                return [module(batch, *more) for batch in batches]
            outputs: list[Any] = [None] * len(batches)
            model = getattr(module, "module", module).model
            self.staged.score(call, ScoringWork(module, model, position.cut, batches, outputs.__setitem__, *more))
        return outputs if position.cut.is_last else []

    def save(self, directory: Path) -> None:
        """Save all roles, each by the ranks that train it. All ranks call it."""
        for role, engine in self._engines.items():
            engine.save(directory / role)
        if self.ema is not None:
            self.ema.save(directory / "ema")

    def load(self, directory: Path) -> None:
        for role, engine in self._engines.items():
            engine.load(directory / role)
        if self.ema is not None:
            self.ema.load(directory / "ema")


def response_values(scores: Tensor, batch: TokenBatch) -> Tensor:
    """Return the value of the state in which each response token is drawn: that of the token before it."""
    return scores[batch.predicting]
