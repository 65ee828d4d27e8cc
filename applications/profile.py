"""`rlhf-chat profile`: measures this machine, so that `rlhf-chat plan --gpu this-machine` can plan for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from applications.export import write_text
from applications.fit import Machine, Outlook
from applications.launch import run_on_ranks
from inference.errors import UserError, typed
from training.calls import DataflowGraph
from training.metrics import size
from training.plan import Plan
from training.planner.cost import CallCosts
from training.planner.hardware import ACHIEVED_BANDWIDTH, Cluster, MachineProfile, cluster_here, profile_file
from training.planner.reallocation_cost import AugmentedGraphs
from training.planner.search import estimate
from training.planner.workload import Workload
from training.step3_rlhf.planned import PRECISIONS, graphs_of
from training.steps import ANSWERS, Step


def profile_command(processes: int | None, out: Path | None) -> None:
    """Raises UserError for more processes than GPUs, or cores where there are none."""
    machine = Machine.here()
    ranks = processes or len(machine.gpus) or 1
    machine.require_room(ranks)
    if not machine.gpus and ranks > machine.cores:
        raise UserError(
            f"{ranks} processes would wait for each other on {machine.cores} cores: use --processes {machine.cores} at "
            "most."
        )
    files = [out] if out is not None else [profile_file(ranks), profile_file()]
    print(describe(measure_to(files, ranks)))
    target = "this-machine" if out is None else typed(out)
    print(f"\nWritten to {files[0]}; plan with: rlhf-chat plan --gpu {target} --gpus-per-node {ranks} --model ...")


def measure_to(files: Sequence[Path], ranks: int) -> MachineProfile:
    """What this machine reaches with so many ranks, also written to `files`."""
    print(f"Measuring with {ranks} process{'es' * (ranks > 1)}; other work spoils the figures.", flush=True)
    import training.planner.profile as script

    profile = MachineProfile.from_values(run_on_ranks(script.__file__, [], ranks, "measurement"))
    for file in files:
        write_text(file, profile.to_yaml())
    return profile


def describe(profile: MachineProfile) -> str:
    """A line a figure, of one rank."""
    device, calibration = profile.device, profile.calibration
    rates = ", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in device.peak_flops.items())
    lines = [
        f"{'machine':<22}{profile.measured_on.get('processor', '')}; {profile.ranks} ranks at the same time",
        f"{'memory':<22}{size(device.memory)} a rank",
        f"{'matrix products':<22}{rates} Tflop/s",
        f"{'memory bandwidth':<22}{device.memory_bandwidth * ACHIEVED_BANDWIDTH / 1e9:.1f} GB/s",
        f"{'link':<22}{device.link_bandwidth * ACHIEVED_BANDWIDTH / 1e9:.2f} GB/s",
        f"{'layers reach':<22}{calibration.compute_share:.0%} of the matrix products' rate",
        f"{'launching a layer':<22}{calibration.launch_seconds * 1e6:.0f} us",
        f"{'... to decode a token':<22}{calibration.decode_seconds * 1e6:.0f} us",
    ]
    if profile.ranks > 1:
        lines.append(f"{'a collective':<22}{calibration.collective_seconds * 1e6:.0f} us over two ranks")
        lines.append(f"{'... to decode a token':<22}{calibration.decode_collective * 1e6:.0f} us")
    if isfinite(calibration.copy_bandwidth):
        shares = (
            f"all-gather {calibration.gather_share:.0%}, reduce-scatter {calibration.scatter_share:.0%} of the link"
        )
        lines.append(f"{'ZeRO':<22}{shares}; new memory {calibration.copy_bandwidth / 1e9:.2f} GB/s")
        lines.append(f"{'... around a layer':<22}{calibration.hook_seconds * 1e6:.0f} us a pass under ZeRO 3")
    return "\n".join(lines)


@dataclass(frozen=True)
class ExpectedTime:
    """What one optimiser step (with the reference's part) or one iteration takes, all rows as long as they may be."""

    seconds: float
    by_kind: dict[str, float]
    """Seconds of generating, scoring and training."""
    evaluations: float
    """Seconds of evaluations on the way and of the comparison at the end, where the step draws samples."""
    source: str
    """Where the rates come from."""


def expected_time(outlook: Outlook, step: Step) -> ExpectedTime | None:
    """None where no rates of this machine are known, a shape is missing, or the batch leaves ranks without work."""
    known = cluster_here(outlook.config.processes, 1, outlook.machine.gpus[:1])
    if known is None or outlook.memory(step) is None:
        return None
    cluster, source = known
    try:
        graphs, plan = _ppo(outlook, cluster) if step.draws_samples else _supervised(outlook, step, cluster)
        estimated = estimate(plan, graphs)
    except UserError:
        return None
    by_kind: dict[str, float] = {}
    for node in estimated.nodes:
        by_kind[node.call.kind] = by_kind.get(node.call.kind, 0.0) + node.seconds
    return ExpectedTime(estimated.iteration_seconds, by_kind, _evaluations(outlook, step, by_kind), source)


def _evaluations(outlook: Outlook, step: Step, by_kind: Mapping[str, float]) -> float:
    """Seconds of all evaluations: an answer is drawn and scored in the time of a sample of an iteration."""
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
    return graphs, Plan.of_rows(graph.calls, outlook.ranks, rows, data.longest, stage, tokens)
