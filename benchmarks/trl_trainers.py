"""GRPO, RLOO, SFT and DPO of today's TRL on the work of work.py, from a library directory of its own.

    pip install --no-deps --target DIR trl==1.16.0
    python -m benchmarks.trl_trainers --trl DIR --method grpo --lengths tail512 --continuous --mended

Four optimiser steps: a generation batch of 32 in four batches of 8 (`steps_per_generation=4`); one step: the four are
accumulated. Off are gradient checkpointing and `use_bias_correction_kl`, with which KL has another gradient.

`--mended` changes TRL. Without Triton its output layer goes over all positions, prompts and padding too; on a GPU over
those that count alone. `trl.trainer.utils._use_triton`, which decides it, then answers True.
"""

import argparse
import sys
import tempfile
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks import work
from benchmarks.trl_peer import AskedIterations, Generating, Iterations, import_trl
from benchmarks.turns import Channel
from benchmarks.work import GROUP, KL, LENGTHS, MINI_BATCHES, SAMPLES, SIZES, Lengths
from inference.errors import UserError

TRL_NOW = "1.16.0"
CACHE = {"num_blocks": 48, "max_batch_tokens": 2048}
"""Of continuous batching, which else takes half of the machine's memory."""


class Clock:
    """Where an iteration stands: it begins when it is asked for, and ends when its last optimiser step is logged."""

    def __init__(self, lengths: Lengths, iterations: Iterations):
        self.lengths, self.iterations = lengths, iterations
        self.number, self.tokens = 0, 0

    def begin(self) -> None:
        self.number = self.iterations.wait()
        self.begun = self.generated = self.scored = time.perf_counter()

    def end(self, loss: float) -> None:
        ended = time.perf_counter()
        seconds = {
            "generate": self.generated - self.begun,
            "score": self.scored - self.generated,
            "train": ended - self.scored,
            "total": ended - self.begun,
        }
        self.iterations.done({**seconds, "tokens": self.tokens, "loss": loss})

    def time_rollouts(self, trainer: Any) -> None:
        """Wrap what makes samples and what scores them."""
        generate, generate_and_score = trainer._generate_single_turn, trainer._generate_and_score_completions

        def timed_generate(*arguments: Any, **named: Any) -> Any:
            made = generate(*arguments, **named)
            self.generated = time.perf_counter()
            lengths = [len(ids) for ids in (made[0] if isinstance(made, tuple) else made)]  # RLOO: no log-probabilities
            if lengths != self.lengths.of(self.number):
                raise AssertionError(f"TRL generated {lengths} tokens, not {self.lengths.of(self.number)}")
            self.tokens = sum(lengths)
            return made

        def timed_score(inputs: Any) -> Any:
            self.begin()
            made = generate_and_score(inputs)
            self.scored = time.perf_counter()
            if made["prompt_mask"].sum() != SAMPLES * work.PROMPT_TOKENS:
                raise AssertionError("TRL cut prompts or padded them")
            return made

        trainer._generate_single_turn, trainer._generate_and_score_completions = timed_generate, timed_score


