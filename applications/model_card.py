"""The README.md of an exported model: what it is, how it was made, how it was measured, whose licence holds."""

import html
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from applications.report_table import (
    PANEL_COLUMNS,
    PANEL_TITLE,
    measured_accuracy_line,
    pair_of,
    panel_line,
    panel_rows,
    people_prefer,
    reward_accuracy_line,
    table_rows,
)
from inference.model_store import TINY
from inference.packages import find_package
from inference.preferences import PreferenceFile
from inference.streams import printable
from inference.weights import ABSOLUTE_POSITIONS, READ_BY_OLDER, has_old_names
from training.changes import was_lengthened
from training.config import RunConfig, StepSettings
from training.data.rows import PANEL_FILE
from training.data_settings import EMBEDDED_DATA
from training.evaluation.preferences import win_rates
from training.evaluation.statistics import guard_signs, verdict
from training.lineage import base_model, label_of_step, origin_of, sources_of, trace
from training.metrics import duration
from training.opening import versions_of
from training.run_directory import RunDirectory, StepDirectory
from training.steps import DEMONSTRATIONS, METHODS, REWARD, Step

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PACKAGE = "package:"


@dataclass(frozen=True)
class Exported:
    name: str
    directory: StepDirectory
    """The model's, as its step or its checkpoint left it."""
    what: str
    """merged or adapter."""
    dtype: str
    base: str
    """What an adapter lies on; else empty."""
    lies_on: Path | None = None
    """Its directory."""
    checkpoint: int | None = None
    """Number of the checkpoint; None: the step was finished."""

    @property
    def step(self) -> Step:
        return self.directory.step


def model_card(run: RunDirectory, config: RunConfig, exported: Exported, target: Path) -> str:
    """Markdown with YAML front matter, for what is written in `target`; its code runs beside it. Paths are left out."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=plain,
    )
    from inference.chat_format import ChatFormat
    from inference.chat_template import scored_otherwise

    step = exported.step
    chat_format = ChatFormat.load(target if step.leaves_scorer else exported.directory.model)
    is_of_end = exported.checkpoint is None
    comparison = run.read_comparison(step if step.compared_with else run.last_step) if is_of_end else None
    evaluation = None if step.leaves_scorer else comparison
    values = json.loads((exported.directory.model / "config.json").read_text(encoding="utf-8"))
    source = began_with(config, exported)
    panel = panel_of(run, comparison) if REWARD in steps_to(step) else {}
    stored = yaml.safe_load(run.config_file.read_text(encoding="utf-8"))
    return environment.get_template("model_card.md.jinja").render(
        front_matter=Markup(yaml.safe_dump(front_matter(config, exported), sort_keys=False).strip()),
        exported=exported,
        config=config,
        base=public_name(source),
        origin=find_package(source).origin if source.startswith(PACKAGE) else "",
        is_made_here=source == TINY or source.startswith(PACKAGE),
        shift=values.get("score_shift", 0.0),
        scale=values.get("score_scale", 1.0),
        pads_right=values["model_type"] in ABSOLUTE_POSITIONS,
        aim=aim_of(step),
        reading=scored_otherwise(chat_format) if step.leaves_scorer else "",
        content=lambda text: Markup(json.dumps(chat_format.template.as_read(text))),
        is_read_by_older=values["model_type"] in READ_BY_OLDER and has_old_names(exported.lies_on or target),
        data=data_text(run, config),
        path=", ".join(earlier.title for earlier in steps_to(step)),
        steps=step_rows(run, config, exported.step),
        evaluation=evaluation,
        names=list(pair_of(evaluation).values()) if evaluation else [],
        measures=table_rows(evaluation) if evaluation else [],
        accuracy=accuracy_line(run, comparison) if REWARD in steps_to(step) else "",
        panel_title=PANEL_TITLE,
        panel_columns=PANEL_COLUMNS.values(),
        panel_rows=panel_rows(panel) if panel else [],
        panel_line=panel_line(panel) if panel else "",
        trained_elsewhere=trained_elsewhere(config, evaluation),
        verdict=verdict,
        preferences=preferences_line(run, step) if is_of_end else "",
        bad=[s.text for s in guard_signs(comparison, *pair_of(comparison)) if not s.is_good] if comparison else [],
        versions=versions_of(run, step, stored.get("versions", {})),
    )


def preferences_line(run: RunDirectory, step: Step) -> str:
    """What people said of the model beside the one before it; empty where nobody was asked."""
    if step.compared_with is None:
        return ""
    labels = (label_of_step(run, run.read_config(), side) for side in (step, step.compared_with))
    rates = win_rates(PreferenceFile(run.preferences).read_or_say(), *labels)
    return people_prefer(rates) if rates else ""


def plain(value: Any) -> Any:
    """A text of the run in the card, where it is neither Markdown nor HTML, nor a line of its own."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    text = re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(printable(value).splitlines()))
    return Markup(html.escape(text, quote=False))


