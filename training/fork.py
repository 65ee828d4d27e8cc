"""A fork (`run --from`): which rows and steps of another run serve here unchanged, what is trained, and why."""

import filecmp
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from inference.disk import write_text, writing
from inference.errors import UserError
from training.changes import differences, is_recorded, journal_of, teaches
from training.config import RunConfig
from training.config_files import as_typed
from training.data.formats import UNPAIRED
from training.data.prepare import COUNTS_FILE, read_counts
from training.data.rows import DEMONSTRATIONS_FILE, PANEL_FILE
from training.inputs import CONSEQUENCES, changes, code_of, link_or_copy, models_of, name_base, paths_of, stored_model
from training.metrics import Journal
from training.opening import read_starts
from training.run_directory import RunDirectory, StepDirectory, read_json, write_directory, write_json
from training.steps import DEMONSTRATIONS, DPO, METHODS, PAIRS, REWARD, SFT, Step

SMALL = 2**20  # bytes below which a file of a model or checkpoint is copied: names of its run may stand in it
SETTINGS_OF_TOKENS = ("dtype", "data.max_prompt_tokens", "data.max_response_tokens")
SETTINGS_OF_ACCURACY = {*SETTINGS_OF_TOKENS, REWARD.given_by, "reward.eval_rows"}
SETTINGS_OF_REFERENCE = {*SETTINGS_OF_TOKENS, SFT.given_by, "reference_model"}
"""Settings that decide what a given reward model, and DPO's reference, say of the run's pairs."""


