"""A role under DeepSpeed: forward passes, updates, checkpoints, and whole weights when they are wanted."""

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from inference.errors import UserError
from inference.private_surfaces import whole_shape
from training.deepspeed_config import deepspeed_config
from training.distributed import Ranks
from training.hybrid_engine.deepspeed_setup import deepspeed, divide, tensors_only
from training.hybrid_engine.fragments import Fragment, FragmentReader, write_fragments
from training.private_surfaces import (
    has_overflow,
    is_on_disk,
    loss_scale,
    overflow_replacements,
    own_run,
    own_weights,
    reduce_nothing,
    refresh_weights,
    restore_loss_scale,
)
from training.role_settings import OptimizerSettings

TAG = "state"
"""The tag of DeepSpeed's own checkpoints."""
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of each weight."""


class HasWeight(Protocol):
    """A micro-batch; weight 0 takes part in the collectives and adds nothing to the gradient."""

    @property
    def weight(self) -> float: ...


M = TypeVar("M", bound=HasWeight)


class ZeroEngine:
    """Trains `model` in place, wherever it lies. `total_steps` is how many updates the learning-rate schedule spans.

    `ranks` may be a part of the run's: "all ranks" are these.

    `dropout` says that the model has some, which is on in updates alone: what is scored never sees it.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings,
        dtype: torch.dtype,
        total_steps: int,
        ranks: Ranks,
        dropout: bool = False,
    ):
        ranks.barrier("loading the models")  # what comes then are collectives of DeepSpeed
        self.settings = settings
        self.in_training_mode = dropout or settings.gradient_checkpointing
        """Whether updates need it: transformers recomputes in this mode only."""
        self.total_steps = total_steps
        self.ranks = ranks
        self.updates = 0
        if not settings.master_weights:
            model = model.to(dtype)
        if settings.gradient_checkpointing:
            cast(Any, model.model).gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = make_optimizer(model, settings)
        config = deepspeed_config(settings, dtype)
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        """Peak learning rate of each group, adapters first."""
        with ranks.as_world(), redirect_stdout(io.StringIO()):  # it prints memory tables
            if settings.zero_stage == 3:
                divide(model, config, dtype, ranks)
            self.engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=config,
                dist_init_required=False,
            )
        if ranks.size == 1:
            reduce_nothing(self.engine)
        self.engine.eval()  # dropout stays off: old and new log-probabilities must come from one function

    @property
    def module(self) -> nn.Module:
        return self.engine.module

    @property
    def language_model(self) -> nn.Module:
        """The transformers model inside, with its adapters."""
        return cast(nn.Module, self.engine.module.model)

    def __call__(self, *inputs: Any, **more: Any) -> Any:
        with self.ranks.as_world():
            return self.engine(*inputs, **more)

    def update(self, micro_batches: Sequence[M], loss: Callable[[M], Tensor]) -> dict[str, float]:
        """Make an optimiser step on the sum of `loss(micro_batch)` over all micro-batches of all ranks.

        Each rank passes its own micro-batches, equally many; `loss` returns a micro-batch's share of the total loss,
        divided by the *global* count of tokens or pairs, so that neither micro-batches nor ranks change the gradient.
        Returns grad_norm (before clipping) and lr (of the adapters, where there are some).
        """
        self.accumulate(micro_batches, loss)
        return self.step()

    def accumulate(self, micro_batches: Sequence[M], loss: Callable[[M], Tensor]) -> None:
        """Run the first half of `update`: forward and backward passes."""
        if self.in_training_mode:
            self.engine.train()
        for index, micro_batch in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            share = loss(micro_batch) * micro_batch.weight
            with self.ranks.as_world():
                self.engine.backward(share * self.ranks.size)  # DeepSpeed takes the mean over ranks; the sum is meant

    def step(self) -> dict[str, float]:
        """Run the second half of `update`: the optimiser step on what was accumulated."""
        rates = [learning_rate(self.settings, self.updates, self.total_steps, peak) for peak in self.peaks]
        for group, rate in zip(self.engine.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        our_norm = self._gradient_norm()
        with self.ranks.as_world():
            self.engine.step()
        if self.in_training_mode:
            self.engine.eval()
        self.updates += 1
        norm = self.engine.get_global_grad_norm() if our_norm is None else our_norm
        return {"grad_norm": 0.0 if norm is None else float(norm), "lr": rates[0]}

    def _gradient_norm(self) -> Tensor | None:
        """Return the norm of the summed gradient at ZeRO stage 0, where DeepSpeed has none; None at other stages."""
        if self.engine.zero_optimization_stage() > 0:
            return None
        return norm_of([p.grad for p in self.module.parameters() if p.grad is not None])

    def own_weights(self) -> list[Tensor]:
        """Return this rank's part of the trained weights, as the optimiser updates them: writing into them is training.

        Flat fp32 tensors from ZeRO stage 1 on (bf16 without master weights), the parameters themselves at stage 0.
        """
        if self.engine.zero_optimization_stage() == 0:
            return [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        return own_weights(self.engine.optimizer)

    def fragments(self) -> list[Fragment]:
        """Return where the values of the trained parameters lie in `own_weights`."""
        trained = [(name, weight) for name, weight in self.module.named_parameters() if weight.requires_grad]
        if self.engine.zero_optimization_stage() == 0:
            sizes = [(name, weight.numel()) for name, weight in trained]
            return [Fragment(name, size, 0, size, index, 0) for index, (name, size) in enumerate(sizes)]
        fragments = []
        for name, weight in trained:
            run = own_run(self.engine.optimizer, weight)
            if run[1]:
                fragments.append(Fragment(name, math.prod(whole_shape(weight)), *run))
        return fragments

    def refresh(self) -> None:
        """Let forward passes read what was written into `own_weights`. All ranks call it."""
        if self.engine.zero_optimization_stage() > 0 and not is_on_disk(self.engine.optimizer):
            with self.ranks.as_world():
                refresh_weights(self.engine.optimizer)

    def write(self, directory: Path, tensors: Mapping[str, Sequence[Tensor | None]], **notes: Any) -> None:
        """Write tensors that lie as `own_weights` do. All ranks call it; each writes what it has, of what all have a
        part."""
        fragments = self.fragments()
        if self.engine.zero_optimization_stage() == 0:
            fragments = [fragment.share(self.ranks.rank, self.ranks.size) for fragment in fragments]
        rank = self.ranks.mesh[self.ranks.rank] if self.ranks.mesh else self.ranks.rank
        write_fragments(directory / f"{rank}.safetensors", fragments, tensors, notes)

    def read(self, directory: Path, tensors: Mapping[str, Sequence[Tensor]]) -> None:
        """Fill `tensors` from what `write` wrote, with any number of ranks at any ZeRO stage."""
        old = self.folder(directory) / f"{self.ranks.rank}.pt"
        if not old.exists():
            return FragmentReader(directory).read(self.fragments(), tensors)
        flat = [tensor for of_kind in tensors.values() for tensor in of_kind]
        saved = torch.load(old, map_location="cpu", weights_only=True)
        for tensor, before in zip(flat, saved[-len(flat) :], strict=True):  # weights of forward passes came first
            tensor.copy_(before)

    def folder(self, directory: Path) -> Path:
        """Return where these ranks alone wrote, in a directory of the role, when checkpoints were for as many ranks."""
        return directory

    def save(self, directory: Path) -> None:
        """Write what resuming needs. All ranks call it; frozen weights are left out, they come from their source."""
        if is_on_disk(self.engine.optimizer):
            with self.ranks.as_world():
                state = {"updates": self.updates}
                self.engine.save_checkpoint(
                    str(self.folder(directory)), TAG, state, exclude_frozen_parameters=self._has_frozen
                )
            return
        own = self.own_weights()
        states = [self.engine.basic_optimizer.state.get(weight, {}) for weight in own]
        steps = {fragment.name: float(states[fragment.tensor].get("step", 0)) for fragment in self.fragments()}
        tensors = {"weight": own, **{moment: [state.get(moment) for state in states] for moment in MOMENTS}}
        scale = loss_scale(self.engine.optimizer)
        self.write(directory, tensors, updates=self.updates, steps=steps, loss_scale=scale)

    def load(self, directory: Path) -> None:
        """Go on from what `save` wrote, with any number of ranks at any ZeRO stage. Nothing that files ask for is run.

        DeepSpeed's own checkpoints open with as many ranks, at the stage that wrote them; see `tensors_only`.
        """
        folder = self.folder(directory)
        if any(directory.rglob(f"{TAG}/*.pt")):
            self._require_own_stages(folder / TAG)
            with tensors_only(), self.ranks.as_world():
                _, state = self.engine.load_checkpoint(str(folder), TAG, load_module_strict=not self._has_frozen)
            self.updates = state["updates"]
            return self.refresh()
        reader, fragments, own = FragmentReader(directory), self.fragments(), self.own_weights()
        steps: dict[str, float] = {}
        for notes in reader.notes:
            steps |= notes["steps"]
        moments: dict[str, list[Tensor | None]] = {moment: [None] * len(own) for moment in MOMENTS}
        for index, weight in enumerate(own):
            state = self.engine.basic_optimizer.state[weight]
            step = max((steps[fragment.name] for fragment in fragments if fragment.tensor == index), default=0.0)
            if not step:
                state.clear()
                continue
            like_torch = isinstance(self.engine.basic_optimizer, torch.optim.AdamW)  # DeepSpeed's counts in a number
            state["step"] = torch.tensor(step, dtype=torch.float32, device=weight.device) if like_torch else int(step)
            for moment in MOMENTS:
                dtype = weight.dtype if like_torch else torch.float32
                state[moment] = state[moment].zero_() if moment in state else torch.zeros_like(weight, dtype=dtype)
                moments[moment][index] = state[moment]
        reader.read(fragments, {"weight": own})
        reader.read([fragment for fragment in fragments if steps[fragment.name]], moments)
        self.updates = reader.notes[0]["updates"]
        restore_loss_scale(self.engine.optimizer, reader.notes[0]["loss_scale"])
        self.refresh()

    def _require_own_stages(self, files: Path) -> None:
        """Raise UserError where DeepSpeed wrote a checkpoint at another ZeRO stage, or with other pipeline stages."""
        parts = any(files.glob("*zero_pp_rank_*_model_states.pt")), any(files.glob("*_optim_states.pt"))
        stages = (3,) if parts[0] else (1, 2) if parts[1] else (0,)
        if not files.is_dir() or self.engine.zero_optimization_stage() not in stages:
            wrote = f"at ZeRO stage {' or '.join(map(str, stages))}" if files.is_dir() else "with other pipeline stages"
            raise UserError(
                f"{files.parent} was written {wrote} by DeepSpeed itself (by an earlier version of rlhf-chat, or with "
                f"the optimiser on NVMe) and opens so alone: set zero_stage and rlhf.plan as they were, or go on with "
                f"the version that wrote it."
            )

    @property
    def _has_frozen(self) -> bool:
        return any(not parameter.requires_grad for parameter in self.module.parameters())

    @property
    def savers(self) -> Ranks | None:
        """The ranks of which the first gets the `trained_weights`; None on a rank that has no part in them."""
        return self.ranks

    def trained_weights(self) -> dict[str, Tensor]:
        """Return whole trainable weights in fp32 on the CPU, named as in the language model.

        All ranks call it; only the first gets them (the others an empty dict).
        """
        from deepspeed.utils import safe_get_full_fp32_param

        weights = {}
        with self.ranks.as_world():
            for name, parameter in self.language_model.named_parameters():
                if parameter.requires_grad:
                    full = safe_get_full_fp32_param(parameter)
                    if not self.ranks.is_first:
                        continue
                    weights[name] = (parameter.data if full is None else full).detach().float().cpu().clone()
        return weights


def norm_of(gradients: Sequence[Tensor]) -> Tensor:
    """Return the norm of all gradients as one vector, in fp32."""
    return torch.stack([gradient.float().norm() for gradient in gradients]).norm()


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Make AdamW with weight decay on matrices only; adapters may have a learning rate of their own."""
    adapters, rest = settings.adapter_learning_rate, settings.learning_rate
    trained = [
        (adapters if "lora_" in name else rest, parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    groups = [
        {
            "params": [p for rate, p in trained if rate == peak and (p.ndim >= 2) == is_matrix],
            "weight_decay": settings.weight_decay if is_matrix else 0.0,
            "lr": peak,
        }
        for peak in dict.fromkeys((adapters, rest))
        for is_matrix in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    if settings.offload != "none" and torch.cuda.is_available():
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon, fused=True)


def learning_rate(settings: OptimizerSettings, update: int, total: int, peak: float | None = None) -> float:
    """Return the rate of update 0 .. total - 1: a linear rise over the warm-up, then the schedule down to 0 after the
    last. `peak` replaces the settings' own.
    """
    peak = settings.learning_rate if peak is None else peak
    warmup = math.ceil(settings.warmup * total)
    if update < warmup:
        return peak * (update + 1) / warmup
    done = (update - warmup) / max(1, total - warmup)
    if settings.schedule == "constant":
        return peak
    if settings.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return peak * max(0.0, 1 - done)


def step_together(engines: Sequence[ZeroEngine], ranks: Ranks) -> tuple[list[dict[str, float]], bool]:
    """Step this rank's engines after their backward passes; returns whether steps were made too. All ranks call it.

    An engine whose own gradient is finite keeps its loss scale when it skips for another.
    """
    overflows = []
    for engine in engines:
        with engine.ranks.as_world():
            overflows.append(has_overflow(engine.engine.optimizer))
    skipped = any(ranks.gather(any(overflows), "whether a gradient overflowed"))
    results = []
    for engine, own in zip(engines, overflows, strict=True):
        with forced(engine.engine.optimizer, skipped, keeps_scale=skipped and not own):
            results.append(engine.step())
    return results, not skipped


@contextmanager
def forced(optimizer: Any, overflow: bool, keeps_scale: bool) -> Iterator[None]:
    """Inside, the optimiser finds `overflow` when it looks, and does not lower its loss scale if it `keeps_scale`."""
    replaced = overflow_replacements(overflow, keeps_scale)
    for name, function in replaced.items():
        setattr(optimizer, name, function)  # in front of the class's method
    try:
        yield
    finally:
        for name in replaced:
            delattr(optimizer, name)
