"""What keeps a plan from running: anywhere (`problems`), or in our own runtime (`unrunnable`); a sentence each."""

import difflib

from inference.errors import UserError
from training.calls import ACTOR_SCORE, Call, DataflowGraph
from training.hybrid_engine.layout import Layout
from training.pipelines.orders import CannotFuse, Pipelines, devices
from training.plan import Assignment, Plan
from training.planner.workload import Workload
from training.rlhf_settings import RLHFSettings
from training.role_settings import misplaced
from training.shape import Shape


def problems(plan: Plan, graph: DataflowGraph, workload: Workload, ranks: int) -> list[str]:
    """List what keeps `plan` from running, a sentence each; memory apart. Empty for a valid plan.

    A line for the actor's score call may be there unused. A model that the workload lacks is not judged.
    """
    names = [call.name for call in graph.calls]
    missing = [name for name in names if name not in plan.assignments]
    reasons = [f"The plan has no line for the call '{name}'; add one." for name in missing]
    for name in plan.assignments:
        if name not in (*names, ACTOR_SCORE.name):
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"the calls are {', '.join(names)}."
            reasons.append(f"There is no call '{name}': {hint}")
    for call in graph.calls:
        if call.name in plan.assignments:
            is_frozen = graph.training_call(call.role) is None
            reasons += _problems_of(call, plan[call.name], is_frozen, workload, ranks)
    return reasons


def unrunnable(plan: Plan, graph: DataflowGraph, workload: Workload, settings: RLHFSettings, ranks: int) -> list[str]:
    """List what keeps step 3 from running a plan that has no `problems`, call by call. Empty where it runs."""
    by_call = (cannot_run(call, plan[call.name], workload, settings, ranks) for call in graph.calls)
    reasons = [reason for of_call in by_call for reason in of_call]
    return reasons + (_against_fusing(plan, graph) if settings.fusion.training == "fused" else [])


def cannot_run(call: Call, assignment: Assignment, workload: Workload, settings: RLHFSettings, ranks: int) -> list[str]:
    """List what keeps step 3 from running a call so, whatever the others do."""
    layout, name = assignment.layout, call.name
    reasons = _against_stages(call, layout, workload) if layout.pipeline > 1 else []
    if call.kind == "train" and layout.tensor > 1:
        reasons.append(f"{name} is tensor-parallel, which training cannot be yet; use data and a zero_stage.")
    if call.kind == "generate" and layout.zero_stage:
        reasons.append(f"{name} has a zero_stage, and generation needs its weights whole or tensor-parallel; use 0.")
    if call.kind == "score" and layout.zero_stage == 3 and layout.tensor > 1:
        reasons.append(f"{name} divides its weights twice, tensor-parallel and by ZeRO stage 3; choose one.")
    slots = assignment.together(settings.prompts_per_iteration * settings.samples_per_prompt)
    if call.kind == "generate" and settings.fusion.rows > slots:
        reasons.append(f"rlhf.fusion.rows={settings.fusion.rows} is more than the {slots} slots of {name}; lower it.")
    is_whole = layout.mesh == tuple(range(ranks)) and (call.kind == "generate" or layout.is_whole)
    is_whole &= not assignment.offload
    if settings.fusion.mode == "inter" and call.kind != "train" and not is_whole:
        reasons.append(
            f"rlhf.fusion.mode=inter needs generation on all ranks and roles that score whole on each of them, "
            f"which {name} is not; use auto or none."
        )
    if settings.exact is True and call.kind == "generate" and layout.tensor > 1:
        reasons.append(f"{name} is tensor-parallel, which rlhf.exact=true cannot be; use data, or rlhf.exact=auto.")
    offload = getattr(settings, call.role).offload
    if call.kind == "train" and (problem := misplaced(offload, layout.zero_stage)):
        reasons.append(f"{name} has zero_stage {layout.zero_stage}, and rlhf.{call.role}.{problem}.")
    return reasons


