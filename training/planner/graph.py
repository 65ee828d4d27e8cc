"""The dataflow graph of one iteration: calls, and what each of them waits for."""

from collections.abc import Iterable
from dataclasses import dataclass

from inference.errors import UserError
from training.calls import ALGORITHMS, Call


@dataclass(frozen=True)
class Edge:
    """`consumer` waits for `producer`: of the same iteration, or `iterations_back` before."""

    producer: str
    consumer: str
    keys: tuple[str, ...] = ()
    """What flows along it; none where only the version of the weights matters."""
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
        """Of `ppo`, `grpo`, `dpo`, `kto`, `sft` or `reward`. Raises UserError for another name."""
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
        """The call that trains `role`; None if it is frozen."""
        return next((call for call in self.calls if call.role == role and call.kind == "train"), None)

    @property
    def data_edges(self) -> tuple[Edge, ...]:
        """From the call that makes a key to each call that needs it."""
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
            return tuple(Edge(each.name, call.name, iterations_back=1) for each in trainings for call in self.calls)
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
