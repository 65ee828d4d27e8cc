"""What is refused before anything trains: settings that do not fit the models."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from inference.errors import UserError
from inference.families import longest_text, text_config
from inference.tensor_parallel.cuts import check_divides, cut_layers
from training.calls import role_of
from training.config import RunConfig
from training.data_settings import DataSettings
from training.hybrid_engine.layout import Layout
from training.models.loading import resolve_dtype, scorer_config
from training.models.policy import add_lora, require_lora_layers
from training.pipelines.stage_model import stages_of
from training.plan import Plan
from training.rlhf_settings import RLHFSettings
from training.role_settings import LoRASettings
from training.shape import Shape
from training.step3_rlhf.planned import iteration_calls, require_plan_to_fuse, require_runnable
from training.steps import METHODS


def require_processes(config: RunConfig, processes: int) -> None:
    """Raise UserError where settings do not fit as many processes as a launcher started, on all nodes together."""
    try:
        config.require_work_for(processes)
    except ValueError as error:
        raise UserError(f"{processes} processes were started, and {error}.") from None


def require_fitting(
    config: RunConfig, processes: int, actor: Path, scorer: Path | None, reference: Path | None = None
) -> None:
    """Raise UserError where settings do not fit the actor, the scorer (reward model and critic) or an own reference."""
    if reference is not None:
        require_positions(config.reference_model, reference, config.data)
    require_positions(config.sft_model or config.model, actor, config.data)
    if scorer is not None:
        require_positions(config.trained_reward_model or config.reward_model_source, scorer, config.data)
    if config.method == "ppo":
        require_actor_learns(config.rlhf)
        require_layouts(config, processes, actor, scorer, reference)
        require_plan(config, processes, actor, scorer, reference)
    require_adapters(config, actor, scorer)


def require_actor_learns(settings: RLHFSettings) -> None:
    """Raise UserError where the critic's warm-up takes all iterations: what step 3 leaves would be the SFT model."""
    if settings.critic_warmup >= settings.iterations:
        raise UserError(
            f"rlhf.critic_warmup={settings.critic_warmup} leaves none of rlhf.iterations={settings.iterations} in "
            f"which the actor learns; give more iterations, or rlhf.critic_warmup={settings.iterations // 10}."
        )