def _against_fusing(plan: Plan, graph: DataflowGraph) -> list[str]:
    layouts = {call.role: plan[call.name].layout for call in graph.calls if call.kind == "train"}
    reason = ""
    try:
        devices({role: Pipelines.of(layout, 1) for role, layout in layouts.items()})
    except CannotFuse as error:
        reason = str(error)
    if all(layout.pipeline == 1 for layout in layouts.values()):
        reason = "it cuts no call that trains into stages"
    return [f"rlhf.fusion.training=fused: {reason}; change the plan, or use auto."] if reason else []


def _against_stages(call: Call, layout: Layout, workload: Workload) -> list[str]:
    has = f"{call.name} has {layout.pipeline} pipeline stages"
    if call.kind == "generate":
        return [f"{has}, and generation needs its weights whole or tensor-parallel; use data or tensor."]
    reasons = []
    if call.kind == "score" and layout.tensor > 1:
        reasons.append(f"{has}, each of them tensor-parallel, which does not run; choose one.")
    if workload.precision == "fp16":
        reasons.append(f"{has}, which do not run in fp16, whose loss is scaled; use --set dtype=bf16 or pipeline 1.")
    if (model := workload.models.get(call.role)) and model.shape.why_no_stages:
        reasons.append(f"{has}. {model.shape.why_no_stages}")
    return reasons


def require_valid(plan: Plan, graph: DataflowGraph, workload: Workload, ranks: int) -> None:
    """Raise UserError with the first problem."""
    if reasons := problems(plan, graph, workload, ranks):
        raise UserError(reasons[0])


def _problems_of(call: Call, assignment: Assignment, is_frozen: bool, workload: Workload, ranks: int) -> list[str]:
    layout, name = assignment.layout, call.name
    reasons = []
    if outside := [rank for rank in layout.mesh if not 0 <= rank < ranks]:
        reasons.append(
            f"{name} uses rank {outside[-1]}, but the cluster has ranks 0 to {ranks - 1}; name others, or go without a "
            f"plan (--set rlhf.plan=)."
        )
    if model := workload.models.get(call.role):
        reasons += _problems_of_cut(name, layout, model.shape)
    if assignment.micro_batches < 1:
        reasons.append(f"{name} has {assignment.micro_batches} micro-batches; give 1 or more.")
    rows, parts = workload.rows(call.kind), layout.data * assignment.micro_batches
    if rows < parts:
        reasons.append(
            f"{name} divides {rows} samples by data {layout.data} x micro_batches {assignment.micro_batches}, "
            f"which leaves ranks without work; lower one of the two."
        )
    if layout.zero_stage >= 2 and layout.pipeline > 1:
        reasons.append(
            f"{name} joins ZeRO stage {layout.zero_stage} with a pipeline; use ZeRO stage 0 or 1, or pipeline 1."
        )
    if call.kind != "train" and layout.zero_stage in (1, 2):
        reasons.append(
            f"{name} has no optimiser states to divide; set its zero_stage to 0 (or 3 to divide the weights)."
        )
    if assignment.offload and not is_frozen:
        reasons.append(f"{name} offloads weights that are trained; only frozen roles can wait in host memory.")
    return reasons


def _problems_of_cut(name: str, layout: Layout, shape: Shape) -> list[str]:
    reasons = []
    if shape.heads % layout.tensor:
        reasons.append(
            f"{name} cuts {shape.heads} attention heads into {layout.tensor} parts; choose a divisor for tensor."
        )
    elif shape.ffn % layout.tensor:
        reasons.append(f"{name} cuts a feed-forward width of {shape.ffn} into {layout.tensor} parts; choose a divisor.")
    if layout.pipeline > shape.layers:
        reasons.append(f"{name} cuts {shape.layers} layers into {layout.pipeline} pipeline stages; choose fewer.")
    elif layout.layers and sum(layout.layers) != shape.layers:
        reasons.append(
            f"{name} has stages of {list(layout.layers)} layers, {sum(layout.layers)} together, of a model of "
            f"{shape.layers}; give numbers that add up to that, or leave layers out."
        )
    return reasons
