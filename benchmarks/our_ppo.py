"""Our PPO on the work of work.py: the classes of a real run (Stage, Roles, PPO), asked for one iteration at a time.

    python -m benchmarks.our_ppo --size s --lengths skew --dtype bf16 --master fp32
    python -m benchmarks.our_ppo --advantage grpo --mini-batches 1 --kl 0

An iteration is what a run does in one: PPO.iterate, metrics written. Checkpoints and sample tables, which come every
tenth iteration, and the check of a run's first update are left out. With --rollouts every sample is written down.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import work
from benchmarks.turns import Channel, measured, print_medians
from benchmarks.work import GROUP, KL, LENGTHS, MINI_BATCHES, PROMPT_TOKENS, SAMPLES, SIZES, Lengths
from inference.errors import UserError
from training.config import RunConfig
from training.rlhf_settings import RLHFSettings
from training.role_settings import OptimizerSettings
from training.steps import PPO as RLHF
from training.steps import SFT

if TYPE_CHECKING:
    from torch import Tensor

    from training.distributed import Ranks
    from training.step3_rlhf.ppo import PPO


def make_config(
    size: str,
    lengths: Lengths,
    dtype: str,
    master: str,
    iterations: int,
    threads: int,
    old_logprobs: str = "auto",
    exact: bool | str = "auto",
    rollouts: bool = False,
    **more: Any,
) -> RunConfig:
    """Settings of the run, `more` of them for step 3; what is not named is the default of every run."""
    models = work.models(size)
    optimizer = OptimizerSettings(learning_rate=work.LEARNING_RATE, epsilon=1e-5, master_weights=master == "fp32")
    return RunConfig.model_validate(
        {
            "model": str(models.actor),
            "sft_model": str(models.actor),
            "trained_reward_model": str(models.reward),
            "dtype": dtype,
            "threads": threads,
            "data": {"max_prompt_tokens": PROMPT_TOKENS, "max_response_tokens": lengths.longest},
            "rlhf": RLHFSettings.model_validate(
                {
                    "iterations": iterations,
                    "prompts_per_iteration": SAMPLES,
                    "mini_batches": MINI_BATCHES,
                    "generation_batch": SAMPLES,
                    "old_logprobs": old_logprobs,
                    "exact": exact,
                    "rollouts_every": int(rollouts),
                    "actor": optimizer,
                    "critic": optimizer,
                    **more,
                }
            ),
        }
    )


def in_groups(advantage: str, mini_batches: int, kl: float) -> dict[str, Any]:
    """Settings of the work of work.py for estimators without a critic: samples in groups, a reward without a model."""
    return {
        "advantage": advantage,
        "mini_batches": mini_batches,
        "prompts_per_iteration": SAMPLES // GROUP,
        "samples_per_prompt": GROUP,
        "kl": {"coefficient": kl},
        "reward_weights": {"model": 0},
        "reward_function": work.REWARD,
    }


def make_ppo(config: RunConfig, lengths: Lengths, directory: Path, ranks: "Ranks") -> "PPO":
    """The trainer of this work in a run in `directory`."""
    ppo = trainer(config, list(work.prompts(config.rlhf.iterations)), directory, ranks)
    ppo.rollouts.forced_lengths = lambda number: lengths.of(number - 1)  # iterations of a run count from 1
    return ppo


def trainer(config: RunConfig, prompts: "list[Tensor]", directory: Path, ranks: "Ranks") -> "PPO":
    """Stage, roles and trainer of a run in `directory` on `prompts`, int64 (length) each."""
    from training.run_directory import RunDirectory
    from training.stage import make_stage
    from training.step3_rlhf.ppo import PPO
    from training.step3_rlhf.roles import Roles, starting_scorer

    run = RunDirectory(directory)
    run.step(RLHF).path.mkdir(parents=True, exist_ok=True)
    stage = make_stage(run, RLHF, config, ranks)
    actor, scorer = stage.earlier_model(SFT), starting_scorer(stage)
    chat_format = stage.chat_format(actor, scorer)
    updates = config.rlhf.iterations * config.rlhf.mini_batches
    rows = [{"prompt": [{"role": "user", "content": "?"}]}] * len(prompts)  # for rewards that read text
    return PPO(stage, Roles(stage, actor, scorer, chat_format, (updates, updates)), chat_format, prompts, rows)


def iterate(ppo: "PPO", number: int, lengths: Lengths) -> dict[str, float]:
    """One iteration, counted from 0; seconds by phase. AssertionError where another work was done."""
    begun = time.perf_counter()
    # No check of the first update: forced lengths forbid the end token, so generation draws from p / (1 - p(end)).
    metrics = ppo.iterate(number + 1, check=False).metrics
    ppo.stage.metrics.write(number + 1, metrics)
    total = time.perf_counter() - begun
    tokens = round(metrics["response/length_mean"] * SAMPLES)
    if tokens != lengths.tokens:
        raise AssertionError(f"{tokens} response tokens were generated instead of {lengths.tokens}")
    return {
        "generate": metrics["time/generate"] + metrics.get("time/reallocate", 0.0),
        "score": metrics["time/score"],
        "train": metrics["time/train"],
        "rollouts": metrics.get("time/rollouts", 0.0),
        "total": total,
        "tokens": tokens,
    }


def describe(config: RunConfig, master: str) -> str:
    if config.dtype == "fp32":
        return "weights and AdamW in fp32, ZeRO stage 0"
    if master == "none":
        return "weights, gradients and AdamW in bf16, no fp32 copy, ZeRO stage 0"
    return "weights in bf16, master weights and AdamW in fp32, ZeRO stage 1 of one process"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="s")
    parser.add_argument("--lengths", choices=list(LENGTHS), default="skew")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--master", choices=["fp32", "none"], default="fp32", help="bf16 only: keep fp32 weights too?")
    parser.add_argument("--old-logprobs", choices=["auto", "generation", "recompute"], default="auto")
    parser.add_argument("--exact", choices=["auto", "true", "false"], default="auto")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--advantage", choices=["gae", "grpo", "rloo"], default="gae")
    parser.add_argument("--mini-batches", type=int, default=MINI_BATCHES)
    parser.add_argument("--kl", type=float, default=KL, help="its coefficient; 0: without a reference")
    parser.add_argument("--rollouts", action="store_true", help="with rlhf.rollouts_every=1")
    parser.add_argument("--turns", action="store_true", help="wait to be asked for each iteration (ppo_iteration.py)")
    arguments = parser.parse_args()
    channel = Channel() if arguments.turns else None
    lengths = LENGTHS[arguments.lengths]
    config = make_config(
        arguments.size,
        lengths,
        arguments.dtype,
        arguments.master,
        arguments.iterations + 1,
        arguments.threads,
        arguments.old_logprobs,
        {"true": True, "false": False}.get(arguments.exact, "auto"),
        arguments.rollouts,
        **(
            in_groups(arguments.advantage, arguments.mini_batches, arguments.kl) if arguments.advantage != "gae" else {}
        ),
    )
    with tempfile.TemporaryDirectory() as directory:
        measure(config, lengths, describe(config, arguments.master), Path(directory), channel)


def measure(config: RunConfig, lengths: Lengths, what: str, directory: Path, channel: Channel | None) -> None:
    from training.distributed import start_ranks, stop_ranks

    try:
        ppo = make_ppo(config, lengths, directory, start_ranks(config.threads))
        rows = measured(what, lambda number: iterate(ppo, number, lengths), config.rlhf.iterations - 1, channel)
        print(what)
        print_medians(rows[1:])
    except UserError as error:
        sys.exit(str(error))
    finally:
        stop_ranks()


if __name__ == "__main__":
    main()
