"""What the planner is told of step 3: its calls (do old log-probabilities cost one?), its models, its samples."""

from pathlib import Path

import torch

from inference.errors import UserError
from training.calls import ACTOR_GENERATE, Call, DataflowGraph, with_recomputed_logprobs
from training.config import RunConfig
from training.plan import from_blocks, slots
from training.plan_checks import problems, unrunnable
from training.planner.cost import CallCosts
from training.planner.footprint import DTYPES
from training.planner.hardware import Cluster
from training.planner.reallocation_cost import AugmentedGraphs
from training.planner.workload import Precision, Workload
from training.private_surfaces import multiplies_bf16
from training.rlhf_settings import RLHFSettings
from training.run_directory import read_json
from training.shape import Shape


def expects_exactness(settings: RLHFSettings, dtype: torch.dtype, device: torch.device, degree: int = 0) -> bool:
    """Whether a run tries to be exact: everywhere if asked to, else where it costs nothing, in bf16 on a CPU that
    multiplies it. `degree` ranks generate together; 0: as many as the settings say."""
    if settings.exact != "auto":
        return settings.exact
    on_cpu = device.type == "cpu" and (degree or generation_degree(settings)) == 1
    return on_cpu and dtype == torch.bfloat16 and multiplies_bf16()


def generation_degree(settings: RLHFSettings) -> int:
    """Return how many ranks generate together."""
    planned = settings.plan.get(ACTOR_GENERATE.name)
    return settings.generation_tensor_parallel if planned is None else planned.get("tensor", 1)


def keeps_generation_logprobs(settings: RLHFSettings, dtype: torch.dtype, is_exact: bool) -> bool:
    """Whether the old log-probabilities of PPO are those of generation; else the actor scores too. `is_exact` says that
    training gives the same, to the bit."""
    whole_distribution = settings.min_response_tokens == 0
    return settings.old_logprobs == "generation" or (
        settings.old_logprobs == "auto" and (dtype == torch.float32 or is_exact) and whole_distribution
    )


def iteration_calls(settings: RLHFSettings, dtype: torch.dtype, is_exact: bool = False) -> tuple[Call, ...]:
    """Return the calls of an iteration in a number format, which the planner plans too. `is_exact` is as in
    `keeps_generation_logprobs`; a run that is asked to be so is, or does not start."""
    keeps = keeps_generation_logprobs(settings, dtype, is_exact or settings.exact is True)
    return settings.calls if keeps else with_recomputed_logprobs(settings.calls)


PRECISIONS: dict[torch.dtype, Precision] = {dtype: name for name, dtype in DTYPES.items()}


def graphs_of(
    config: RunConfig,
    calls: tuple[Call, ...],
    actor: Shape,
    scorer: Shape | None,
    dtype: torch.dtype,
    cluster: Cluster,
    reference: Shape | None = None,
) -> AugmentedGraphs:
    """Return the graphs of plans for an iteration of `calls`; every response is as long as allowed. `scorer` is reward
    model and critic, `reference` that of the settings' own.

    Iterations do not overlap: all ranks get the results of each.
    """
    graph = DataflowGraph(calls, iterations_overlap=False)
    return AugmentedGraphs(graph, CallCosts(workload_of(config, actor, scorer, dtype, reference), cluster))


def require_plan_to_fuse(config: RunConfig) -> None:
    """Raise UserError for settings without a plan that ask for fused training."""
    if config.rlhf.fusion.training == "fused":
        raise UserError(
            "rlhf.fusion.training=fused weaves actor and critic that train in pipeline stages, and only a plan has "
            "these: give one with --plan, or use auto."
        )


def require_runnable(
    config: RunConfig,
    ranks: int,
    actor: Shape | None,
    scorer: Shape | None,
    dtype: torch.dtype,
    reference: Shape | None = None,
) -> None:
    """Raise UserError where so many ranks cannot run the plan of the settings, or fused training has none; the first
    problem is its sentence. A shape that is None is not judged."""
    if not config.rlhf.plan:
        return require_plan_to_fuse(config)
    graph, plan = DataflowGraph(iteration_calls(config.rlhf, dtype)), from_blocks(config.rlhf.plan)
    workload = workload_of(config, actor, scorer, dtype, reference)
    sentences = problems(plan, graph, workload, ranks) or unrunnable(plan, graph, workload, config.rlhf, ranks)
    if sentence := next(iter(sentences), ""):
        raise UserError(f"rlhf.plan cannot run on {ranks} process{'es' * (ranks > 1)}: {sentence}")


def shape_of(directory: Path) -> Shape:
    """Read that of the model in a directory. Raises UserError where its config.json cannot be read."""
    return Shape.from_config_values(read_json(directory / "config.json", "fetch or train the model again"))


def workload_of(
    config: RunConfig,
    actor: Shape | None,
    scorer: Shape | None,
    dtype: torch.dtype,
    reference: Shape | None = None,
) -> Workload:
    """Return an iteration of these settings. `reference` is that of the settings' own; None: as the actor's."""
    rlhf, data = config.rlhf, config.data
    shapes = {"actor": actor, "reference": reference or actor, "critic": scorer, "reward": scorer}
    return Workload.of(
        {role: shape for role, shape in shapes.items() if shape is not None},
        samples=rlhf.prompts_per_iteration * rlhf.samples_per_prompt,
        prompt_tokens=data.max_prompt_tokens,
        response_tokens=data.max_response_tokens,
        mini_batches=rlhf.mini_batches,
        epochs=rlhf.ppo_epochs,
        precision=PRECISIONS[dtype],
        checkpointing=rlhf.actor.gradient_checkpointing,
        lora={"actor": rlhf.actor.lora, "critic": rlhf.critic.lora},
        generation_batch=slots(rlhf),
        own_reference=bool(config.reference_model),
    )
