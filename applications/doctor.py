"""`rlhf-chat doctor --model DIR`: does this model generate here what plain transformers gives?

As a script it is one rank of the check: doctor.py DIRECTORY DTYPE NAME FILE, started by torchrun.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import rlhf_chat  # noqa: F401  a script of ranks, too
from applications.launch import run_on_ranks
from applications.preset_store import settings_for_model
from inference.chat_format import ChatFormat
from inference.chat_target import find_chat_models, refuse_reward_model
from inference.errors import EXIT_USER_ERROR, UserError, copied_again, reason
from inference.families import longest_text
from inference.generation.cpu import Exactness
from inference.generation.equality import (
    Findings,
    Generated,
    Tolerance,
    TrainingLogprobs,
    Work,
    compare,
    generate,
    training_gap,
)
from inference.model_store import check_model_directory, resolve_model
from inference.private_surfaces import attention_of, set_attention
from inference.streams import to_stderr
from inference.tensor_parallel.shard import TensorParallel, empty_shard, join_groups
from inference.weights import quiet_transformers
from training.config import Dtype
from training.data.batching import TokenBatch
from training.distributed import Ranks, start_ranks, stop_ranks
from training.launchers import begin_script
from training.models.loading import TORCH_DTYPES, load_causal_lm, resolve_dtype
from training.models.policy import Policy
from training.rlhf_settings import RLHFSettings
from training.step3_rlhf.exactness import find_exactness
from training.step3_rlhf.planned import expects_exactness

DTYPES = ("auto", *TORCH_DTYPES)
LONGEST = 1024
"""Tokens that attention is tried with where a run's are not known."""


