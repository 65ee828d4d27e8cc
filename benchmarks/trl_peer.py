"""TRL's PPO on our work, from a library directory of its own: releases after 1.12.0 have no PPO.

    pip install --no-deps --target DIR trl==1.12.0
    python -m benchmarks.trl_peer --trl DIR --size s --lengths skew --dtype fp32

Per-device batch 32, no accumulation, 4 mini-batches: real mini-batches of 8. In bf16 the weights are loaded in bf16 and
there is no fp32 copy of them; TRL's own bf16 switch changes nothing on a CPU.
"""

import argparse
import statistics
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from benchmarks import work
from benchmarks.turns import Channel, peak_gb
from benchmarks.work import END_ID, LENGTHS, MINI_BATCHES, PROMPT_TOKENS, SAMPLES, SIZES, Lengths
from inference.errors import UserError

TRL_VERSION = "1.12.0"


class ForcedLengths(LogitsProcessor):
    """The end token is forbidden before a row's length and forced at it."""

    def __init__(self, lengths: list[int]):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores (rows, vocabulary); rows that have ended are left alone."""
        last = self.lengths - 1
        drawn = input_ids.shape[1] - PROMPT_TOKENS
        scores[last > drawn, END_ID] = -torch.inf
        now = last == drawn
        if now.any():
            scores[now] = -torch.inf
            scores[now, END_ID] = 0.0
        return scores


class Generating:
    """Replaces `generate` of the policy by one that forces lengths; everything else is as it was."""

    def __init__(self, policy: Any, clock: "Clock"):
        self.original, self.clock = policy.generate, clock
        policy.generate = self

    def __call__(self, **arguments: Any) -> Any:
        forced = ForcedLengths(self.clock.lengths.of(self.clock.number))
        return self.original(**arguments, logits_processor=LogitsProcessorList([forced]))


class Clock:
    """Where an iteration stands: wraps the functions of TRL's trainer module, which has no hooks of its own."""

    def __init__(self, module: Any, lengths: Lengths, iterations: "Iterations"):
        self.lengths, self.iterations = lengths, iterations
        self.number = 0
        self.generate, self.score = module.batch_generation, module.get_reward
        module.batch_generation, module.get_reward = self.timed_generate, self.timed_score

    def timed_generate(self, *arguments: Any) -> Any:
        self.number = self.iterations.wait()
        self.begun = time.perf_counter()
        made = self.generate(*arguments)
        self.generated = time.perf_counter()
        self.width = made[0].shape[1] - PROMPT_TOKENS
        return made

    def timed_score(self, *arguments: Any) -> Any:
        made = self.score(*arguments)
        self.scored = time.perf_counter()  # the last call of an iteration ends its scoring
        return made

    def end(self) -> None:
        """The iteration is over."""
        ended = time.perf_counter()
        if self.width != max(self.lengths.of(self.number)):
            raise AssertionError(f"TRL generated {self.width} tokens, not {max(self.lengths.of(self.number))}")
        self.iterations.done(
            {
                "generate": self.generated - self.begun,
                "score": self.scored - self.generated,
                "train": ended - self.scored,
                "total": ended - self.begun,
                "tokens": self.lengths.tokens,
            }
        )


class Iterations:
    """Counts iterations and prints their medians."""

    def __init__(self, wanted: int):
        self.wanted, self.rows = wanted, list[dict[str, float]]()

    def wait(self) -> int:
        return len(self.rows)

    def done(self, seconds: dict[str, float]) -> None:
        self.rows.append(seconds)
        if len(self.rows) == self.wanted:
            for name in seconds:  # the first iteration warms up
                print(f"{name:10s} {statistics.median(row[name] for row in self.rows[1:]):.4f}")


class AskedIterations(Iterations):
    """Makes an iteration when it is asked to (turns.py)."""

    def __init__(self, channel: Channel, notes: dict[str, str]):
        super().__init__(0)
        self.channel = channel
        channel.answer(notes)

    def wait(self) -> int:
        return self.channel.wait()

    def done(self, seconds: dict[str, float]) -> None:
        self.channel.answer({**seconds, "peak_gb": peak_gb()})


def import_trl(directory: Path, version: str, name: str) -> Any:
    """The module `name` of the TRL in `directory`. Raises UserError with the command that fills it."""
    sys.path.insert(0, str(directory.resolve()))
    fill = f"fill it with pip install --no-deps --target {directory} trl=={version}."
    try:
        import trl

        if trl.__version__ != version:
            raise UserError(f"{directory} holds TRL {trl.__version__}; the comparison is with {version}: {fill}")
        return import_module(name)
    except ImportError as error:
        raise UserError(f"{directory} holds no TRL {version} ({error}); {fill}") from None


def make_trainer(size: str, lengths: Lengths, dtype: torch.dtype, iterations: int, output: Path, module: Any) -> Any:
    """TRL's trainer with our models, prompts and settings."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig

    directories = work.models(size)
    tokenizer = AutoTokenizer.from_pretrained(directories.actor)
    policy, reference = (AutoModelForCausalLM.from_pretrained(directories.actor, dtype=dtype) for _ in range(2))
    reward, critic = (
        AutoModelForSequenceClassification.from_pretrained(directories.reward, num_labels=1, dtype=dtype)
        for _ in range(2)
    )
    settings = PPOConfig(
        output_dir=str(output),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=SAMPLES,
        gradient_accumulation_steps=1,
        num_mini_batches=MINI_BATCHES,
        num_ppo_epochs=1,
        total_episodes=SAMPLES * iterations,
        local_rollout_forward_batch_size=SAMPLES,
        response_length=lengths.longest,
        temperature=1.0,
        num_sample_generations=0,
        stop_token="eos",
        learning_rate=work.LEARNING_RATE,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        eval_strategy="no",
        disable_tqdm=True,
    )
    prompts = Dataset.from_dict({"input_ids": work.prompts(min(iterations, 20)).tolist()})
    return module.PPOTrainer(settings, tokenizer, policy, reference, reward, prompts, critic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, required=True, help="where TRL 1.12.0 is installed")
    parser.add_argument("--size", choices=list(SIZES), default="s")
    parser.add_argument("--lengths", choices=list(LENGTHS), default="skew")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", action="store_true", help="wait to be asked for each iteration (ppo_iteration.py)")
    arguments = parser.parse_args()
    channel = Channel() if arguments.turns else None
    torch.set_num_threads(arguments.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    try:
        module = import_trl(arguments.trl, TRL_VERSION, "trl.experimental.ppo.ppo_trainer")
    except UserError as error:
        sys.exit(str(error))
    with tempfile.TemporaryDirectory() as output:
        wanted = arguments.iterations + 1
        trainer = make_trainer(arguments.size, LENGTHS[arguments.lengths], dtype, wanted, Path(output), module)
        what = {"what": f"TRL {TRL_VERSION}, weights and AdamW in {arguments.dtype}"}
        iterations = AskedIterations(channel, what) if channel else Iterations(wanted)
        clock = Clock(module, LENGTHS[arguments.lengths], iterations)
        Generating(trainer.model.policy, clock)
        trainer.add_callback(make_callback(clock))
        trainer.train()


def make_callback(clock: Clock) -> Any:
    from transformers import TrainerCallback

    class AtEnd(TrainerCallback):
        def on_step_end(self, *arguments: Any, **state: Any) -> None:
            clock.end()

    return AtEnd()


if __name__ == "__main__":
    main()
