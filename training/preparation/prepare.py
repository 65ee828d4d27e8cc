"""The one door to training: the command's preparation and the stage scripts go through it.

Models and data are fetched, and what can be known before anything trains is refused here.
"""

import shutil
from collections.abc import Callable, Sequence

import torch

from inference.chat_format import ChatFormat
from inference.errors import UserError
from inference.model_store import resolve_model
from training.checks import require_fitting, require_processes
from training.config import RunConfig
from training.data.demonstrations import demonstrations
from training.data.prepare import prepare_data
from training.data.rows import read_rows, require_rows
from training.deepspeed_overlay import require_overlays
from training.distributed import Ranks
from training.inputs import inputs_of
from training.lineage import sources_of, trained_elsewhere
from training.models.loading import (
    require_causal_lm,
    require_same_format,
    require_same_tokens,
    require_scorer,
    resolve_dtype,
)
from training.rewards import Rewards, try_sources
from training.run_directory import RunDirectory, write_json
from training.steps import Step
from training.tracking import require_packages

Say = Callable[[str], None]


def prepare(config: RunConfig, run: RunDirectory, processes: int, say: Say, steps: Sequence[Step] = ()) -> None:
    """Fill the run's data/. `processes` is how many will train, on all nodes together, and `steps` what follows now;
    empty: all of the run. Raises UserError.
    """
    trained_now, steps = steps, steps or config.steps
    require_packages(config)
    require_processes(config, processes)
    if warning := config.idle_warning(processes):
        say(warning)
    if not run.data.exists():  # a run that began before such keys were refused goes on as it did
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        require_overlays(config, resolve_dtype(config.dtype, device))
    chat_format = prepare_models(config, processes, say)
    rewards = Rewards(config.rlhf, Ranks(0, 1, torch.device("cpu"))) if config.method == "ppo" else None
    inputs = None if run.inputs_file.exists() else inputs_of(config)  # before they are read
    are_there = run.data.exists()
    prepare_data(config.data, config.split_seed, run.data, chat_format, say)
    try:
        for step in trained_now:
            require_rows(run.data, step, config.of_step(step).keep)
    except UserError:
        if not are_there:  # so that the run's name is free
            shutil.rmtree(run.data)
        raise
    for sentence in trained_elsewhere(run, sources_of(config)):
        say(sentence)
    if inputs is not None:
        write_json(run.inputs_file, inputs)
    if rewards is not None and rewards.sources:
        needed = any(step.draws_samples for step in steps)
        before = [str(place) for place, step in enumerate(config.steps, 1) if not step.draws_samples]
        without = f" To begin without it, train what comes before: --steps {','.join(before)}." * (len(steps) > 1)
        try_sources(rewards, read_rows(run.data / "prompts_train.jsonl", most=3), say, needed, without)
    if config.rlhf.ptx.coefficient:
        demonstrations(config, run.data, chat_format)


def prepare_models(config: RunConfig, processes: int, say: Say) -> ChatFormat:
    """Fetch the models, which must fit the settings and each other. Returns the actor's format, which all steps use."""
    actor = resolve_model(config.actor_source, say)
    require_causal_lm(actor, config.actor_source)
    chat_format = ChatFormat.load(actor)
    scorer = None
    if config.needs_scorer:
        scorer = resolve_model(config.scorer_source, say)
        trained = bool(config.trained_reward_model)
        require_scorer(scorer, config.scorer_source, trained, config.scorer_layers)
        require = require_same_format if trained else require_same_tokens  # one that is to be trained learns to read
        require(chat_format, ChatFormat.load(scorer), config.actor_source, config.scorer_source)
    require_fitting(config, processes, actor, scorer)
    return chat_format
