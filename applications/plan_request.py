"""What `rlhf-chat plan` is asked, and what it answers: a run on a cluster; plans with their estimates."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from applications.fit import Machine, known_shapes
from applications.preset_store import settings_for_model
from inference.errors import UserError
from training.calls import ACTOR_GENERATE, ACTOR_SCORE, Call
from training.config import RunConfig
from training.models.loading import resolve_dtype
from training.opening import settings_of_new_run
from training.plan import Assignment, Plan
from training.plan_checks import cannot_run, unrunnable
from training.planner.footprint import DTYPES, Footprints
from training.planner.hardware import DEVICES, THIS_MACHINE, Cluster, profile_file, read_profile
from training.planner.options import FusedTraining, fused_training
from training.planner.reallocation_cost import AugmentedGraphs
from training.planner.search import Estimate, estimate
from training.planner.workload import Workload
from training.step3_rlhf.planned import PRECISIONS, expects_exactness, graphs_of, iteration_calls

DEVICES_PER_NODE = 8


@dataclass(frozen=True)
class PlanOutcome:
    """One plan by its name: what is known of it, or why there is none."""

    name: str
    estimate: Estimate | None
    why_not: str = ""  # why it does not fit, or why there is none
    refused: tuple[str, ...] = ()  # why this runtime does not run it, a sentence each
    training: FusedTraining | None = None  # where actor and critic train in pipeline stages on the same ranks

    @property
    def runs(self) -> bool:
        return self.estimate is not None and not self.why_not and not self.refused

    @property
    def seconds(self) -> float:
        """What an iteration takes, with one fused schedule for training where that is faster; infinite without a
        plan."""
        if self.estimate is None:
            return math.inf
        gain = max(0.0, self.training.serial - self.training.fused) if self.training else 0.0
        return self.estimate.iteration_seconds - gain

    @property
    def stages(self) -> str:
        """Whether all training is in pipeline stages, or nothing is; '' where some is."""
        assert self.estimate is not None
        degrees = {name: one.layout.pipeline for name, one in self.estimate.plan.assignments.items()}
        if set(degrees.values()) == {1}:
            return "no stages"
        return "in stages" if all(n > 1 for name, n in degrees.items() if name.endswith("_train")) else ""


@dataclass(frozen=True)
class Request:
    """What is to be planned."""

    config: RunConfig
    graphs: AugmentedGraphs  # of all calls that may run; a plan has a line for each
    price: float | None  # of one GPU for one hour, in any currency
    machine: Machine | None = None  # this one, if it is planned for

    @classmethod
    def of(
        cls, config: RunConfig, cluster: Cluster, price: float | None = None, machine: Machine | None = None
    ) -> "Request":
        """Step 3 of a run on a cluster, perhaps of nodes like this `machine`. Raises UserError where a model's size is
        unknown, or the machine has not the number format that the settings ask for."""
        if machine is not None:  # the number format that a run on it takes
            config = config.model_copy(update={"dtype": PRECISIONS[resolve_dtype(config.dtype, machine.device)]})
        rlhf = config.rlhf
        if rlhf.exact is True and cluster.device.has_own_memory:
            raise UserError(
                f"rlhf.exact=true works on CPUs only; take rlhf.exact=auto to plan for {cluster.device.name}."
            )
        actor, scorer, reference = known_shapes(config)
        scorer_source = config.scorer_source if rlhf.has_critic or rlhf.has_reward_model else ""
        sources = (config.actor_source, actor), (scorer_source, scorer), (config.reference_model, reference)
        for source, shape in sources:
            if source and shape is None:
                raise UserError(
                    f"The size of {source} is not known without the hub; name a preset or a local model directory."
                )
        assert actor is not None
        dtype = DTYPES[cluster.device.precision if config.dtype == "auto" else config.dtype]
        calls = iteration_calls(rlhf, dtype)
        scorer = scorer if scorer_source else None
        return cls(config, graphs_of(config, calls, actor, scorer, dtype, cluster, reference), price, machine)

    @property
    def cluster(self) -> Cluster:
        return self.graphs.costs.cluster

    @property
    def workload(self) -> Workload:
        return self.graphs.costs.workload

    @cached_property
    def exact_graphs(self) -> AugmentedGraphs:
        """Graphs of the calls that run where training equals generation to the bit."""
        calls = iteration_calls(self.config.rlhf, DTYPES[self.workload.precision], is_exact=True)
        return AugmentedGraphs(replace(self.graphs.graph, calls=calls), self.graphs.costs)

    def expects_exactness(self, degree: int) -> bool:
        """Whether training would equal generation to the bit, if so many ranks generated together on this machine."""
        settings, dtype = self.config.rlhf, DTYPES[self.workload.precision]
        return self.machine is not None and expects_exactness(settings, dtype, self.machine.device, degree)

    def graphs_of(self, plan: Plan) -> AugmentedGraphs:
        """Graphs of the calls that run by the plan."""
        return self.exact_graphs if self.expects_exactness(plan[ACTOR_GENERATE.name].layout.tensor) else self.graphs

    def completed(self, plan: Plan) -> Plan:
        """The plan with a line for the actor's score call, which runs where training does not equal generation after
        all: with generation's weights, on as many samples at a time as in training."""
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

    def hours(self, estimate: Estimate) -> float:
        return estimate.iteration_seconds * self.config.rlhf.iterations / 3600

    def cost(self, estimate: Estimate) -> float | None:
        """All iterations, in the currency of the price."""
        return None if self.price is None else self.hours(estimate) * self.cluster.size * self.price

    def outcome(self, name: str, plan: Plan) -> PlanOutcome:
        """The plan with its estimate and what is wrong with it. Raises UserError where it cannot be costed."""
        graphs, why_not = self.graphs_of(plan), ""
        known = estimate(plan, graphs)
        try:
            Footprints(self.workload, graphs.graph).require_fit(plan, self.cluster)
        except UserError as error:
            why_not = str(error)
        refused = tuple(self.why_not_run(plan))
        fuses = self.config.rlhf.fusion.training in ("auto", "fused")
        fused = fused_training(plan, graphs) if fuses else None
        return PlanOutcome(name, known, why_not, refused, fused)

    def host_peak(self, plan: Plan) -> int:
        """Bytes of main memory of the fullest node, while models are loaded or later."""
        return Footprints(self.workload, self.graphs_of(plan).graph).host_peak(plan, self.cluster)


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
    """What is typed for `rlhf-chat plan`: `gpu` is a device in the list, this machine or a profile's YAML file,
    `network` Gbit/s; by default nodes have 8 GPUs, or as many as were measured together. Raises UserError."""
    given = {"reward_model": reward_model} if reward_model is not None else {}
    settings = settings_of_new_run(settings_for_model(model), config or [], overrides or [], given, None)
    machine = Machine.here() if gpu == THIS_MACHINE else None
    if gpu == THIS_MACHINE or gpu.endswith((".yaml", ".yml")):
        profile = read_profile(profile_file(gpus_per_node or 0) if gpu == THIS_MACHINE else Path(gpu))
        cluster = replace(profile.cluster, nodes=nodes, devices_per_node=gpus_per_node or profile.ranks)
    elif gpu in DEVICES:
        cluster = Cluster.named(gpu, nodes, gpus_per_node or DEVICES_PER_NODE).ours
    else:
        raise UserError(f"--gpu takes {', '.join(DEVICES)}, {THIS_MACHINE} or a profile's YAML file, not '{gpu}'.")
    return Request.of(settings, replace(cluster, network_bandwidth=network * 1e9 / 8), price, machine)
