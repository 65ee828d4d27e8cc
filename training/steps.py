"""The steps that a run can have, and the methods that they make up: all that is said of a step stands in its row.

A new method is a row here, its settings in config.py and a folder beside step2_dpo/. Imports nothing.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainingRows:
    """What a step learns from."""

    name: str  # how the files begin: data/{name}_train.jsonl, data/{name}_eval.jsonl
    contents: str
    unit: str
    answers: int  # answers that a forward pass reads for one row
    parts: tuple[str, ...]  # keys of the texts that become tokens


DEMONSTRATIONS = TrainingRows("sft", "prompts with a response, or messages", "rows", 1, ("prompt", "response"))
PAIRS = TrainingRows(
    "pairs", "prompts with a chosen and a rejected response", "pairs", 2, ("prompt", "chosen", "rejected")
)
ANSWERS = TrainingRows(
    "pairs", "answers that are labelled as good or bad, or pairs", "answers", 1, ("prompt", "response")
)
"""What DPO learns from with an unpaired loss (`dpo.loss=kto`); both answers of a pair are such."""
PROMPTS = TrainingRows("prompts", "prompts", "samples", 1, ("prompt",))


@dataclass(frozen=True)
class Step:
    number: int  # as people count; a step that replaces others has the number of the first of them
    command: str
    """The command of rlhf-chat. The step's settings and the model it leaves go by this name too."""
    title: str
    rows: TrainingRows
    loss: str  # what its loss is, or is counted in
    starts_from: tuple["Step", ...] = ()
    """The steps whose models it needs."""
    compared_with: "Step | None" = None
    given_by: str = ""
    """The setting that names a finished model to use instead."""
    leaves_scorer: bool = False  # whether it leaves a reward model, which scores texts and writes none
    draws_samples: bool = False
    """Whether it learns from answers that the model itself gives: iterations of generating, scoring and training."""
    has_reference: bool = False
    """Whether the model as it was before its first update says, once, what it thinks of the rows."""

    @property
    def folder(self) -> str:
        """The step's folder in a run; its script is training/{folder}/main.py. The chat finds models by such names."""
        return f"step{self.number}_{self.command}"

    @property
    def label(self) -> str:
        """What follows the word `step` where people read it: `2`, `2 (DPO)`."""
        return str(self.number) if self in METHODS["ppo"] else f"{self.number} ({self.name})"

    @property
    def unit(self) -> str:
        """What its progress and its checkpoints are counted in."""
        return "iteration" if self.draws_samples else "optimiser step"

    @property
    def name(self) -> str:
        """What people call its model: `RLHF`."""
        return self.command.upper()

    @property
    def comparison_files(self) -> tuple[str, str]:
        """Figures and answers of the comparison of its model with that of an earlier step."""
        suffix = "" if self in METHODS["ppo"] else f"_{self.command}"
        return f"evaluation{suffix}.json", f"comparison{suffix}.jsonl"

    @property
    def method(self) -> "Method | None":
        """The method that ends with it."""
        return next((method for method, steps in METHODS.items() if steps[-1] is self), None)


PAIR_LOSS = "mean over pairs"
SFT = Step(1, "sft", "supervised fine-tuning", DEMONSTRATIONS, "nats a response token", given_by="sft_model")
REWARD = Step(2, "reward", "reward model", PAIRS, PAIR_LOSS, given_by="trained_reward_model", leaves_scorer=True)
PPO = Step(3, "rlhf", "PPO", PROMPTS, "", (SFT, REWARD), compared_with=SFT, draws_samples=True)
DPO = Step(2, "dpo", "direct preference optimisation", PAIRS, PAIR_LOSS, (SFT,), compared_with=SFT, has_reference=True)

Method = Literal["ppo", "dpo"]
METHODS: dict[Method, tuple[Step, ...]] = {"ppo": (SFT, REWARD, PPO), "dpo": (SFT, DPO)}
STEPS = tuple(dict.fromkeys(step for steps in METHODS.values() for step in steps))
COMPARED = tuple(step for step in STEPS if step.compared_with)
"""The steps whose model is compared with an earlier one."""
WRITING = tuple(step for step in STEPS if not step.leaves_scorer)  # the steps whose model can be talked to


def step_of(command: str) -> Step:
    return next(step for step in STEPS if step.command == command)
