"""The README.md of an exported model: what it is, how it was made, how it was measured, whose licence holds."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from applications.report_table import measured_accuracy_line, pair_of, reward_accuracy_line, table_rows
from inference.model_package import find_package
from training.config import DPO_STEP, EMBEDDED_DATA, RunConfig
from training.metrics import duration
from training.run_directory import RunDirectory

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PACKAGE = "package:"
TAGS = {"sft": ["sft"], "rlhf": ["rlhf", "ppo"], "dpo": ["dpo"]}
STEPS_TO = {"sft": (1,), "rlhf": (1, 2, 3), "dpo": (1, DPO_STEP)}


@dataclass(frozen=True)
class Exported:
    name: str
    step: str
    """sft, rlhf or dpo."""
    what: str
    """merged or adapter."""
    dtype: str
    base: str
    """What an adapter lies on; else empty."""


def model_card(run: RunDirectory, config: RunConfig, exported: Exported) -> str:
    """Markdown with YAML front matter. Paths of this machine are left out."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    evaluation = run.read_comparison(DPO_STEP if exported.step == "dpo" else 3)
    stored = yaml.safe_load(run.config_file.read_text(encoding="utf-8"))
    return environment.get_template("model_card.md.jinja").render(
        front_matter=yaml.safe_dump(front_matter(config, exported), sort_keys=False, allow_unicode=True).strip(),
        exported=exported,
        config=config,
        base=public_name(config.model),
        origin=find_package(config.model).origin if config.model.startswith(PACKAGE) else "",
        data=data_text(config),
        steps=step_rows(run, config, exported.step),
        evaluation=evaluation,
        names=list(pair_of(evaluation).values()) if evaluation else [],
        measures=table_rows(evaluation) if evaluation else [],
        accuracy=accuracy_line(run, evaluation),
        versions=stored.get("versions", {}),
    )


def front_matter(config: RunConfig, exported: Exported) -> dict[str, Any]:
    """What the hub reads. The licence is that of the base model, which only its owner can name."""
    values: dict[str, Any] = {
        "library_name": "peft" if exported.what == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rlhf-chat", *TAGS[exported.step]],
    }
    if config.model.startswith(PACKAGE):
        licence = re.search(r"licence ([\w.-]+[\w])", find_package(config.model).origin)
        values |= {"license": licence[1].lower()} if licence else {}
    if is_hub_id(config.model):
        values["base_model"] = config.model
    return values


def is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def public_name(source: str) -> str:
    """A hub id or package as it is; of a directory its last part."""
    return source if is_hub_id(source) or source.startswith(PACKAGE) else Path(source).name


def data_text(config: RunConfig) -> str:
    if config.data.source == EMBEDDED_DATA:
        return (
            "dialogues between people from the Python package chitchat-dataset (MIT); of two replies, the more upbeat "
            "one by the lexicon vaderSentiment (MIT) was preferred: a demonstration, not what people prefer"
        )
    return f"{', '.join(map(public_name, config.data.sources))} (not part of this directory)"


def step_rows(run: RunDirectory, config: RunConfig, step: str) -> list[tuple[str, str, str]]:
    """Name, settings and outcome of each step that led to the model."""
    sft, reward, rlhf, dpo = config.sft, config.reward, config.rlhf, config.dpo
    settings = {
        1: f"{optimizer_text(sft.optimizer)}, batch {sft.batch_size}, {sft.epochs} epoch(s)",
        2: f"{optimizer_text(reward.optimizer)}, batch {reward.batch_size} pairs, {reward.epochs} epoch(s)",
        3: f"{optimizer_text(rlhf.actor)} (critic {rlhf.critic.learning_rate:g}), "
        f"{rlhf.prompts_per_iteration * rlhf.samples_per_prompt} samples an iteration, clip {rlhf.clip:g}, "
        f"KL coefficient {rlhf.kl.coefficient:g}, temperature {rlhf.temperature:g}",
        DPO_STEP: f"{optimizer_text(dpo.optimizer)}, batch {dpo.batch_size} pairs, {dpo.epochs} epoch(s), "
        f"beta {dpo.beta:g}",
    }
    given = {1: config.sft_model, 2: config.trained_reward_model}
    titles = {1: "1 supervised fine-tuning", 2: "2 reward model", 3: "3 PPO", DPO_STEP: "2 DPO"}
    found = []
    for number in STEPS_TO[step]:
        if given.get(number):
            found.append((titles[number], f"not trained here: {public_name(given[number])}", ""))
        elif run.step(number).is_finished:
            found.append((titles[number], settings[number], outcome(run.step(number).read_result())))
    return found


def optimizer_text(optimizer: Any) -> str:
    lora = f"LoRA rank {optimizer.lora.rank}" if optimizer.lora.rank else "all weights"
    return f"{lora}, learning rate {optimizer.learning_rate:g} ({optimizer.schedule})"


def outcome(result: Mapping[str, Any]) -> str:
    """Steps made, rows, time."""
    names = {"iterations": "iterations", "optimizer_steps": "optimiser steps"}
    made = ", ".join(f"{result[key]} {name}" for key, name in names.items() if key in result)
    rows = f", {result['rows']:,} rows" if "rows" in result else ""
    return f"{made}{rows}, {duration(result['seconds'])}"


def accuracy_line(run: RunDirectory, evaluation: Mapping[str, Any] | None) -> str:
    """How well the reward model ranks; empty where nobody measured it."""
    if evaluation and "reward_accuracy" in evaluation:
        return measured_accuracy_line("Reward model", evaluation["reward_accuracy"])
    return reward_accuracy_line(run.step(2).read_result()) if run.step(2).is_finished else ""
