"""The README.md of an exported model: what it is, how it was made, how it was measured, whose licence holds."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from applications.report_table import measured_accuracy_line, pair_of, reward_accuracy_line, table_rows
from inference.model_package import find_package
from inference.model_store import TINY
from inference.older_versions import ABSOLUTE_POSITIONS, READ_BY_OLDER, has_old_names
from training.config import DPO_STEP, EMBEDDED_DATA, RunConfig
from training.metrics import duration
from training.run_directory import RunDirectory

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PACKAGE = "package:"
TAGS = {"sft": ["sft"], "reward": ["reward-model"], "rlhf": ["rlhf", "ppo"], "dpo": ["dpo"]}
STEPS_TO = {"sft": (1,), "reward": (2,), "rlhf": (1, 2, 3), "dpo": (1, DPO_STEP)}
TITLES = {1: "supervised fine-tuning", 2: "reward model", 3: "PPO", DPO_STEP: "DPO"}
AIMS = {
    "sft": "answer as its demonstrations do",
    "reward": "call those answers better that its preference data call better",
} | dict.fromkeys(("rlhf", "dpo"), "give the answers that its preference data call better")
NAMES = {"sft": "SFT", "reward": "reward", "rlhf": "PPO", "dpo": "DPO"}


@dataclass(frozen=True)
class Exported:
    name: str
    step: str
    """sft, reward, rlhf or dpo."""
    what: str
    """merged or adapter."""
    dtype: str
    base: str
    """What an adapter lies on; else empty."""
    lies_on: Path | None = None
    """Its directory."""


def model_card(run: RunDirectory, config: RunConfig, exported: Exported) -> str:
    """Markdown with YAML front matter, whose code runs beside the exported directory. Paths are left out."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    is_scorer = exported.step == "reward"
    comparison = run.read_comparison(DPO_STEP if exported.step == "dpo" else 3)
    evaluation = None if is_scorer else comparison
    model = run.step(STEPS_TO[exported.step][-1]).model
    values = json.loads((model / "config.json").read_text(encoding="utf-8"))
    source = base_model(config, exported.step)
    stored = yaml.safe_load(run.config_file.read_text(encoding="utf-8"))
    return environment.get_template("model_card.md.jinja").render(
        front_matter=yaml.safe_dump(front_matter(config, exported), sort_keys=False, allow_unicode=True).strip(),
        exported=exported,
        config=config,
        model_name=NAMES[exported.step],
        path=", ".join(TITLES[step] for step in STEPS_TO[exported.step]),
        base=public_name(source),
        origin=find_package(source).origin if source.startswith(PACKAGE) else "",
        is_made_here=source == TINY or source.startswith(PACKAGE),
        shift=values.get("score_shift", 0.0),
        scale=values.get("score_scale", 1.0),
        pads_right=values["model_type"] in ABSOLUTE_POSITIONS,
        aim=AIMS[exported.step],
        reading=reading_of(model) if is_scorer else "",
        is_read_by_older=values["model_type"] in READ_BY_OLDER and has_old_names(exported.lies_on or model),
        data=data_text(config),
        steps=step_rows(run, config, exported.step),
        evaluation=evaluation,
        names=list(pair_of(evaluation).values()) if evaluation else [],
        measures=table_rows(evaluation) if evaluation else [],
        accuracy=accuracy_line(run, comparison) if 2 in STEPS_TO[exported.step] else "",
        versions=stored.get("versions", {}),
    )


def front_matter(config: RunConfig, exported: Exported) -> dict[str, Any]:
    """What the hub reads. The licence is that of the base model, which only its owner can name."""
    values: dict[str, Any] = {
        "library_name": "peft" if exported.what == "adapter" else "transformers",
        "pipeline_tag": "text-classification" if exported.step == "reward" else "text-generation",
        "tags": ["rlhf-chat", *TAGS[exported.step]],
    }
    source = base_model(config, exported.step)
    if source.startswith(PACKAGE):
        licence = re.search(r"licence ([\w.-]+[\w])", find_package(source).origin)
        values |= {"license": licence[1].lower()} if licence else {}
    if is_hub_id(source):
        values["base_model"] = source
    return values


def base_model(config: RunConfig, step: str) -> str:
    """The model that training began with."""
    is_from_base = step == "reward" and config.reward.initialize_from == "base"
    return config.reward_model_source if is_from_base else config.model


def reading_of(model: Path) -> str:
    """How a reward model's template writes a finished dialogue otherwise than it was trained; '' if it does not."""
    from inference.chat_format import ChatFormat
    from inference.template_check import scored_otherwise

    return scored_otherwise(ChatFormat.load(model))


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
    found = []
    for number in STEPS_TO[step]:
        title = f"{2 if number == DPO_STEP else number} {TITLES[number]}"
        if given.get(number):
            found.append((title, f"not trained here: {public_name(given[number])}", ""))
        elif run.step(number).is_finished:
            found.append((title, settings[number], outcome(run.step(number).read_result())))
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
