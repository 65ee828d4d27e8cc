"""Log-probabilities of the reference, asked once: the policy before its first update, or a model of one's own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from inference.chat_format import ChatFormat
from training.data.batching import TokenBatch, plan_micro_batches
from training.data.token_cache import TokenPair, answers_of, grouped, tokens_of
from training.hybrid_engine.deepspeed_setup import loads
from training.hybrid_engine.stored_weights import freeze
from training.hybrid_engine.zero_engine import ZeroEngine
from training.metrics import Display
from training.models.loading import load_causal_lm
from training.models.policy import Policy
from training.role_settings import FrozenSettings
from training.run_directory import write_tensors
from training.stage import Stage
from training.supervised import Task


@dataclass(frozen=True)
class Work:
    sets: Mapping[str, Sequence[TokenPair]]  # `train` and `eval`: what the reference is asked about
    needed: list[list[int]]  # groups of `train` that an optimiser step will see, by the indices of their pairs
    rows: int  # for training: pairs, prompts with by_prompt, or answers
    compared: int  # held-out pairs that accuracy is counted on
    task: Callable[..., Task]  # called with the stage, the engine, the sets and what the reference says of them


def load_own_reference(stage: Stage, source: Path, chat_format: ChatFormat) -> nn.Module:
    """Load it frozen, under the ZeRO stage of the policy if that divides weights."""
    optimizer = stage.settings.optimizer
    divided = FrozenSettings(zero_stage=3 if optimizer.zero_stage == 3 else 0)
    _, with_weights = loads(optimizer.zero_stage, stage.dtype, stage.ranks)
    model = load_causal_lm(source, chat_format, stage.dtype, with_weights=with_weights)
    return freeze(Policy(model), divided, stage.dtype, stage.ranks)


def response_logprobs(
    engine: nn.Module | ZeroEngine, groups: Sequence[Sequence[TokenPair]], device: torch.device
) -> Tensor:
    """Score whole responses, the chosen ones and the rejected ones: float32 (2, pairs), from one forward pass."""
    rows, indices = answers_of(groups)
    return row_logprobs(engine, rows, device)[indices.to(device, non_blocking=True)]


def row_logprobs(engine: nn.Module | ZeroEngine, rows: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> Tensor:
    """Score the whole responses of prompts and responses: float32 (rows), from one forward pass."""
    logprobs, _ = engine(TokenBatch.of(rows, device))
    return torch.stack([part.sum() for part in logprobs.split([len(response) for _, response in rows])])


def reference_logprobs(
    stage: Stage,
    reference: Callable[[], nn.Module | ZeroEngine],
    pairs: Mapping[str, Sequence[TokenPair]],
    needed: list[list[int]],
) -> dict[str, Tensor]:
    """Return for `train` and `eval` pairs float32 (2, pairs) on every rank, from the step's directory, else scored and
    stored there.

    `needed` are the groups of training pairs that an optimiser step will see; NaN for the others. A `reference` that is
    trained must still have the weights that it began with; fresh adapters change nothing.
    """
    file = stage.directory.reference_file
    stage.ranks.see(file)
    stored = load_file(file) if file.exists() else {}
    stage.ranks.barrier("a look at the reference")  # all have looked before the first rank writes
    train, held_out = pairs["train"], pairs["eval"]
    indices = [i for group in needed for i in group]
    sizes = {name: values.shape[1] for name, values in stored.items()}
    fits = sizes == {name: len(rows) for name, rows in pairs.items()}
    if fits and not stored["train"][:, indices].isnan().any():  # a longer run needs more of them
        return stored
    engine = reference()
    scores = {
        "train": score_pairs(stage, engine, train, needed),
        "eval": score_pairs(stage, engine, held_out, grouped(held_out, by_prompt=False)),
    }
    if stage.ranks.is_first:
        write_tensors(file, scores)
    return scores


@torch.no_grad()
def score_pairs(
    stage: Stage,
    engine: nn.Module | ZeroEngine,
    pairs: Sequence[TokenPair],
    needed: list[list[int]],
    quiet: bool = False,
) -> Tensor:
    """Score the `needed` groups, a share on each rank, and return all scores on all: float32 (2, pairs)."""
    result = torch.full((2, len(pairs)), torch.nan)
    if not needed:
        return result
    scores, budget = torch.zeros(2, len(pairs)), stage.settings.micro_batch_tokens
    groups = [[pairs[i] for i in group] for group in needed]
    plan = plan_micro_batches([tokens_of(group) for group in groups], budget, stage.ranks.size)[stage.ranks.rank]
    with (Display(quiet=True) if quiet else stage.display).progress("Reference", len(plan)) as bar:
        for micro_batch in plan:
            values = response_logprobs(engine, [groups[row] for row in micro_batch.rows], stage.ranks.device)
            if micro_batch.weight:
                scores[:, [i for row in micro_batch.rows for i in needed[row]]] = values.cpu()
            bar.advance()
    scored = [i for group in needed for i in group]
    result[:, scored] = stage.ranks.sum(scores)[:, scored]
    return result
