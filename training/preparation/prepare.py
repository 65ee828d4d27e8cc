"""The one door to training: the command's preparation and the stage scripts go through it.

Models and data are fetched, and what can be known before anything trains is refused here.
"""

import shutil
import time
from collections.abc import Callable, Sequence

import torch

from inference.chat_format import ChatFormat
from inference.errors import UserError
from training.checks import require_fitting, require_processes
from training.config import RunConfig
from training.data.prepare import prepare_data, store_demonstrations
from training.data.rows import read_rows, require_margins, require_rows
from training.data.token_cache import TokenCache
from training.deepspeed_config import require_overlays
from training.distributed import Ranks
from training.fork import Fork
from training.formulas.own import try_own
from training.inputs import inputs_of, local_model, store_models
from training.lineage import sources_of, trained_elsewhere
from training.metrics import require_packages
from training.models.loading import (
    require_causal_lm,
    require_same_format,
    require_same_tokens,
    require_scorer,
    resolve_dtype,
)
from training.rewards import Rewards, require_rows_for, try_sources
from training.run_directory import RunDirectory, write_json
from training.steps import REWARD, Step

Say = Callable[[str], None]


def prepare(
    config: RunConfig,
    run: RunDirectory,
    processes: int,
    say: Say,
    steps: Sequence[Step] = (),
    elsewhere: bool = False,
) -> None:
    """Fill the run's data/. `processes` is how many will train, on all nodes together, and `steps` what follows now;
    empty: all of the run. If they train `elsewhere`, this machine need not be fit for it, and what they would fetch or
    make of the rows there is put into the run. Raises UserError.
    """
    trained_now, steps = steps, steps or config.steps
    require_packages(config)
    require_processes(config, processes)
    if warning := config.idle_warning(processes):
        say(warning)
    if not run.data.exists():  # a run that began before such keys were refused goes on as it did
        has_gpu = torch.cuda.is_available() or (elsewhere and config.dtype == "fp16")
        device = torch.device("cuda" if has_gpu else "cpu")
        require_overlays(config, resolve_dtype(config.dtype, device))
    fork = Fork.of(run, config)
    if fork is not None:
        fork.take_models()
    chat_format = prepare_models(config, run, processes, say)
    rewards = Rewards(config.rlhf, Ranks(0, 1, torch.device("cpu"))) if config.method == "ppo" else None
    inputs = None if run.inputs_file.exists() else inputs_of(config)  # before they are read
    are_there = run.data.exists()
    if fork is not None:
        fork.take_rows()
    prepare_data(config.data, config.split_seed, run.data, chat_format, say)
    try:
        if config.rlhf.ptx.coefficient:
            store_demonstrations(config, run.data, chat_format)
        if fork is not None:
            trained_now = fork.take_steps(trained_now, say)
            steps = [step for step in steps if not run.step(step).is_finished]
        for step in trained_now:
            require_rows(run.data, step, config.of_step(step).keep)
        if REWARD in trained_now and config.reward.margin:
            require_margins(read_rows(run.data / "pairs_train.jsonl"))
        if rewards is not None:
            require_rows_for(rewards, run.data)
    except UserError:
        if not are_there:  # so that the run's name is free
            shutil.rmtree(run.data)
        raise
    for sentence in trained_elsewhere(run, sources_of(config)):
        say(sentence)
    if inputs is not None:
        write_json(run.inputs_file, inputs)
    try_own(config)
    if rewards is not None and rewards.sources:
        needed = not elsewhere and any(step.draws_samples for step in steps)
        before = [str(number) for number, step in enumerate(config.steps, 1) if not step.draws_samples]
        without = f" To begin without it, train what comes before: --steps {','.join(before)}." * (len(steps) > 1)
        try_sources(rewards, read_rows(run.data / "prompts_train.jsonl", most=3), say, needed, without)
    if elsewhere:
        store_models(run, config, say)
        make_tokens(config, run, chat_format, say, steps)


def make_tokens(config: RunConfig, run: RunDirectory, chat_format: ChatFormat, say: Say, steps: Sequence[Step]) -> None:
    """Make the tokens that the steps read, where they would be cached."""
    for step in steps:
        for file, most in (("train", None), ("eval", getattr(config.of_step(step), "eval_rows", 0))):
            rows = read_rows(run.data / f"{step.rows.name}_{file}.jsonl", most) if most != 0 else []
            cache = TokenCache(run.tokens, rows, step.rows.parts, chat_format, config.data)
            begun, was_there = time.monotonic(), cache.file.exists()
            cache.fill()
            if cache.file.exists() and not was_there:
                say(f"Made the tokens of {len(rows):,} rows for {step.title} in {time.monotonic() - begun:.0f} s.")


def prepare_models(config: RunConfig, run: RunDirectory, processes: int, say: Say) -> ChatFormat:
    """Fetch the models, which must fit the settings and each other. Returns the actor's format, which all steps use."""
    actor = local_model(run, config.actor_source, say)
    require_causal_lm(actor, config.actor_source)
    chat_format = ChatFormat.load(actor)
    scorer = None
    if config.needs_scorer:
        scorer = local_model(run, config.scorer_source, say)
        trained = bool(config.trained_reward_model)
        require_scorer(scorer, config.scorer_source, trained, config.scorer_layers)
        require = require_same_format if trained else require_same_tokens  # one that is to be trained learns to read
        require(chat_format, ChatFormat.load(scorer), config.actor_source, config.scorer_source)
    reference = None
    if own := config.reference_model:
        reference = local_model(run, own, say)
        require_causal_lm(reference, own)
        require_same_tokens(chat_format, ChatFormat.load(reference), config.actor_source, own)
    require_fitting(config, processes, actor, scorer, reference)
    return chat_format