def check_model(source: str, degree: int = 1, dtype: str = "auto") -> bool:
    """Print the equality check of a model; returns whether it passed. `degree` is tensor-parallel, a process each.

    `source` is a model or run directory, a preset, a package or a hub id. Raises UserError for what cannot be checked.
    """
    if dtype not in DTYPES:
        raise UserError(f"There is no dtype '{dtype}'; use {', '.join(DTYPES)}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if degree > torch.cuda.device_count() > 0:
        raise UserError(f"--tp {degree} needs {degree} GPUs, and this machine has {torch.cuda.device_count()}.")
    number_format = resolve_dtype(cast(Dtype, dtype), device)
    directory = find_model(source)
    check_cut(directory, degree)
    if degree == 1:
        return check_on(Ranks(0, 1, device), directory, number_format, source)
    arguments = [str(directory.resolve()), str(number_format).removeprefix("torch."), source]
    return run_on_ranks(__file__, arguments, degree, "check")["is_equal"]


def find_model(source: str) -> Path:
    """The directory of the language model that `source` stands for; of a run, the newest one."""
    values = settings_for_model(source)
    path = Path(values["model"]).expanduser()
    if len(values) > 1 or not path.is_dir():  # a preset, a hub id or a package
        path = resolve_model(values["model"], to_stderr)
        refuse_reward_model(path)
        return path
    ((_, directory),) = find_chat_models(path, compare=False)
    check_model_directory(directory)
    return directory


def check_cut(directory: Path, degree: int) -> None:
    """Raise UserError where the model cannot be cut into so many parts; no weights are read."""
    if degree == 1:
        return
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with quiet_transformers(), torch.device("meta"):
            shape = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    except Exception as error:  # transformers raises many kinds here, all of them about config.json
        raise UserError(
            f"The config.json of {directory} cannot be used ({reason(error)}); {copied_again(error)}."
        ) from error
    empty_shard(shape, TensorParallel(0, degree))


def check_on(ranks: Ranks, directory: Path, dtype: torch.dtype, name: str) -> bool:
    """Load, generate and compare; all ranks call it, the first prints and knows whether all is equal."""
    start = time.perf_counter()
    chat_format = ChatFormat.load(directory)
    with quiet_transformers():
        whole = load_causal_lm(directory, chat_format, dtype).eval()
    vocabulary = min(chat_format.vocabulary_size, cast(Any, whole.get_input_embeddings()).num_embeddings)
    work = Work.of(vocabulary, chat_format.pad_id, longest_text(whole.config))
    if ranks.size == 1:
        model: nn.Module = cast(Any, whole).to(ranks.device)
    else:
        model = own_part(whole, cast(TensorParallel, join_groups([range(ranks.size)])), ranks.device)
    if not ranks.is_first:
        del whole  # before generation needs the room
        generate(model, work)
        return True
    generated = generate(model, work)
    plain = cast(Any, whole).to(ranks.device)
    findings = compare(generated, plain, work, Tolerance.of(dtype), training_forward(plain))
    head = describe(name, plain, ranks)
    if ranks.size == 1:
        head.append(beside_training(plain, work, dtype, ranks, findings.deviations[-1].largest))
    print(report(findings, generated, work, head, time.perf_counter() - start), flush=True)
    return findings.is_equal


def beside_training(model: Any, work: Work, dtype: torch.dtype, ranks: Ranks, usual: float) -> str:
    """How far step 3's training is from its generation here, by default and at best; `usual`, in nats a token, is how
    far where nothing makes them equal."""
    text = f"within {usual:.1e} nats a token"
    if exact := find_exactness(model, None, dtype, LONGEST, ranks):
        gap = training_gap(model, work, training_forward(model, exact), exact)
        best = "to the bit" if gap == 0 else f"within {gap:.1e} nats a token"
        is_default = expects_exactness(RLHFSettings(), dtype, ranks.device)
        text = best if is_default else f"{text}, with rlhf.exact=true {best}"
    return f"Training    training = generation: {text}"


def own_part(whole: nn.Module, tensor_parallel: TensorParallel, device: torch.device) -> nn.Module:
    """This rank's part of a whole model, filled."""
    part, pieces = empty_shard(whole, tensor_parallel, device)
    parameters = dict(whole.named_parameters())
    with torch.no_grad():
        for piece in pieces:
            values = parameters[piece.name]
            piece.local.copy_(values if piece.cut is None else piece.cut(values))
    return part.to(device)  # buffers too


def training_forward(model: Any, exact: Exactness | None = None) -> TrainingLogprobs:
    """The log-probabilities that step 3 trains on, from `model` as it is."""

    def logprobs(rows: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        before = attention_of(model.config)
        try:
            with torch.no_grad():
                return Policy(model, exact=exact)(TokenBatch.of(rows, model.device))[0]
        finally:
            set_attention(model.config, before)  # a policy packs its rows for good

    return logprobs


def describe(name: str, model: Any, ranks: Ranks) -> list[str]:
    dtype = {dtype: text for text, dtype in TORCH_DTYPES.items()}[model.dtype]
    where = "CPU" if ranks.device.type == "cpu" else torch.cuda.get_device_name(ranks.device)
    cut = f"tensor-parallel degree {ranks.size}" if ranks.size > 1 else "whole in one process"
    return [f"Model       {name}: {model.config.model_type}, {model.num_parameters():,} parameters, {dtype}",
            f"Where       {where}, {cut}"]  # fmt: skip


def report(findings: Findings, generated: Generated, work: Work, head: list[str], seconds: float) -> str:
    """What the user reads; the last line is the verdict."""
    path = "packed attention, no padding" if generated.is_packed else "the family's own attention, padded rows"
    lengths = sorted(len(prompt) for prompt in work.prompts)
    kind = "on average" if findings.tolerance.of_mean else "for each token"
    lines = [
        *head,
        f"Path        {path}",
        f"Work        {len(lengths)} random prompts of {lengths[0]} to {lengths[-1]} tokens, {work.new_tokens} "
        f"new tokens each",
        f"Against     plain transformers, one left-padded batch; {findings.tolerance.limit:.2g} allowed {kind}",
        "",
        f"{'deviation in nats':<44}{'tokens':>7}{'mean':>10}{'largest':>10}",
    ]
    for deviation in (findings.own, *findings.deviations):
        sign = "ok" if deviation.is_within(findings.tolerance) else "TOO LARGE"
        sign = "" if deviation is findings.own else f"  {sign}"  # it is the measure of the others
        lines.append(
            f"{deviation.name:<44}{deviation.tokens:>7}{deviation.mean:>10.1e}{deviation.largest:>10.1e}{sign}"
        )
    for redraw in findings.redraws:
        sign = "NOT THE SAME" if redraw in findings.wrong_redraws else "ok"
        lines.append(f"{redraw.name:<44}{f'{redraw.same} of {redraw.samples} the same':>27}  {sign}")
    lines += [
        "",
        f"Seconds     {seconds:.1f}, of these {generated.seconds:.1f} generating",
        f"Verdict: {findings.verdict}",
    ]
    return "\n".join(lines)


def main() -> int:
    """Run one rank of several."""
    begin_script()
    directory, dtype, name, result = sys.argv[1:]
    ranks = start_ranks()
    try:
        is_equal = check_on(ranks, Path(directory), getattr(torch, dtype), name)
    except UserError as error:
        Path(result).write_text(
            json.dumps({"error": str(error)}), encoding="utf-8"
        )  # every rank: the launcher ends the slower ones
        return EXIT_USER_ERROR
    if ranks.is_first:
        Path(result).write_text(json.dumps({"is_equal": is_equal}), encoding="utf-8")
    ranks.barrier()
    stop_ranks()
    return 0


if __name__ == "__main__":
    sys.exit(main())