def require_positions(name: str, directory: Path, settings: DataSettings) -> None:
    """Raise UserError where a prompt and its response may be longer than what the model `name` was made for.

    Learned positions end there with an error of the table, rotary ones with nonsense.
    """
    config, needed = read_model_config(directory), settings.max_prompt_tokens + settings.max_response_tokens
    has = longest_text(config) if config is not None else 0
    if 0 < has < needed:
        response = min(settings.max_response_tokens, has // 2)
        raise UserError(
            f"data.max_prompt_tokens={settings.max_prompt_tokens} and data.max_response_tokens="
            f"{settings.max_response_tokens} are {needed} tokens together, and {name} has {has} positions: lower them, "
            f"for example to {has - response} and {response}, or choose a model with more."
        )


def require_layouts(
    config: RunConfig, processes: int, actor: Path, scorer: Path | None, reference: Path | None = None
) -> None:
    """Raise UserError where a model of step 3 cannot be cut as asked for."""
    if config.rlhf.plan:  # it says how they are cut
        return
    degrees = config.rlhf.scoring_tensor_parallel
    asked = [
        ("generation_tensor_parallel", actor, config.rlhf.generation_tensor_parallel),
        ("scoring_tensor_parallel.reference", reference or actor, degrees.reference),
    ]
    if scorer is not None:
        asked += [
            ("scoring_tensor_parallel.reward", scorer, degrees.reward),
            ("scoring_tensor_parallel.critic", scorer, degrees.critic),
        ]
    for name, model, tensor in asked:
        setting = f"rlhf.{name}"
        Layout.over(processes, tensor, setting=setting)
        require_cut(model, tensor, f"{setting}={tensor}")


def require_cut(model: Path, tensor: int, asked: str) -> None:
    """Raise UserError where a model cannot be cut into so many tensor-parallel parts as was `asked`."""
    if tensor == 1:
        return
    config_of_model = AutoConfig.from_pretrained(model, local_files_only=True)
    try:
        check_divides(config_of_model, tensor)
        with torch.device("meta"):
            cut_layers(AutoModelForCausalLM.from_config(config_of_model))
    except UserError as error:
        raise UserError(f"{asked}: {error}") from None


def require_plan(
    config: RunConfig, processes: int, actor: Path, scorer: Path | None, reference: Path | None = None
) -> None:
    """Raise UserError where rlhf.plan does not fit the calls, the models or the ranks."""
    if not config.rlhf.plan:
        return require_plan_to_fuse(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = resolve_dtype(config.dtype, device)
    of_actor = AutoConfig.from_pretrained(actor, local_files_only=True)
    of_scorer = scorer_config(scorer, config.scorer_layers) if scorer else None
    of_reference = AutoConfig.from_pretrained(reference or actor, local_files_only=True)
    shapes = Shape.of(of_actor), Shape.of(of_scorer) if of_scorer else None
    require_runnable(config, processes, *shapes, dtype, Shape.of(of_reference))
    plan = Plan.of(config.rlhf, processes, config.data.longest, iteration_calls(config.rlhf, dtype))
    for name, assignment in plan.assignments.items():
        model = {"actor": actor, "reference": reference or actor}.get(role_of(name), scorer)
        assert model is not None
        require_cut(model, assignment.layout.tensor, f"{name} of rlhf.plan")
    for role, loader, values in (
        ("actor", AutoModelForCausalLM, of_actor),
        ("critic", AutoModelForSequenceClassification, of_scorer),
    ):
        trained = plan.assignments.get(f"{role}_train")
        if trained and trained.layout.pipeline > 1:
            require_adapted_stages(role, loader, values, trained.layout, getattr(config.rlhf, role).lora)


def require_adapted_stages(role: str, loader: Any, config: Any, layout: Layout, lora: LoRASettings) -> None:
    """Raise UserError where the LoRA targets of a role that trains in pipeline stages leave a stage without any."""
    if not lora.rank or lora.targets == "all-linear":
        return
    key = f"rlhf.{role}.lora.targets"
    with torch.device("meta"):
        model = loader.from_config(config)
        require_lora_layers(model, lora, key)
        add_lora(model, lora)
    runs = layout.runs(text_config(config).num_hidden_layers)
    holders = stages_of(model, runs)
    adapted = {stage for name, weight in model.named_parameters() if weight.requires_grad for stage in holders[name]}
    if idle := sorted(set(range(len(runs))) - adapted):
        raise UserError(
            f"{key}={lora.targets} names no layer of stage {idle[0] + 1} of the {len(runs)} in which {role}_train of "
            f"rlhf.plan trains: adapt layers of all stages, or choose fewer."
        )


def require_adapters(config: RunConfig, actor: Path, scorer: Path | None) -> None:
    """Raise UserError where the LoRA targets of a role that the run's method trains name no layer of its model."""
    of_actor: dict[str, LoRASettings] = {}
    of_scorer: dict[str, LoRASettings] = {}
    for step in METHODS[config.method]:
        if step.draws_samples:
            of_actor["rlhf.actor"], of_scorer["rlhf.critic"] = config.rlhf.actor.lora, config.rlhf.critic.lora
        else:
            roles = of_scorer if step.leaves_scorer else of_actor
            roles[f"{step.command}.optimizer"] = config.supervised(step).optimizer.lora
    for loader, directory, roles in (
        (AutoModelForCausalLM, actor, of_actor),
        (AutoModelForSequenceClassification, scorer, of_scorer),
    ):
        named = {role: lora for role, lora in roles.items() if lora.rank and lora.targets != "all-linear"}
        values = read_model_config(directory) if directory is not None and named else None
        if values is None:
            continue
        with torch.device("meta"):
            model = loader.from_config(values)
        for role, lora in named.items():
            require_lora_layers(model, lora, f"{role}.lora.targets")


def read_model_config(directory: Path) -> PretrainedConfig | None:
    """None where there is none that can be read: what is wrong with the directory, loading it says."""
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError):
        return None
