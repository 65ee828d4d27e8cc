"""`rlhf-chat prefer`: a person says which of two answers is better, and the run learns from it next."""

import gc
import getpass
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from applications.from_run import next_command
from applications.preset_store import settings_for_model
from inference.chat_target import find_chat_models
from inference.collecting import without_collecting
from inference.errors import UserError, typed
from inference.model_store import resolve_model
from inference.preferences import Preference, PreferenceFile, checked_name, unjudged
from inference.streams import to_stderr
from training.checkpoints import checkpoint_of
from training.data.rows import read_rows
from training.evaluation.preferences import agreements, people
from training.inputs import local_model
from training.lineage import base_model, label_of
from training.run_directory import RunDirectory
from training.steps import PROMPTS, WRITING, step_of
from training.trust import of_models, require_reading, require_yes

USUAL_TEMPERATURE, USUAL_TOKENS = 0.7, 256
"""They hold for a model that lies in no run."""


@dataclass(frozen=True)
class LabelledModel:
    label: str
    """`RUN/step`, or the name of a model directory."""
    directory: Path


def prefer_command(
    target: Path,
    name: str | None,
    again: str | None,
    model: str,
    against: str,
    temperature: float | None,
    max_tokens: int | None,
    to: Path | None,
    trusts: bool = False,
) -> None:
    """`rlhf-chat prefer`."""
    if at := checkpoint_of(target):
        target, model = at.run.path, model or str(target)
    require_reading(target, trusts)
    run = RunDirectory(target) if (target / "config.yaml").is_file() else None
    by = checked_name(login_name() if name is None else name)
    if run is None and again is None:
        find_chat_models(target, compare=False)  # what is neither is refused with its way out
    if run is None and to is None:
        raise UserError(f"{target} is no run: say where the preferences go, with --to FILE.")
    path = run.preferences if to is None and run is not None else to
    assert path is not None
    file = PreferenceFile(path)
    known = file.read()
    if again is None:
        pair = [find_model(target, model, trusts), find_model(target, against or model, trusts)]
        one, other = pair
        if against and (one.label == other.label or one.directory.resolve() == other.directory.resolve()):
            raise UserError(f"{one.label} and {other.label} cannot be told apart: give another one with --against.")
        config = run.read_config() if run is not None else None
        usual = (
            (config.rlhf.temperature, config.data.max_response_tokens) if config else (USUAL_TEMPERATURE, USUAL_TOKENS)
        )
        temperature = usual[0] if temperature is None else temperature
        if not against and temperature == 0:
            raise UserError("At --temperature 0 a model gives the same answer twice: give more, or another --against.")
        collected = collect(file, by, pair, temperature, max_tokens or usual[1], suggestions(run, known))
    else:
        collected = collect_again(file, by, waiting(known, by, checked_name(again)))
    for line in outcome(file, by, collected, run):
        print(line, file=sys.stdout if sys.stdout.isatty() else sys.stderr)


def login_name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a user of whom the system knows no name
        raise UserError("Nobody knows what you are called here: say who judges, with --as NAME.") from None


# Models


def find_model(target: Path, source: str, trusts: bool) -> LabelledModel:
    """The model that `source` stands for: one of the run's own, another run's newest, a model of any kind, or (empty)
    the target's newest. Raises UserError where it is not there."""
    run = RunDirectory(target)
    if source in ("base", *(step.command for step in WRITING)):
        config = run.read_config()
        given = "" if source == "base" else config.given_model(step_of(source))
        if source == "base" or given:
            require_yes(target, of_models(run, config), trusts)
        if source != "base":
            directory = local_model(run, given, to_stderr) if given else run.require_model(step_of(source))
            return LabelledModel(label_of(directory), directory)
        if not (base := base_model(config)):
            raise UserError(f"The base model of {target} is not known: name the base model itself.")
        return LabelledModel(f"{target.resolve().name}/{source}", local_model(run, base, to_stderr))
    if at := checkpoint_of(source):
        directory = at.model(trusts)
        return LabelledModel(label_of(directory, at.name), directory)
    path = Path(source).expanduser() if source else target
    if source and not path.exists():
        wanted = settings_for_model(source)["model"]
        return LabelledModel(wanted, resolve_model(wanted, to_stderr))
    require_reading(path, trusts)
    ((_, directory),) = find_chat_models(path, compare=False)
    return LabelledModel(label_of(directory), directory)


# Pairs


def collect(
    file: PreferenceFile,
    by: str,
    pair: list[LabelledModel],
    temperature: float,
    max_tokens: int,
    suggested: Iterator[Any],
) -> int:
    """Ask until the person has had enough; how many pairs were judged."""
    with without_collecting():
        from inference.private_surfaces import import_transformers_lightly

        import_transformers_lightly()
        from inference.chat_model import ChatModel
        from inference.generation.sampler import SamplingSettings
        from inference.prefer import COMMANDS, Interview, ModelPair, drawn

        models = {model.directory: ChatModel.load(model.directory) for model in pair}
        gc.freeze()  # looking through all that is loaded takes longer than the first word
    labelled = [(model.label, models[model.directory]) for model in pair]
    asked = ModelPair(labelled, SamplingSettings(max_tokens, temperature))
    interview = Interview(file, by)
    if interview.is_terminal:
        names = " and ".join(dict.fromkeys(model.label for model in pair))
        interview.tell(
            f"Each message gets two answers of {names}, on sides drawn at random. Enter alone takes one of the run's "
            f"own messages.\nPreferences of {by} go to {file.path} at once. {COMMANDS}."
        )
    return interview.collect(drawn(interview, asked, suggested))


def suggestions(run: RunDirectory | None, known: Iterable[Preference]) -> Iterator[Any]:
    """The prompts that the run trains on and nobody has judged answers to yet."""
    if run is None or not (file := run.data / f"{PROMPTS.name}_train.jsonl").exists():
        return
    seen = {json.dumps(preference.prompt) for preference in known}
    for row in read_rows(file):
        if (key := json.dumps(row["prompt"])) not in seen:
            seen.add(key)
            yield row["prompt"]


def waiting(known: list[Preference], by: str, other: str) -> list[Preference]:
    """Raises UserError for a name that is not there."""
    if other not in people(known):
        names = ", ".join(people(known))
        raise UserError(f"{other} has judged nothing yet" + (f": there are preferences of {names}." if names else "."))
    return unjudged(known, by, other)


def collect_again(file: PreferenceFile, by: str, before: list[Preference]) -> int:
    from inference.prefer import Interview, again

    interview = Interview(file, by)
    interview.tell(
        f"{len(before)} pairs to judge again, their sides drawn again." if before else "Nothing is left to judge."
    )
    return interview.collect(again(interview, before))


# The end


def outcome(file: PreferenceFile, by: str, collected: int, run: RunDirectory | None) -> Iterator[str]:
    """What was collected, how far people agree, and what to do with it."""
    preferences = file.read()
    decided = sum(preference.winner in ("a", "b") for preference in preferences)
    whole = counted(len(preferences), "preference")
    yield (
        f"Collected {counted(max(collected, 0), 'preference')} of {by}; {file.path} has {whole}, "
        f"{decided} for one of two answers."
    )
    for both in agreements(preferences):
        if by in both["people"]:
            yield f"{' and '.join(both['people'])} agree on {both['same']:.0%} of {counted(both['pairs'], 'pair')}."
    if run is not None and decided:
        data = "" if file.path == run.preferences else f" --data {typed(file.path)}"
        yield f"The next round: {next_command(run.path, data)}"


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
