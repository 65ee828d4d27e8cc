"""Our SFT and DPO on the rows of work.py: the classes of a real run, asked for a step on all rows at a time.

    python -m benchmarks.our_supervised --method dpo --size s --dtype fp32

A step is what a run does in one: `train_batch`, metrics written. In DPO the reference scores all pairs before it,
which a run does once and not at every step.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks import work
from benchmarks.our_ppo import describe
from benchmarks.turns import Channel, measured, print_medians
from benchmarks.work import SIZES
from inference.errors import UserError
from training.config import RunConfig
from training.role_settings import OptimizerSettings
from training.steps import DPO, SFT

if TYPE_CHECKING:
    from training.distributed import Ranks
    from training.hybrid_engine.zero_engine import ZeroEngine
    from training.stage import Stage
    from training.step1_sft.sft import SFTTask
    from training.step2_dpo.dpo import DPOTask

STEPS = {"sft": SFT, "dpo": DPO}


def make_config(method: str, size: str, dtype: str, master: str, threads: int) -> RunConfig:
    """Settings of the run; what is not named is the default of every run."""
    actor = str(work.models(size).actor)
    optimizer = OptimizerSettings(
        learning_rate=work.LEARNING_RATE, schedule="constant", warmup=0, master_weights=master == "fp32"
    )
    settings = {"batch_size": len(work.row_lengths()), "optimizer": optimizer}
    return RunConfig.model_validate(
        {"model": actor, "sft_model": actor, "dtype": dtype, "threads": threads, method: settings}
    )


def make_task(method: str, config: RunConfig, directory: Path, ranks: "Ranks", updates: int) -> "SFTTask | DPOTask":
    """What learns, as step 1 or 2 makes it for so many `updates`, of a run in `directory`."""
    from inference.chat_format import ChatFormat
    from training.hybrid_engine.zero_engine import ZeroEngine
    from training.models.loading import load_causal_lm
    from training.models.policy import Policy
    from training.run_directory import RunDirectory
    from training.stage import make_stage

    run, step = RunDirectory(directory), STEPS[method]
    run.step(step).path.mkdir(parents=True, exist_ok=True)
    stage = make_stage(run, step, config, ranks)
    source = stage.model_directory(config.model)
    optimizer = stage.settings.optimizer
    model = load_causal_lm(source, ChatFormat.load(source), stage.dtype)
    engine = ZeroEngine(Policy(model, optimizer.lora), optimizer, stage.dtype, updates, ranks, False)
    return (sft_task if method == "sft" else dpo_task)(stage, engine)


def sft_task(stage: "Stage", engine: "ZeroEngine") -> "SFTTask":
    from training.data.token_cache import TokenRows
    from training.step1_sft.sft import SFTTask

    rows = work.demonstrations()
    ids = torch.cat([part for row in rows for part in row]).int()
    encoded = TokenRows(ids, torch.tensor([[len(part) for part in row] for row in rows]))
    return SFTTask(stage, engine, encoded, encoded.first(0))


def dpo_task(stage: "Stage", engine: "ZeroEngine") -> "DPOTask":
    from training.data.token_cache import TokenPair
    from training.step2_dpo.dpo import DPOTask

    pairs = [TokenPair(*pair, file_index=index) for index, pair in enumerate(work.pairs())]
    unscored = {"train": torch.full((2, len(pairs)), torch.nan), "eval": torch.empty(2, 0)}
    return DPOTask(stage, engine, {"train": pairs, "eval": []}, unscored)


def step(task: "SFTTask | DPOTask", number: int) -> dict[str, float]:
    """Optimiser step `number`, counted from 0, on all rows; seconds by phase, and the loss before it."""
    from training.step2_dpo.reference import score_pairs
    from training.supervised import train_batch

    begun = time.perf_counter()
    if task.name == "DPO":
        needed = [[place] for place in range(len(task.pairs["train"]))]
        scores = score_pairs(task.stage, task.engine, task.pairs["train"], needed, quiet=True)
        if number == 0:  # those of a reference: the weights as they were
            task.reference_logprobs["train"] = scores
    scored = time.perf_counter()
    rows = list(range(len(task.lengths)))
    metrics = train_batch(task.stage, task, rows, task.stage.settings.micro_batch_tokens, number + 1)
    task.stage.metrics.write(number + 1, metrics)
    ended = time.perf_counter()
    seconds = {"generate": 0.0, "score": scored - begun, "train": ended - scored, "total": ended - begun}
    return {**seconds, "tokens": sum(task.lengths), "loss": metrics["loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=list(STEPS), default="sft")
    parser.add_argument("--size", choices=list(SIZES), default="s")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--master", choices=["fp32", "none"], default="fp32", help="bf16 only: keep fp32 weights too?")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", action="store_true", help="wait to be asked for each step (trl_trainers.py)")
    arguments = parser.parse_args()
    channel = Channel() if arguments.turns else None
    from training.distributed import start_ranks, stop_ranks

    config = make_config(arguments.method, arguments.size, arguments.dtype, arguments.master, arguments.threads)
    try:
        with tempfile.TemporaryDirectory() as directory:
            ranks = start_ranks(config.threads)
            task = make_task(arguments.method, config, Path(directory), ranks, arguments.iterations + 1)
            what = describe(config, arguments.master)
            rows = measured(what, lambda number: step(task, number), arguments.iterations, channel)
            print(f"first loss {rows[0]['loss']:.4f}")
            print_medians(rows[1:], ("score", "train", "total"))
    except UserError as error:
        sys.exit(str(error))
    finally:
        stop_ranks()


if __name__ == "__main__":
    main()
