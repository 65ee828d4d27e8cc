"""The model function calls of one iteration of every algorithm: what a trainer runs and what the planner plans.

A call names the keys it needs and the keys it makes; keys that no call makes come with the data. Calls stand in the
order in which a rank that takes part in several of them runs them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from inference.errors import UserError

Kind = Literal["generate", "score", "train"]


@dataclass(frozen=True)
class Call:
    """One use of one role's weights on all samples of an iteration."""

    role: str
    kind: Kind
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.role}_{self.kind}"


def role_of(call: str) -> str:
    return call.partition("_")[0]


ACTOR_GENERATE = Call("actor", "generate", ("prompts",), ("samples", "logprobs"))
ACTOR_SCORE = Call("actor", "score", ("samples",), ("logprobs",))
"""Recomputes the old log-probabilities, as those of generation in 16 bit are too coarse."""
REFERENCE_SCORE = Call("reference", "score", ("samples",), ("reference_logprobs",))
REWARD_SCORE = Call("reward", "score", ("samples",), ("scores",))
CRITIC_SCORE = Call("critic", "score", ("samples",), ("values",))
_EXPERIENCE = ("samples", "logprobs", "reference_logprobs", "scores")
ACTOR_TRAIN = Call("actor", "train", (*_EXPERIENCE, "values"))
CRITIC_TRAIN = Call("critic", "train", (*_EXPERIENCE, "values"))
ACTOR_TRAIN_ON_GROUPS = Call("actor", "train", _EXPERIENCE)
"""Advantages come from the other samples of a prompt, so it needs no values."""

PPO = (ACTOR_GENERATE, REFERENCE_SCORE, REWARD_SCORE, CRITIC_SCORE, ACTOR_TRAIN, CRITIC_TRAIN)
GRPO = (ACTOR_GENERATE, REFERENCE_SCORE, REWARD_SCORE, ACTOR_TRAIN_ON_GROUPS)
"""All estimators without a critic run these calls; they differ in a formula."""
REFERENCE_SCORE_PAIRS = Call("reference", "score", ("pairs",), ("reference_logprobs",))
"""Runs once for each pair, before the first update, while the actor still is the reference."""
ACTOR_TRAIN_ON_PAIRS = Call("actor", "train", ("pairs", "reference_logprobs"))
ACTOR_SCORE_WRONG_ANSWERS = Call("actor", "score", ("pairs",), ("wrong_logprobs",))
"""Scores each prompt of a batch with the answer to another one, for KTO's reference point."""
DPO = (REFERENCE_SCORE_PAIRS, ACTOR_TRAIN_ON_PAIRS)
KTO = (
    REFERENCE_SCORE_PAIRS,
    ACTOR_SCORE_WRONG_ANSWERS,
    Call("actor", "train", (*ACTOR_TRAIN_ON_PAIRS.inputs, *ACTOR_SCORE_WRONG_ANSWERS.outputs)),
)
SFT = (Call("actor", "train", ("rows",)),)
REWARD = (Call("reward", "train", ("pairs",)),)
ALGORITHMS = {
    "ppo": PPO,
    "grpo": GRPO,
    "dpo": DPO,
    "kto": KTO,
    "sft": SFT,
    "reward": REWARD,
}


def rlhf_calls(with_critic: bool, with_reward_model: bool = True, with_reference: bool = True) -> tuple[Call, ...]:
    """List what step 3 runs; what an absent role would make comes with the data."""
    absent = [REWARD_SCORE] * (not with_reward_model) + [REFERENCE_SCORE] * (not with_reference)
    return tuple(call for call in (PPO if with_critic else GRPO) if call not in absent)


def with_recomputed_logprobs(calls: tuple[Call, ...]) -> tuple[Call, ...]:
    """`calls` with a score call of the actor behind its generation, which then makes samples only."""
    result: list[Call] = []
    for call in calls:
        if call == ACTOR_GENERATE:
            result += [Call("actor", "generate", call.inputs, ("samples",)), ACTOR_SCORE]
        else:
            result.append(call)
    return tuple(result)


@dataclass(frozen=True)
class Edge:
    """`consumer` waits for `producer`: of the same iteration, or `iterations_back` before."""

    producer: str
    consumer: str
    keys: tuple[str, ...] = ()  # what flows along it; none where only the version of the weights matters
    iterations_back: int = 0


@dataclass(frozen=True)
class DataflowGraph:
    """Calls in the order in which a rank runs them. Raises UserError where the calls do not fit together."""

    calls: tuple[Call, ...]
    iterations_overlap: bool = True
    """Whether a call may begin while training that it does not need still runs; else all ranks meet after training."""

    def __post_init__(self) -> None:
        names: set[str] = set()
        made: set[str] = set()
        late = {key for call in self.calls for key in call.outputs}
        for call in self.calls:
            if call.name in names:
                raise UserError(f"The call '{call.name}' stands twice in the graph; give each role one call of a kind.")
            names.add(call.name)
            if missing := (set(call.inputs) & late) - made:
                raise UserError(f"The call '{call.name}' needs '{min(missing)}' before it is made; reorder the calls.")
            if again := set(call.outputs) & made:
                raise UserError(f"The key '{min(again)}' is made twice; rename one of the two.")
            made.update(call.outputs)

    @classmethod
    def of(cls, algorithm: str) -> "DataflowGraph":
        """Build the graph of `ppo`, `grpo`, `dpo`, `kto`, `sft` or `reward`. Raises UserError for another name."""
        if algorithm not in ALGORITHMS:
            raise UserError(f"There is no algorithm '{algorithm}'; choose one of {', '.join(ALGORITHMS)}.")
        return cls(ALGORITHMS[algorithm])

    def call(self, name: str) -> Call:
        return next(call for call in self.calls if call.name == name)

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(call.role for call in self.calls))

    @property
    def trained_roles(self) -> tuple[str, ...]:
        return tuple(call.role for call in self.calls if call.kind == "train")

    def training_call(self, role: str) -> Call | None:
        """Return the call that trains `role`; None if it is frozen."""
        return next((call for call in self.calls if call.role == role and call.kind == "train"), None)

    @property
    def data_edges(self) -> tuple[Edge, ...]:
        """Edges from the call that makes a key to each call that needs it."""
        maker = {key: call for call in self.calls for key in call.outputs}
        edges = []
        for consumer in self.calls:
            producers = dict.fromkeys(maker[key] for key in consumer.inputs if key in maker)
            for producer in producers:
                keys = tuple(key for key in consumer.inputs if maker.get(key) == producer)
                edges.append(Edge(producer.name, consumer.name, keys))
        return tuple(edges)

    @property
    def version_edges(self) -> tuple[Edge, ...]:
        """The first call on a role waits for the role's last call of the iteration before; every use of trained
        weights waits for the training that made them, and for all training where iterations do not overlap."""
        trainings = [call for call in self.calls if call.kind == "train"]
        if not self.iterations_overlap and trainings:
            return tuple(Edge(train.name, call.name, iterations_back=1) for train in trainings for call in self.calls)
        edges = []
        for role in self.roles:
            calls = [call for call in self.calls if call.role == role]
            training = self.training_call(role)
            if training is None:
                edges.append(Edge(calls[-1].name, calls[0].name, iterations_back=1))
            else:
                edges += [Edge(training.name, call.name, iterations_back=1) for call in calls]
        return tuple(edges)


def before(edges: Iterable[Edge], name: str) -> list[Edge]:
    return [edge for edge in edges if edge.consumer == name]
