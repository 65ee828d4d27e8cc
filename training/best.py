"""`keep=best`: the model with the best evaluation on held-out rows lies on the disk until a better one comes."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from training.checkpoints import Checkpoints
from training.hybrid_engine.kept_weights import KeptWeights
from training.metrics import WARNING
from training.run_directory import remove_directory
from training.stage import Stage

Rank = tuple[float, ...]
"""Of an evaluation: a better one has a larger one."""


class Best(Checkpoints):
    """The directory `best/` of one step: the weights of the best evaluation so far, without the optimiser's state.

    What was the best when a checkpoint was written stays as long as the checkpoint does, so that a run goes on from it
    with the best of then. All ranks call everything.
    """

    what = "the best model so far, that of"

    def __init__(
        self, stage: Stage, weights: KeptWeights, rank: Callable[[Mapping[str, float]], Rank | None], unit: str
    ):
        """`rank` is None for a model that must not be kept; `unit` is what evaluations are counted in."""
        super().__init__(stage.directory.best, 1, stage.ranks)
        self.stage, self.weights, self.rank, self.unit = stage, weights, rank, unit
        self.number = -1
        """What the best model had learned when it was evaluated; -1: there is none yet."""
        self.evaluation: dict[str, float] = {}

    def go_on_after(self, number: int) -> None:
        """Forget what was evaluated after `number`."""
        if self.ranks.is_first:
            for each in self.numbers():
                if each > number:
                    remove_directory(self.directory / str(each))
        self.ranks.barrier("a look at the best model")
        if found := self.newest():
            self.number, self.evaluation = found[1]["number"], found[1]["evaluation"]

    def look(self, number: int, evaluation: Mapping[str, float]) -> bool:
        """Keep the present model where its evaluation is the best so far; returns whether it is."""
        rank = self.rank(evaluation)
        if rank is None or not all(map(math.isfinite, rank)):
            return False
        before = self.rank(self.evaluation) if self.number >= 0 else None
        if before is not None and rank <= before:
            return False
        measured = {name: value for name, value in evaluation.items() if name.startswith("eval/")}
        self.save(number, self.weights.save_present, {"evaluation": measured})
        self.number, self.evaluation = number, measured
        return True

    def put_back(self, number: int) -> None:
        """The end, after `number`: the present model becomes the best one."""
        step, found = self.stage.directory.step, self.newest()
        if found is None:
            return self.stage.display.say(f"{WARNING}{step.title}: no evaluation gave numbers: the last model is kept")
        directory, state = found
        if state["number"] != number:
            with self.reading(directory):
                self.weights.load(directory)
            self.weights.put_back()
        which = f"the model after {self.unit} {state['number']} of {number} had the best evaluation and is kept"
        if state["number"] == 0:
            which = "no evaluation was better than the one before training, so that model is kept"
        self.stage.display.say(f"{WARNING * (state['number'] == 0)}{step.title}: {which}")

    @property
    def gone_on_from(self) -> Checkpoints:
        return self.stage.checkpoints

    def superfluous(self) -> list[int]:
        numbers = self.numbers()
        wanted = {max((n for n in numbers if n <= at), default=-1) for at in self.stage.checkpoints.numbers()}
        return [number for number in numbers[:-1] if number not in wanted]

    def _way_out(self, directory: Path) -> str:
        return f"delete {directory}, then the best of the others is kept"