def front_matter(config: RunConfig, exported: Exported) -> dict[str, Any]:
    """What the hub reads. The licence is that of the base model, which only its owner can name."""
    tags = ("reward-model",) if exported.step.leaves_scorer else (exported.step.command,)
    values: dict[str, Any] = {
        "library_name": "peft" if exported.what == "adapter" else "transformers",
        "pipeline_tag": "text-classification" if exported.step.leaves_scorer else "text-generation",
        "tags": list(dict.fromkeys(filter(None, ("rlhf-chat", *tags, exported.step.method)))),
    }
    source = began_with(config, exported)
    if source.startswith(PACKAGE):
        licence = re.search(r"licence ([\w.-]+[\w])", find_package(source).origin)
        values |= {"license": licence[1].lower()} if licence else {}
    if is_hub_id(source):
        values["base_model"] = source
    return values


def began_with(config: RunConfig, exported: Exported) -> str:
    """The model that training began with."""
    if exported.step.leaves_scorer and config.reward.initialize_from == "base":
        return config.reward_model_source
    return exported.base or base_model(config) or config.model


def aim_of(step: Step) -> str:
    if step.rows is DEMONSTRATIONS:
        return "answer as its demonstrations do"
    if step.leaves_scorer:
        return "give higher scores to the answers that its preference data call better"
    return "give the answers that its preference data call better"


def is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def public_name(source: str) -> str:
    """A hub id or package as it is; of a directory its last part."""
    return source if is_hub_id(source) or source.startswith(PACKAGE) else Path(source).name


def data_text(run: RunDirectory, config: RunConfig) -> str:
    if config.data.source == EMBEDDED_DATA:
        dialogues = "dialogues between people from the Python package chitchat-dataset (MIT)"
        if not (run.data / PANEL_FILE).exists():  # of an early version
            return (
                f"{dialogues}; of two replies, the more upbeat one by the lexicon vaderSentiment (MIT) was preferred: "
                "a demonstration, not what people prefer"
            )
        return (
            f"{dialogues}, and tweets that 20 to about 100 people each rated for how positive they are, from the "
            "source distribution of vaderSentiment (MIT; C.J. Hutto and E. Gilbert, VADER, ICWSM 2014); what they "
            "rated as more positive was preferred, which says nothing of truth or use"
        )
    return f"{', '.join(map(public_name, config.data.sources))} (not part of this directory)"


def steps_to(step: Step) -> tuple[Step, ...]:
    return METHODS[step.method] if step.method else (step,)


def trained_elsewhere(config: RunConfig, evaluation: Mapping[str, Any] | None) -> list[str]:
    """What the evaluation says of other runs that the models went through, with names for their paths."""
    sentences = evaluation.get("trained_elsewhere", []) if evaluation else []
    origins, unknown = trace(sources_of(config))
    for path in sorted([*(str(origin.run.path) for origin in origins), *unknown], key=len, reverse=True):
        sentences = [sentence.replace(path, public_name(path)) for sentence in sentences]
    return sentences


def step_rows(run: RunDirectory, config: RunConfig, step: Step) -> list[tuple[str, str, str]]:
    """Name, settings and outcome of each step that led to the model."""
    rows = []
    for earlier in steps_to(step):
        title = f"{earlier.number} {earlier.title}"
        if given := config.given_model(earlier):
            origin = origin_of(given)
            rows.append((title, f"not trained here: {origin.name if origin else public_name(given)}", ""))
        elif run.step(earlier).is_finished:
            made = [outcome(run.step(earlier).read_result()), *was_lengthened(run.step(earlier))]
            rows.append((title, settings_text(config, earlier), ", ".join(made)))
    return rows


def settings_text(config: RunConfig, step: Step) -> str:
    named = config.reference_model if step.compared_with else ""
    reference = f" (reference {public_name(named)})" if named else ""
    if not step.draws_samples:
        settings = config.supervised(step)
        own = (name for name in type(settings).model_fields if name not in StepSettings.model_fields)
        values = {name.replace("_", " "): getattr(settings, name) for name in own}
        return (
            f"{optimizer_text(settings.optimizer)}, batch {settings.batch_size} {config.unit_of(step)}, "
            f"{settings.epochs} epoch(s)"
            + "".join(f", {name} {value}" for name, value in values.items() if value)
            + reference
        )
    rlhf = config.rlhf
    above = f" ({rlhf.clip_high:g} above)" if rlhf.clip_high else ""
    return (
        f"{optimizer_text(rlhf.actor)} (critic {rlhf.critic.learning_rate:g}), "
        f"{rlhf.prompts_per_iteration * rlhf.samples_per_prompt} samples an iteration, clip {rlhf.clip:g}{above}, "
        f"KL coefficient {rlhf.kl.coefficient:g}{reference}, temperature {rlhf.temperature:g}"
    )


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
    return reward_accuracy_line(run.step(REWARD).read_result()) if run.step(REWARD).is_finished else ""


def panel_of(run: RunDirectory, evaluation: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """How far the reward model agrees with people who rated texts; empty where nobody measured it."""
    if evaluation and "panel" in evaluation:
        return evaluation["panel"]
    return run.step(REWARD).read_result().get("panel", {}) if run.step(REWARD).is_finished else {}
