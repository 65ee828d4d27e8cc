"""Plans without a search, which a searched one has to beat."""

from inference.errors import UserError
from training.hybrid_engine.layout import Layout
from training.plan import Assignment, Plan
from training.planner.footprint import Footprints
from training.planner.graph import DataflowGraph
from training.planner.hardware import Cluster
from training.planner.workload import Workload


def megatron_plan(graph: DataflowGraph, cluster: Cluster) -> Plan:
    """Every call on the whole cluster: tensor-parallel in a node, a pipeline over nodes, frozen roles offloaded.

    ReaLHF's baseline ("heuristic"): 2 x stages micro-batches in training, else one a stage.
    """
    tensor, stages = cluster.devices_per_node, cluster.nodes
    layout = Layout(tuple(range(cluster.size)), 1, tensor, stages)
    assignments = {}
    for call in graph.calls:
        micro_batches = 2 * stages if call.kind == "train" and stages > 1 else stages
        is_frozen = graph.training_call(call.role) is None
        assignments[call.name] = Assignment(layout, micro_batches, offload=is_frozen)
    return Plan(assignments)


def deepspeed_chat_plan(graph: DataflowGraph, workload: Workload, cluster: Cluster) -> Plan:
    """Every call on all ranks, weights divided by ZeRO 3, generation tensor-parallel in the smallest groups that fit.

    Micro-batches are as large as memory allows. Raises UserError where no such plan fits.
    """
    if workload.mini_batch_samples < cluster.size:
        raise UserError(
            f"An optimiser step of {workload.mini_batch_samples} samples leaves some of {cluster.size} ranks idle; "
            f"take fewer mini-batches or more samples."
        )
    for tensor in range(1, cluster.devices_per_node + 1):
        if cluster.devices_per_node % tensor == 0:
            plan = _with_largest_micro_batches(_divided_plan(graph, cluster, tensor), graph, workload, cluster)
            if plan is not None:
                return plan
    raise UserError(
        f"No plan in which all {cluster.size} ranks run every call fits into {cluster.device.name}; "
        f"take more or larger devices, or plan with a search."
    )


def _divided_plan(graph: DataflowGraph, cluster: Cluster, tensor: int) -> Plan:
    return Plan(
        {
            call.name: Assignment(Layout.over(cluster.size, tensor) if call.kind == "generate" else divided)
            for divided in [Layout.over(cluster.size, zero_stage=3)]
            for call in graph.calls
        }
    )


def _with_largest_micro_batches(plan: Plan, graph: DataflowGraph, workload: Workload, cluster: Cluster) -> Plan | None:
    """None where a call does not fit even sample by sample, or leaves ranks without a sample."""
    footprints = Footprints(workload, graph)
    held = max(memory.held("device") for memory in footprints.by_rank(plan).values())
    chosen = {}
    for call in graph.calls:
        layout, has_own = plan[call.name].layout, footprints.has_own_weights(call, plan)
        for micro_batches in range(1, workload.rows(call.kind) // layout.data + 1):
            assignment = Assignment(layout, micro_batches)
            parts = footprints.parts(call, assignment, has_own)
            working = sum(part.bytes for part in parts if part.phase and part.place == "device")
            if held + working <= cluster.usable_memory:
                chosen[call.name] = assignment
                break
        else:
            return None
    return Plan(chosen)
