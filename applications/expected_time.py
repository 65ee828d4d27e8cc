"""How long the steps of a run would take, by the planner's cost model: for the dry run."""

from dataclasses import dataclass, replace

from applications.fit import GIB, Outlook
from inference.errors import UserError
from training.plan import Plan
from training.planner.augmented import AugmentedGraphs
from training.planner.cost import CallCosts
from training.planner.estimate import estimate
from training.planner.graph import DataflowGraph
from training.planner.hardware import Cluster
from training.planner.machine import profile_file, read_profile
from training.planner.workload import Workload
from training.step3_rlhf.planned import PRECISIONS, graphs_of
from training.steps import Step

GPU_NAMES = {"H200": "h200", "H100": "h100", "A800": "a800-80g", "V100": "v100", "L40S": "l40s", "4090": "rtx-4090"}


@dataclass(frozen=True)
class ExpectedTime:
    """Of one optimiser step (with what a reference says of its rows) or one iteration, all rows as
    long as they may be."""

    seconds: float
    by_kind: dict[str, float]
    """Seconds of generating, scoring and training."""
    source: str
    """Where the rates come from."""


def expected_time(outlook: Outlook, step: Step) -> ExpectedTime | None:
    """None where no rates of this machine are known, a shape is missing, or the batch leaves ranks without work."""
    known = cluster_here(outlook)
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
    return ExpectedTime(found.iteration_seconds, by_kind, source)


def cluster_here(outlook: Outlook) -> tuple[Cluster, str] | None:
    """The ranks of the outlook, and where their rates come from: a profile, or the GPU's data sheet."""
    processes, nodes = outlook.config.processes, outlook.nodes
    file = profile_file(processes)
    if file.is_file():
        return replace(read_profile(file).cluster, nodes=nodes), "measured by `rlhf-chat profile`"
    for name, memory in outlook.machine.gpus[:1]:
        device = gpu_named(name, memory)
        if device is not None:
            cluster = Cluster.named(device, nodes, processes).ours
            return cluster, f"the data sheet of {device} and constants of A100 nodes"
    return None


def gpu_named(name: str, memory: int) -> str | None:
    """The planner's name of a GPU that calls itself `name`."""
    if "A100" in name:
        return "a100-80g" if memory > 60 * GIB else "a100-40g"
    return next((device for part, device in GPU_NAMES.items() if part in name), None)


def _ppo(outlook: Outlook, cluster: Cluster) -> tuple[AugmentedGraphs, Plan]:
    config, rlhf = outlook.config, outlook.config.rlhf
    assert outlook.actor is not None
    graphs = graphs_of(config, outlook.actor, outlook.scorer, outlook.dtype, cluster)
    return graphs, Plan.of(rlhf, outlook.ranks, outlook.length, graphs.graph.calls)


def _supervised(outlook: Outlook, step: Step, cluster: Cluster) -> tuple[AugmentedGraphs, Plan]:
    settings = outlook.config.supervised(step)
    graph, shape, optimizer = DataflowGraph.of(step.command), outlook.shape_of(step), settings.optimizer
    assert shape is not None
    data, rows = outlook.config.data, settings.batch_size * step.rows.answers
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
