"""`rlhf-chat plan`: where each call of an iteration runs best, how long that takes, what it costs. Starts nothing."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from applications.commands import resolve_settings
from applications.fit import find_shape, scorer_source
from inference.errors import UserError
from training.config import RunConfig
from training.memory import Shape
from training.planner.augmented import AugmentedGraphs
from training.planner.cost import CallCosts
from training.planner.estimate import Estimate, estimate
from training.planner.footprint import Footprints
from training.planner.graph import DataflowGraph
from training.planner.hardware import Cluster
from training.planner.heuristics import deepspeed_chat_plan, megatron_plan
from training.planner.plan import Plan, problems
from training.planner.plan_file import read_plan, to_yaml
from training.planner.search import Progress, search
from training.planner.table import PlanTable
from training.planner.workload import Precision, Workload


@dataclass(frozen=True)
class Request:
    """What is to be planned."""

    config: RunConfig
    graphs: AugmentedGraphs
    price: float | None
    """Of one GPU for one hour, in any currency."""

    @property
    def cluster(self) -> Cluster:
        return self.graphs.costs.cluster

    @property
    def workload(self) -> Workload:
        return self.graphs.costs.workload

    def hours(self, found: Estimate) -> float:
        """Of all iterations of the run."""
        return found.iteration_seconds * self.config.rlhf.iterations / 3600

    def cost(self, found: Estimate) -> float | None:
        """Of all iterations, in the currency of the price."""
        return None if self.price is None else self.hours(found) * self.cluster.size * self.price

    def overfull(self, found: Estimate) -> str:
        """Why the plan does not fit, a sentence; '' if it does."""
        try:
            Footprints(self.workload, self.graphs.graph).require_fit(found.plan, self.cluster)
        except UserError as error:
            return str(error)
        return ""


@dataclass(frozen=True)
class Outcome:
    """One plan by its name: what is known of it, or why there is none."""

    name: str
    found: Estimate | None
    why_not: str = ""


def plan_command(
    model: str,
    reward_model: str | None,
    nodes: int,
    gpus_per_node: int,
    gpu: str,
    network: float,
    price: float | None,
    config: list[Path] | None,
    overrides: list[str] | None,
    seed: int,
    effort: float,
    json_output: bool,
    out: Path | None,
    check: Path | None,
    svg: Path | None,
) -> None:
    """`rlhf-chat plan`. Raises UserError for what cannot be planned and for a plan file that is not valid."""
    from applications import plan_report

    request = make_request(model, reward_model, nodes, gpus_per_node, gpu, network, price, config, overrides)
    if check is not None:
        outcomes = [checked(request, check)]
    else:
        outcomes = [searched(request, seed, effort, None if json_output else plan_report.progress), *compared(request)]
    if json_output:
        print(plan_report.as_json(request, outcomes))
    else:
        print(plan_report.as_text(request, outcomes))
    best = outcomes[0].found
    assert best is not None
    for file, text in ((out, to_yaml(best.plan)), (svg, plan_report.as_svg(outcomes) if svg else "")):
        if file is not None:
            write(file, text)


def write(file: Path, text: str) -> None:
    try:
        file.write_text(text)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}); name a file in a directory of yours.") from error


def make_request(
    model: str,
    reward_model: str | None,
    nodes: int,
    gpus_per_node: int,
    gpu: str,
    network: float,
    price: float | None,
    config: list[Path] | None,
    overrides: list[str] | None,
) -> Request:
    settings = resolve_settings(model, config, overrides, {"reward_model": reward_model})
    assert settings is not None
    workload = workload_of(settings, "fp16" if gpu == "v100" else "bf16")
    cluster = replace(Cluster.named(gpu, nodes, gpus_per_node), network_bandwidth=network * 1e9 / 8)
    # that constant is of ReaLHF's runtime, in which one process serves every call; ours has none
    cluster = replace(cluster, calibration=replace(cluster.calibration, controller_seconds=0.0))
    return Request(settings, AugmentedGraphs(DataflowGraph.of("ppo"), CallCosts(workload, cluster)), price)


def workload_of(config: RunConfig, default: Precision) -> Workload:
    """One iteration of step 3; every response as long as it may be."""
    actor = require_shape(config.sft_model or config.model, config.architecture.get("model"))
    scorer = require_shape(scorer_source(config), config.architecture.get("reward_model"))
    rlhf, data = config.rlhf, config.data
    precision: Precision = default if config.dtype == "auto" else config.dtype
    return Workload.of(
        {"actor": actor, "reference": actor, "critic": scorer, "reward": scorer},
        samples=rlhf.prompts_per_iteration * rlhf.samples_per_prompt,
        prompt_tokens=data.max_prompt_tokens,
        response_tokens=data.max_response_tokens,
        mini_batches=rlhf.mini_batches,
        epochs=rlhf.ppo_epochs,
        precision=precision,
        checkpointing=rlhf.actor.gradient_checkpointing,
    )


def require_shape(model: str, given: dict[str, Any] | None) -> Shape:
    shape = find_shape(model, given)
    if shape is None:
        raise UserError(f"The size of {model} is not known without the hub; name a preset or a local model directory.")
    return shape


def searched(request: Request, seed: int, effort: float, progress: Callable[[Progress], bool] | None) -> Outcome:
    found = search(PlanTable(request.graphs), seed, effort, progress)
    return Outcome("searched", estimate(found[0].plan, request.graphs))


def compared(request: Request) -> list[Outcome]:
    """What people use without a search."""
    makers: dict[str, Callable[[], Plan]] = {
        "DeepSpeed-Chat": lambda: deepspeed_chat_plan(request.graphs.graph, request.workload, request.cluster),
        "Megatron-style": lambda: megatron_plan(request.graphs.graph, request.cluster),
    }
    outcomes = []
    for name, make in makers.items():
        try:
            found = estimate(make(), request.graphs)
            outcomes.append(Outcome(name, found, request.overfull(found)))
        except UserError as error:
            outcomes.append(Outcome(name, None, str(error)))
    return outcomes


def checked(request: Request, file: Path) -> Outcome:
    """A plan from a file. Raises UserError with all that is wrong with it."""
    plan = read_plan(file)
    found = problems(plan, request.graphs.graph, request.workload, request.cluster)
    if found:
        raise UserError(" ".join(found))
    costed = estimate(plan, request.graphs)
    if why := request.overfull(costed):
        raise UserError(why)
    return Outcome(file.name, costed)