@dataclass(frozen=True)
class Fork:
    run: RunDirectory
    config: RunConfig
    parent: RunDirectory
    theirs: RunConfig  # the parent's settings

    @classmethod
    def of(cls, run: RunDirectory, config: RunConfig) -> "Fork | None":
        """Read the fork; None for a run that is none, or whose parent is gone."""
        parent = RunDirectory(Path(config.fork_of))
        there = config.fork_of and parent.config_file.exists()
        return cls(run, config, parent, parent.read_config()) if there else None

    @property
    def name(self) -> str:
        return self.parent.path.name

    @cached_property
    def steps(self) -> dict[Step, str]:
        """Why each step of the run is trained; '' for one that is the parent's."""
        reasons: dict[Step, str] = {}
        for step in METHODS[self.config.method]:
            if step in self.config.steps and not self.config.given_model(step):
                reasons[step] = next(self._reasons(step, reasons), "")
        return reasons

    def _reasons(self, step: Step, before: Mapping[Step, str]) -> Iterator[str]:
        if has_begun(self.run.step(step)):
            if not self._is_taken(step):
                yield f"{self.run.path.name} has begun it"
            return
        if not self.parent.step(step).is_finished:
            yield f"{self.name} has not finished it"
        yield from self._other_settings(settings_read(self.config, step), settings_read(self.theirs, step))
        for earlier in self.config.earlier_steps(step):
            if before.get(earlier):
                yield f"step {earlier.label} is"
        yield from self._changed_models(step)
        for kind in ["reward_function"] * step.draws_samples + ["formulas"] * bool(step.method):
            code = code_of(self.config, kind)
            if any(start.get(kind, code) != code for start in self._starts(step)):
                yield f"{', '.join(map(str, paths_of(self.config)[kind]))} has changed"
        if step.draws_samples and self.config.rlhf.reward_url != self.theirs.rlhf.reward_url:
            yield f"rlhf.reward_url is another than in {self.name}"
        if any(self._other_rows(name) for name in rows_read(self.config, step)):
            yield f"its rows are others ({self.other_data})" if self.other_data else "its rows are others"

    def _is_taken(self, step: Step) -> bool:
        """Whether the run has it from the parent, and neither has trained it on since."""
        ours, theirs = self.run.step(step), self.parent.step(step)
        if not (taken_file(ours).exists() and ours.is_finished and theirs.is_finished):
            return False
        return ours.result_file.read_bytes() == theirs.result_file.read_bytes()

    def _other_settings(self, ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[str]:
        for key, (old, new) in differences(theirs, ours).items():
            if teaches(key, self.config) or teaches(key, self.theirs) or (new and is_recorded(key)):
                yield f"{as_typed(key)} is {new!r}, and {old!r} in {self.name}"

    def _changed_models(self, step: Step) -> Iterator[str]:
        for source in models_read(self.config, step).values():
            if source in self._changed["models"]:
                yield f"{source} has changed"

    @cached_property
    def _changed(self) -> dict[str, list[str]]:
        """Inputs of the parent that are not as they were, by kind."""
        changed: dict[str, list[str]] = {kind: [] for kind in CONSEQUENCES}
        for kind, path in changes(self.parent):
            changed[kind].append(path)
        return changed

    @cached_property
    def other_data(self) -> str:
        """Why the rows are made again; '' where they are the parent's."""
        ours, theirs = (
            {"data": config.data.model_dump() | {"split_seed": config.split_seed}, "model": config.actor_source}
            for config in (self.config, self.theirs)
        )
        if not (self.parent.data / COUNTS_FILE).exists():
            return f"{self.name} has none"
        labelled = UNPAIRED in "".join(read_counts(self.parent.data).get("sources", []))
        if labelled and self.config.data.keeps_labels != self.theirs.data.keeps_labels:
            return "answers keep their labels" if self.config.data.keeps_labels else "answers with a label make pairs"
        reasons = [*self._other_settings(ours, theirs), *(f"{path} has changed" for path in self._changed["data"])]
        return reasons[0] if reasons else ""

    def _other_rows(self, name: str) -> bool:
        """Whether a file of rows has another content here than there or, before it is made, would be made again."""
        ours, theirs = (run.data / name for run in (self.run, self.parent))
        if not (self.run.data / COUNTS_FILE).exists():
            laid_over = self.config.data.parent == self.config.fork_of and name.startswith(f"{DEMONSTRATIONS.name}_")
            return bool(self.other_data) and not laid_over
        if not (ours.exists() and theirs.exists()):
            return ours.exists() or theirs.exists()
        return not (os.path.samefile(ours, theirs) or filecmp.cmp(ours, theirs, shallow=False))

    def lines(self, steps: Sequence[Step]) -> Iterator[str]:
        """Say which steps are the parent's, and why others of `steps` are trained."""
        for step, why in self.steps.items():
            if step in steps or not why:
                yield self._line(step, why)

    def trained(self, steps: Sequence[Step]) -> list[Step]:
        return [step for step in steps if self.steps.get(step, "it is asked for")]

    def _line(self, step: Step, why: str) -> str:
        what = f"trained, as {why}" if why else f"that of {self.name}, unchanged"
        return f"Step {step.label} ({step.title}): {what}"

    def take_models(self) -> None:
        """Take over the models that the parent holds for machines without a network (`prepare`)."""
        for source in models_of(self.config):
            ours, theirs = stored_model(self.run, source), stored_model(self.parent, source)
            if theirs.is_dir() and not ours.exists():
                self._take(theirs, ours)

    def take_rows(self) -> None:
        """Take over rows and tokens, where they are the parent's; a run that has rows keeps them."""
        if (self.run.data / COUNTS_FILE).exists() or self.other_data:
            return
        ptx = self.config.rlhf.ptx.source
        mixes_others = ptx != self.theirs.rlhf.ptx.source or ptx in self._changed["data"]
        if self.parent.tokens.is_dir():
            self._take(self.parent.tokens, self.run.tokens)
        self._take(self.parent.data, self.run.data, [DEMONSTRATIONS_FILE] * mixes_others, links=lambda file: False)

    def take_steps(self, trained: Sequence[Step], say: Callable[[str], None]) -> list[Step]:
        """Take over what is unchanged, and for a step that is `trained` what was measured before it began. Returns
        those of `trained` that are still to be. Raises UserError where one of them begins with the model of a step that
        would have to be trained as well.
        """
        for step in trained:
            for earlier in self.config.earlier_steps(step):
                why = self.steps.get(earlier)
                if why and earlier not in trained and not self.run.step(earlier).is_finished:
                    raise UserError(
                        f"Step {step.label} begins with the model of step {earlier.label}, which is another one "
                        f"than in {self.name}, as {why}: train step {earlier.label} too (--steps, or rlhf-chat run)."
                    )
        for step, why in self.steps.items():
            if has_begun(self.run.step(step)):
                self._record_starts(step)
                continue
            if not why and not self._take_step(step):  # all is looked at again
                fork = Fork.of(self.run, self.config)
                return fork.take_steps(trained, say) if fork else list(trained)
            if why and step in trained:
                self._take_measured(step)
            if step in trained or not why:
                say(self._line(step, why))
        return [step for step in trained if not self.run.step(step).is_finished]

    def _take_step(self, step: Step) -> bool:
        """Take over a step, and return whether the parent left it as it was meanwhile; else nothing is taken over."""
        before, starts = state_of(self.parent.step(step)), self._starts(step)
        theirs = self.parent.step(step).path
        there, here = theirs.stat(), self.run.path.stat()
        can_link = there.st_dev == here.st_dev and there.st_uid == os.getuid()
        leave = ["error.json", *([] if can_link else ["checkpoints", "best"])]

        def links(file: Path) -> bool:
            return file.parent != theirs and file.stat().st_size >= SMALL

        def change(copy: Path) -> None:
            if not self.parent.step(step).is_finished or state_of(self.parent.step(step)) != before:
                raise ChangedMeanwhile(theirs)
            name_base(copy, self.parent.path, self.run.path)
            journal = Journal(copy / journal_of(self.parent.step(step)).file.name)
            if rows := journal.read():  # what was set aside stays in the parent
                write_text(journal.file, "")
                for row in rows:
                    journal.write(row["number"], row | {"earlier": ""})
            write_json(copy / taken_file(self.run.step(step)).name, {"of": self.config.fork_of, "starts": starts})

        try:
            self._take(theirs, self.run.step(step).path, leave, links, change)
        except ChangedMeanwhile:
            return False
        self._record_starts(step)
        return True

    def _record_starts(self, step: Step) -> None:
        """Write the starts of a step that was taken over into the run's own journal."""
        file = taken_file(self.run.step(step))
        known = read_starts(self.run)
        if not file.exists() or any(start["what"] == step.folder for start in known):
            return
        taken = read_json(file, "delete the step, then it is taken over again")
        lines = [
            json.dumps(start | {"number": number, "of": taken["of"]}, ensure_ascii=False) + "\n"
            for number, start in enumerate(taken["starts"], len(known) + 1)
        ]
        with writing("a line of it", self.run.starts_file), open(self.run.starts_file, "a", encoding="utf-8") as handle:
            handle.writelines(lines)

    def _starts(self, step: Step) -> list[dict[str, Any]]:
        return [start for start in read_starts(self.parent) if start["what"] == step.folder]

    def _take_measured(self, step: Step) -> None:
        """Take over a given reward model's accuracy on the held-out pairs, or what DPO's reference says of them."""
        theirs = self.parent.step(step)
        before = [earlier for earlier in self.config.earlier_steps(step) if self.steps[earlier]]
        keys: set[str]
        if step is DPO and not (self.config.dpo.is_unpaired or self.theirs.dpo.is_unpaired):
            file, keys, rows = theirs.reference_file, SETTINGS_OF_REFERENCE, rows_read(self.config, step)
        elif self.config.given_model(REWARD):
            file, keys, rows = theirs.reward_accuracy_file, SETTINGS_OF_ACCURACY, [f"{PAIRS.name}_eval.jsonl"]
            before = []
        else:
            return
        differ = differences(self.theirs.model_dump(), self.config.model_dump()).keys() & keys
        changed = [*self._changed_models(step), *filter(self._other_rows, rows)]
        if file.exists() and not (before or differ or changed):
            self.run.step(step).path.mkdir(exist_ok=True)
            shutil.copyfile(file, self.run.step(step).path / file.name)

    def _take(
        self,
        theirs: Path,
        ours: Path,
        leave: Sequence[str] = (),
        links: Callable[[Path], bool] = lambda file: True,
        change: Callable[[Path], None] = lambda copy: None,
    ) -> None:
        """Take over a whole directory or nothing, by links or copies, without the names at its top in `leave`."""

        def write(copy: Path) -> None:
            for file in sorted(theirs.rglob("*")):
                name = file.relative_to(theirs)
                if not file.is_file() or name.parts[0] in leave or any(part.startswith(".") for part in name.parts):
                    continue
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                try:
                    (link_or_copy if links(file) else shutil.copyfile)(file, copy / name)
                except FileNotFoundError:
                    raise ChangedMeanwhile(theirs) from None
            change(copy)

        with writing(f"what is taken over from {self.name}", self.run.path):
            write_directory(ours, write)


class ChangedMeanwhile(UserError):
    def __init__(self, theirs: Path):
        super().__init__(f"{theirs} was changed while it was taken over: give the same command again.")


def taken_file(step: StepDirectory) -> Path:
    """Return the file in a step that was taken over which names its run, and its starts there."""
    return step.path / "taken.json"


def has_begun(step: StepDirectory) -> bool:
    return step.is_finished or step.checkpoints.exists() or step.metrics_file.exists()


def state_of(step: StepDirectory) -> dict[Path, tuple[int, int]]:
    """Read size and time of each file in a step but the log, into which a comparison may write."""
    state = {}
    for file in step.path.rglob("*"):
        with suppress(FileNotFoundError):  # it goes away in this moment
            if file.is_file() and file != step.log_file:
                state[file] = (file.stat().st_size, file.stat().st_mtime_ns)
    return state


def settings_read(config: RunConfig, step: Step) -> dict[str, Any]:
    """Collect what decides about the model that a step leaves, beside the rows and the models of earlier steps."""
    values = config.model_dump(mode="json")
    own = values[step.command] | {"seed": config.seed_of(step)}
    data = {key: values["data"][key] for key in ("max_prompt_tokens", "max_response_tokens")}
    shared = {key: values[key] for key in ("dtype", "save_dtype")}
    settings = {step.command: own, "data": data, **shared, **models_read(config, step)}
    if step.draws_samples and config.rlhf.has_critic and not config.rlhf.has_reward_model:  # it begins as step 2 would
        settings["reward"] = {key: values["reward"][key] for key in ("initialize_from", "layers")}
    return settings


def models_read(config: RunConfig, step: Step) -> dict[str, str]:
    """Setting -> model, of those that the step begins with and that no step of the run makes."""
    models = {earlier.given_by: config.given_model(earlier) for earlier in config.steps_before(step)}
    if step.compared_with:
        models["reference_model"] = config.reference_model
    if step is SFT:
        models["model"] = config.model
    if step is REWARD:
        models["model"] = config.actor_source  # of its tokens
    critic_alone = step.draws_samples and config.rlhf.has_critic and not config.rlhf.has_reward_model
    if critic_alone:
        models[REWARD.given_by] = config.given_model(REWARD)
    if (step is REWARD or critic_alone) and config.reward.initialize_from == "base":
        models["reward_model"] = config.reward_model_source
    return models


def rows_read(config: RunConfig, step: Step) -> list[str]:
    files = [f"{step.rows.name}_train.jsonl", f"{step.rows.name}_eval.jsonl"]
    if step.leaves_scorer:
        files.append(PANEL_FILE)
    if step.draws_samples and (ptx := config.rlhf.ptx).coefficient:
        files.append(DEMONSTRATIONS_FILE if ptx.source else f"{DEMONSTRATIONS.name}_train.jsonl")
    return files
