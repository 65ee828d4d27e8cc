"""What `rlhf-chat plan` is asked, and what it answers: a run on a cluster; plans with their estimates."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from applications.fit import Machine, find_shape
from applications.settings import resolve_settings
from inference.errors import UserError
from training.calls import ACTOR_GENERATE, ACTOR_SCORE, Call
from training.config import RunConfig
from training.models.loading import resolve_dtype
from training.plan import Assignment, Plan
from training.plan_checks import cannot_run, unrunnable
from training.planner.footprint import DTYPES, Footprints
from training.planner.hardware import DEVICES, THIS_MACHINE, Cluster, profile_file, read_profile
from training.planner.options import FusedTraining, Space, fused_training
from training.planner.reallocation import AugmentedGraphs
from training.planner.search import Estimate, estimate
from training.planner.workload import Workload
from training.shape import Shape
from training.step3_rlhf.old_logprobs import expects_exactness, iteration_calls
from training.step3_rlhf.planned import PRECISIONS, graphs_of

DEVICES_PER_NODE = 8


@dataclass(frozen=True)
class Outcome:
    """One plan by its name: what is known of it, or why there is none."""

    name: str
    found: Estimate | None
    why_not: str = ""
    """Why it does not fit, or why there is none."""
    refused: tuple[str, ...] = ()
    """Why this runtime does not run it, a sentence each."""
    training: FusedTraining | None = None
    """Of actor and critic, where they train in pipeline stages on the same ranks."""

    @property
    def runs(self) -> bool:
        return self.found is not None and not self.why_not and not self.refused

    @property
    def seconds(self) -> float:
        """Of an iteration, training in one fused schedule where that is faster; infinite where there is no plan."""
        if self.found is None:
            return math.inf
        gain = max(0.0, self.training.serial - self.training.fused) if self.training else 0.0
        return self.found.iteration_seconds - gain

    @property
    def stages(self) -> str:
        """Whether all training is in pipeline stages, or nothing is; '' where some is."""
        assert self.found is not None
        degrees = {name: one.layout.pipeline for name, one in self.found.plan.assignments.items()}
        if set(degrees.values()) == {1}:
            return "no stages"
        return "in stages" if all(n > 1 for name, n in degrees.items() if name.endswith("_train")) else ""


@dataclass(frozen=True)
class Request:
    """What is to be planned."""

    config: RunConfig
    graphs: AugmentedGraphs
    """Of all calls that may run; a plan has a line for each."""
    price: float | None
    """Of one GPU for one hour, in any currency."""
    machine: Machine | None = None
    """This one, if it is planned for."""

    @property
    def cluster(self) -> Cluster:
        return self.graphs.costs.cluster

    @property
    def workload(self) -> Workload:
        return self.graphs.costs.workload

    @property
    def runnable(self) -> Space:
        """What this runtime can run with the settings; the search of every call apart."""
        return Space(runs=self.runs)

    @cached_property
    def exact_graphs(self) -> AugmentedGraphs:
        """Of the calls that run where training equals generation to the bit."""
        calls = iteration_calls(self.config.rlhf, DTYPES[self.workload.precision], is_exact=True)
        return AugmentedGraphs(replace(self.graphs.graph, calls=calls), self.graphs.costs)

    def expects_exactness(self, degree: int) -> bool:
        """Whether training would equal generation to the bit, if so many ranks generated together on this machine."""
        settings, dtype = self.config.rlhf, DTYPES[self.workload.precision]
        return self.machine is not None and expects_exactness(settings, dtype, self.machine.device, degree)

    def graphs_of(self, plan: Plan) -> AugmentedGraphs:
        """Of the calls that run by it."""
        return self.exact_graphs if self.expects_exactness(plan[ACTOR_GENERATE.name].layout.tensor) else self.graphs

    def completed(self, plan: Plan) -> Plan:
        """With a line for the actor's score call, which runs where training does not equal generation after all: with
        generation's weights, on as many samples at a time as in training."""
        if ACTOR_SCORE.name in plan.assignments or ACTOR_SCORE not in self.graphs.graph.calls:
            return plan
        layout, samples = plan[ACTOR_GENERATE.name].layout, self.workload.samples
        rows = self.workload.rows_together("train", plan["actor_train"])
        micro_batches = min(-(-samples // (layout.data * rows)), samples // layout.data)
        return Plan({**plan.assignments, ACTOR_SCORE.name: Assignment(layout, micro_batches)})

    def runs(self, call: Call, assignment: Assignment) -> bool:
        return not cannot_run(call, assignment, self.workload, self.config.rlhf, self.cluster.size)

    def why_not_run(self, plan: Plan) -> list[str]:
        """What this runtime refuses of a plan that can be costed, a sentence each."""
        return unrunnable(plan, self.graphs.graph, self.workload, self.config.rlhf, self.cluster.size)

    @property
    def as_set(self) -> Plan:
        """What the settings say. Raises UserError where they do not fit the ranks."""
        length, calls = self.workload.longest, self.graphs.graph.calls
        return Plan.of(self.config.rlhf, self.cluster.size, length, calls)

    def hours(self, found: Estimate) -> float:
        """Of all iterations of the run."""
        return found.iteration_seconds * self.config.rlhf.iterations / 3600

    def cost(self, found: Estimate) -> float | None:
        """Of all iterations, in the currency of the price."""
        return None if self.price is None else self.hours(found) * self.cluster.size * self.price

    def outcome(self, name: str, plan: Plan) -> Outcome:
        """With what is wrong with it. Raises UserError where it cannot be costed."""
        graphs = self.graphs_of(plan)
        found, refused = estimate(plan, graphs), tuple(self.why_not_run(plan))
        fuses = self.config.rlhf.fusion.training in ("auto", "fused")
        return Outcome(name, found, self.overfull(found), refused, fused_training(plan, graphs) if fuses else None)

    def overfull(self, found: Estimate) -> str:
        """Why the plan does not fit, a sentence; '' if it does."""
        try:
            self._footprints(found.plan).require_fit(found.plan, self.cluster)
        except UserError as error:
            return str(error)
        return ""

    def host_peak(self, found: Estimate) -> int:
        """Bytes of main memory of the fullest node, while models are loaded or later."""
        return self._footprints(found.plan).host_peak(found.plan, self.cluster)

    def _footprints(self, plan: Plan) -> Footprints:
        return Footprints(self.workload, self.graphs_of(plan).graph)


def make_request(
    model: str,
    reward_model: str | None,
    nodes: int,
    gpus_per_node: int | None,
    gpu: str,
    network: float,
    price: float | None,
    config: list[Path] | None,
    overrides: list[str] | None,
) -> Request:
    settings = resolve_settings(model, config, overrides, {"reward_model": reward_model})
    assert settings is not None
    machine = Machine.here() if gpu == THIS_MACHINE else None
    cluster = replace(cluster_of(gpu, nodes, gpus_per_node), network_bandwidth=network * 1e9 / 8)
    return request_of(settings, cluster, price, machine)


def request_of(
    settings: RunConfig, cluster: Cluster, price: float | None = None, machine: Machine | None = None
) -> Request:
    """Step 3 of a run on a cluster, perhaps of nodes like this `machine`. Raises UserError where a model's size is not
    known, or the machine has not the number format that the settings ask for."""
    if machine is not None:
        settings = with_number_format(settings, machine)
    rlhf = settings.rlhf
    if rlhf.exact is True and cluster.device.has_own_memory:
        raise UserError(f"rlhf.exact=true works on CPUs only; take rlhf.exact=auto to plan for {cluster.device.name}.")
    actor = require_shape(settings.actor_source, settings.architecture.get("model"))
    scorer = None
    if rlhf.has_critic or rlhf.has_reward_model:
        scorer = require_shape(settings.scorer_source, settings.architecture.get("reward_model"))
    dtype = DTYPES[cluster.device.precision if settings.dtype == "auto" else settings.dtype]
    own, given = settings.reference_model, settings.architecture.get("reference_model")
    reference = require_shape(own, given) if own else None
    graphs = graphs_of(settings, iteration_calls(rlhf, dtype), actor, scorer, dtype, cluster, reference)
    return Request(settings, graphs, price, machine)


def with_number_format(config: RunConfig, machine: Machine) -> RunConfig:
    """The settings with the number format that a run on this machine takes. Raises UserError where it has none."""
    return config.model_copy(update={"dtype": PRECISIONS[resolve_dtype(config.dtype, machine.device)]})


def cluster_of(gpu: str, nodes: int, gpus_per_node: int | None) -> Cluster:
    """Of a device in the list, of this machine, or of a profile in a YAML file; by default nodes of 8, or of as many
    ranks as were measured together. Raises UserError."""
    if gpu == THIS_MACHINE or gpu.endswith((".yaml", ".yml")):
        profile = read_profile(profile_file(gpus_per_node or 0) if gpu == THIS_MACHINE else Path(gpu))
        return replace(profile.cluster, nodes=nodes, devices_per_node=gpus_per_node or profile.ranks)
    if gpu not in DEVICES:
        raise UserError(f"--gpu takes {', '.join(DEVICES)}, {THIS_MACHINE} or a profile's YAML file, not '{gpu}'.")
    return Cluster.named(gpu, nodes, gpus_per_node or DEVICES_PER_NODE).ours


def require_shape(model: str, given: dict[str, Any] | None) -> Shape:
    shape = find_shape(model, given)
    if shape is None:
        raise UserError(f"The size of {model} is not known without the hub; name a preset or a local model directory.")
    return shape
