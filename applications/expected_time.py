"""How long the steps of a run would take, by the planner's cost model: for the dry run."""

from collections.abc import Mapping
from dataclasses import dataclass

from applications.fit import Outlook
from inference.errors import UserError
from training.plan import Plan
from training.planner.augmented import AugmentedGraphs
from training.planner.cost import CallCosts
from training.planner.estimate import estimate
from training.planner.graph import DataflowGraph
from training.planner.hardware import Cluster
from training.planner.machine import cluster_here
from training.planner.workload import Workload
from training.step3_rlhf.planned import PRECISIONS, graphs_of
from training.steps import ANSWERS, Step


@dataclass(frozen=True)
class ExpectedTime:
    """Of one optimiser step (with what a reference says of its rows) or one iteration, all rows as
    long as they may be."""

    seconds: float
    by_kind: dict[str, float]
    """Seconds of generating, scoring and training."""
    evaluations: float
    """Seconds of all evaluations of a step that draws samples: those on the way and the comparison at the end."""
    source: str
    """Where the rates come from."""


def expected_time(outlook: Outlook, step: Step) -> ExpectedTime | None:
    """None where no rates of this machine are known, a shape is missing, or the batch leaves ranks without work."""
    known = cluster_here(outlook.config.processes, outlook.nodes, outlook.machine.gpus[:1])
    if known is None or outlook.memory(step) is None:
        return None
    cluster, source = known
    try:
        graphs, plan = _ppo(outlook, cluster) if step.draws_samples else _supervised(outlook, step, cluster)
        found = estimate(plan, graphs)
    except UserError:
        return None
    by_kind: dict[str, float] = {}
    for node in found.nodes:
        by_kind[node.call.kind] = by_kind.get(node.call.kind, 0.0) + node.seconds
    return ExpectedTime(found.iteration_seconds, by_kind, _evaluations(outlook, step, by_kind), source)


def _evaluations(outlook: Outlook, step: Step, by_kind: Mapping[str, float]) -> float:
    """As many answers as they ask for, each drawn and scored in the time of a sample of an iteration."""
    if not step.draws_samples:
        return 0.0
    rlhf = outlook.config.rlhf
    answers = rlhf.evaluations * rlhf.eval_prompts + 2 * outlook.config.evaluation.prompts
    seconds = sum(by_kind.get(kind, 0.0) for kind in ("generate", "score"))
    return seconds * answers / (rlhf.prompts_per_iteration * rlhf.samples_per_prompt)


def _ppo(outlook: Outlook, cluster: Cluster) -> tuple[AugmentedGraphs, Plan]:
    assert outlook.actor is not None
    shapes = outlook.actor, outlook.scorer
    graphs = graphs_of(outlook.config, outlook.calls, *shapes, outlook.dtype, cluster, outlook.reference)
    return graphs, outlook.plan


def _supervised(outlook: Outlook, step: Step, cluster: Cluster) -> tuple[AugmentedGraphs, Plan]:
    settings = outlook.config.supervised(step)
    algorithm = "kto" if outlook.config.rows_of(step) is ANSWERS else step.command
    graph, shape, optimizer = DataflowGraph.of(algorithm), outlook.shape_of(step), settings.optimizer
    assert shape is not None
    data, rows = outlook.config.data, settings.batch_size * outlook.config.rows_of(step).answers
    workload = Workload.of(
        dict.fromkeys(graph.roles, shape),
        rows,
        data.max_prompt_tokens,
        data.max_response_tokens,
        mini_batches=1,
        precision=PRECISIONS[outlook.dtype],
        checkpointing=optimizer.gradient_checkpointing,
        lora=dict.fromkeys(graph.trained_roles, optimizer.lora),
    )
    graphs = AugmentedGraphs(graph, CallCosts(workload, cluster))
    stage, tokens = optimizer.zero_stage, settings.micro_batch_tokens
    return graphs, Plan.of_rows(graph.calls, outlook.ranks, rows, outlook.length, stage, tokens)