def common_settings(arguments: argparse.Namespace, output: Path) -> dict[str, Any]:
    return {
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": arguments.dtype == "bf16" and arguments.master == "fp32",
        "gradient_checkpointing": False,
        "learning_rate": work.LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def policy(arguments: argparse.Namespace) -> dict[str, Any]:
    """Model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = work.models(arguments.size).actor
    dtype = torch.bfloat16 if arguments.dtype == "bf16" and arguments.master == "none" else torch.float32
    return {
        "model": AutoModelForCausalLM.from_pretrained(directory, dtype=dtype),
        "processing_class": AutoTokenizer.from_pretrained(directory),
    }


def make_online(trl: Any, arguments: argparse.Namespace, output: Path, clock: Clock) -> Any:
    """The trainer of GRPO or RLOO."""
    from datasets import Dataset

    from training.reward_specs import NAMED_REWARDS

    name, _, pattern = work.REWARD.partition(":")
    reward = NAMED_REWARDS[name](pattern).score
    made = policy(arguments)
    texts = made["processing_class"].batch_decode(work.prompts(1))
    settings: dict[str, Any] = {
        **common_settings(arguments, output),
        "per_device_train_batch_size": SAMPLES // MINI_BATCHES,
        "gradient_accumulation_steps": MINI_BATCHES // arguments.mini_batches,
        "steps_per_generation": MINI_BATCHES,
        "max_steps": arguments.mini_batches * (arguments.iterations + 1),
        "num_generations": GROUP,
        "max_completion_length": clock.lengths.longest,
        "beta": arguments.kl,
        "shuffle_dataset": False,
    }
    if arguments.method == "grpo":
        settings["use_bias_correction_kl"] = False
    if arguments.continuous:
        settings |= {"use_transformers_continuous_batching": True, "transformers_continuous_batching_config": CACHE}
    kind = arguments.method.upper()
    trainer = getattr(trl, f"{kind}Trainer")(
        **made,
        reward_funcs=lambda completions, **_: [reward(text, {}) for text in completions],
        args=getattr(trl, f"{kind}Config")(**settings),
        train_dataset=Dataset.from_dict({"prompt": texts}),
    )
    if arguments.continuous:
        force_requests(clock)
    else:
        Generating(trainer.model, clock)
    clock.time_rollouts(trainer)
    return trainer


def force_requests(clock: Clock) -> None:
    """Of continuous batching every request has a length of its own, and no end token."""
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

    add = ContinuousBatchingManager.add_request

    def add_forced(manager: Any, request_id: str, **named: Any) -> Any:
        length = clock.lengths.of(clock.number)[int(request_id.removeprefix("req_"))]
        return add(manager, request_id=request_id, **{**named, "max_new_tokens": length, "eos_token_id": -1})

    ContinuousBatchingManager.add_request = add_forced


def make_offline(trl: Any, arguments: argparse.Namespace, output: Path, clock: Clock) -> Any:
    """The trainer of SFT or DPO: an epoch is one optimiser step on all rows."""
    from datasets import Dataset

    made, is_sft = policy(arguments), arguments.method == "sft"
    kind, parts = ("SFT", ("prompt", "completion")) if is_sft else ("DPO", ("prompt", "chosen", "rejected"))
    rows = work.demonstrations() if is_sft else work.pairs()
    text = partial(made["processing_class"].decode, skip_special_tokens=True)  # TRL adds the end token
    columns = {part: [" " * bool(place) + text(row[place]) for row in rows] for place, part in enumerate(parts)}
    settings = common_settings(arguments, output)
    if arguments.batching == "sorted":
        settings["train_sampling_strategy"] = "group_by_length"
    elif arguments.batching == "padding-free":
        settings |= {"padding_free": True, "max_length": None}
    elif arguments.batching == "packed":
        settings |= {"packing": True, "max_length": max(work.row_lengths())}
    items = work.PACKS if arguments.batching == "packed" else len(rows)
    settings |= {"per_device_train_batch_size": arguments.batch, "num_train_epochs": arguments.iterations + 1}
    settings["gradient_accumulation_steps"] = -(-items // arguments.batch)
    trainer = getattr(trl, f"{kind}Trainer")(
        **made, args=getattr(trl, f"{kind}Config")(**settings), train_dataset=Dataset.from_dict(columns)
    )
    data = trainer.train_dataset
    parts = ("input_ids",) if is_sft else ("prompt_ids", "chosen_ids", "prompt_ids", "rejected_ids")
    clock.tokens = sum(len(ids) for part in parts for ids in data[part])
    if len(data) != items:
        raise AssertionError(f"TRL made {len(data)} rows of {len(rows)}, not {items}")
    return trainer


def make_callback(clock: Clock, mini_batches: int, is_online: bool) -> Any:
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_epoch_begin(self, *arguments: Any, **named: Any) -> None:
            if not is_online:
                clock.begin()

        def on_log(self, arguments: Any, state: Any, control: Any, logs: dict[str, float], **named: Any) -> None:
            if "loss" in logs and state.global_step % mini_batches == 0:
                clock.end(logs["loss"])

    return Turns()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, required=True, help=f"where TRL {TRL_NOW} is installed")
    parser.add_argument("--method", choices=["grpo", "rloo", "sft", "dpo"], default="grpo")
    parser.add_argument("--size", choices=list(SIZES), default="s")
    parser.add_argument("--lengths", choices=list(LENGTHS), default="skew", help="of responses (GRPO, RLOO)")
    parser.add_argument("--mini-batches", type=int, choices=[1, MINI_BATCHES], default=MINI_BATCHES)
    parser.add_argument("--kl", type=float, default=KL, help="beta of GRPO and RLOO; 0: without a reference")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument(
        "--master", choices=["fp32", "none"], default="fp32", help="bf16 only: autocast of fp32 weights?"
    )
    parser.add_argument("--continuous", action="store_true", help="generate by its continuous batching")
    parser.add_argument("--batching", choices=["padded", "sorted", "padding-free", "packed"], default="padded")
    parser.add_argument("--batch", type=int, default=8, help="rows, pairs or packs of a forward pass (SFT, DPO)")
    parser.add_argument("--mended", action="store_true", help="the output layer on scored positions only")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", action="store_true", help="wait to be asked for each iteration (against_trl.py)")
    return parser.parse_args()


def describe(arguments: argparse.Namespace) -> str:
    if arguments.dtype == "fp32":
        return f"TRL {TRL_NOW}, fp32"
    weights = "weights and AdamW in bf16" if arguments.master == "none" else "fp32 weights under autocast"
    return f"TRL {TRL_NOW}, {weights}"


def main() -> None:
    arguments = parse_arguments()
    channel = Channel() if arguments.turns else None
    torch.set_num_threads(arguments.threads)
    try:
        trl = import_trl(arguments.trl, TRL_NOW, "trl")
    except UserError as error:
        sys.exit(str(error))
    if arguments.mended:
        utils = import_module("trl.trainer.utils")
        if not callable(getattr(utils, "_use_triton", None)):
            sys.exit("This TRL decides elsewhere where its output layer goes: nothing would be mended.")
        utils._use_triton = lambda device: True
    iterations = (
        AskedIterations(channel, {"what": describe(arguments)}) if channel else Iterations(arguments.iterations + 1)
    )
    clock = Clock(LENGTHS[arguments.lengths], iterations)
    is_online = arguments.method in ("grpo", "rloo")
    with tempfile.TemporaryDirectory() as output:
        trainer = (make_online if is_online else make_offline)(trl, arguments, Path(output), clock)
        steps = arguments.mini_batches if is_online else 1
        trainer.add_callback(make_callback(clock, steps, is_online))
        trainer.train()


if __name__ == "__main__":
    main()
