"""Models of transformers cut into pipeline stages: each has a run of the layers, and the family's own forward pass.

Layers of other stages become pass-throughs without parameters. The one before its run hands a stage what it has
received, and the one behind the run stores what it sends on, so that nothing else that a family does outside of its
layers matters. Which families can be cut is tried on a model of the same shape without memory.
"""

import re
from collections.abc import Callable, Collection, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from inference.errors import UserError
from inference.families import backbone_of, meta_model, text_config
from inference.tensor_parallel.shard import base_of
from inference.weights import read_weights
from training.hybrid_engine.layout import StageCut
from training.pipelines.stage_trial import NoStages, Parts, hidden_of, parts_outside, watched, without_values


class AbsentLayer(nn.Module):
    """Stands for a layer of another stage: hidden states pass through it, or those `handed` to it instead."""

    def __init__(self, layer: nn.Module, outputs: int):
        super().__init__()
        plain = {name: value for name, value in vars(layer).items() if isinstance(value, str | int | float)}
        vars(self).update({name: value for name, value in plain.items() if not name.startswith("_")})  # its kind
        self.outputs = outputs
        self.handed: Tensor | None = None
        self.passed: Tensor | None = None

    def forward(self, *values: Any, **named: Any) -> Any:
        hidden = hidden_of(values, named) if self.handed is None else self.handed
        self.passed = hidden
        return (hidden, *[None] * (self.outputs - 1)) if self.outputs else hidden


class AbsentPart(nn.Module):
    """Stands for a module of another stage outside of the layers; its outputs reach no layer here, and no one."""

    def __init__(self, gives_nothing: bool):
        super().__init__()
        self.gives_nothing = gives_nothing

    def forward(self, *values: Any, **named: Any) -> Tensor:
        value = next(value for value in (*values, *named.values()) if isinstance(value, Tensor))
        return value.new_zeros((), dtype=torch.float32) if self.gives_nothing else value


@dataclass(frozen=True)
class StageParts:
    """Says how a model was cut."""

    cut: StageCut
    stack: str
    whole_names: dict[str, str]
    """The names in the whole model of parameters that have another name there."""
    table: str | None
    """The parameter that first and last stage share."""


def stage_of(model: nn.Module) -> StageParts | None:
    """Return how `keep_stage` has cut a model; None for a whole one."""
    return vars(model).get("stage")


@contextmanager
def handing_over(model: nn.Module, received: Tensor | None) -> Iterator[list[Tensor]]:
    """Inside, a pass through a stage begins with `received`; the list holds what it sends on, once it is over."""
    sent: list[Tensor] = []
    stage = stage_of(model)
    if stage is None:
        yield sent
        return
    layers: Any = model.get_submodule(stage.stack)
    entry = None if stage.cut.is_first else layers[stage.cut.run.start - 1]
    way_out = None if stage.cut.is_last else layers[stage.cut.run.stop]
    if entry is not None:
        entry.handed = received
    try:
        yield sent
        if way_out is not None:
            sent.append(way_out.passed)
    finally:
        for layer in layers:
            if isinstance(layer, AbsentLayer):
                layer.handed = layer.passed = None


def sends_on(model: nn.Module) -> bool:
    """Whether it is a stage other than the last, whose outputs are hidden states for the next one."""
    stage = stage_of(model)
    return stage is not None and not stage.cut.is_last


def require_stages(model: PreTrainedModel | PreTrainedConfig, stages: int) -> None:
    """Raise UserError where a model of this configuration cannot be cut into so many stages."""
    config: Any = model if isinstance(model, PreTrainedConfig) else model.config
    layers = text_config(config).num_hidden_layers
    if stages > layers:
        raise UserError(
            f"A model of {layers} layers cannot be cut into {stages} pipeline stages: choose {layers} or less."
        )
    if stages > 1:
        parts_of(meta_model(config) if isinstance(model, PreTrainedConfig) else model)


def stages_of(model: PreTrainedModel, layers: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return the stages that hold each parameter of a whole model; `layers[i]` layers are on stage i.

    Only its structure is read. Raises UserError if it cannot be cut so.
    """
    require_cut(model, layers)
    if len(layers) == 1:
        return {name: (0,) for name, _ in model.named_parameters()}
    return holders(model, parts_of(model), layers)


def holders(model: PreTrainedModel, parts: Parts, layers: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Do as `stages_of`, for a model whose parts are known."""
    stages: dict[int, set[int]] = {}
    for stage in range(len(layers)):
        for module in held_modules(model, parts, StageCut(stage, layers)):
            for parameter in module.parameters():
                stages.setdefault(id(parameter), set()).add(stage)
    return {name: tuple(sorted(stages[id(parameter)])) for name, parameter in model.named_parameters()}


def keep_stage(model: PreTrainedModel, cut: StageCut) -> None:
    """Remove from a whole model, in place, all parameters that its stage does not hold; the others keep their names.

    LoRA layers are added before. Raises UserError if it cannot be cut so.
    """
    require_cut(model, cut.layers)
    if len(cut.layers) > 1:
        cut_out(model, parts_of(model), cut)


def cut_out(model: PreTrainedModel, parts: Parts, cut: StageCut) -> None:
    """Do as `keep_stage`, for a model whose parts are known."""
    whole_names = {id(parameter): name for name, parameter in model.named_parameters()}
    shared = {name for name, stages in holders(model, parts, cut.layers).items() if len(stages) > 1}
    leave_out(model, parts, set(held_modules(model, parts, cut)))
    held = {name: whole_names[id(parameter)] for name, parameter in model.named_parameters()}
    renamed = {name: whole for name, whole in held.items() if name != whole}
    table = next((name for name, whole in held.items() if whole in shared), None)
    vars(model)["stage"] = StageParts(cut, parts.stack, renamed, table)


def leave_out(model: PreTrainedModel, parts: Parts, held: Set[nn.Module]) -> None:
    """Replace all layers, and all parts with parameters, that are not `held`."""
    layers: Any = model.get_submodule(parts.stack)
    for number, layer in enumerate(layers):
        if layer not in held:
            layers[number] = AbsentLayer(layer, parts.outputs)
    for name, module in list(parts_outside(model, parts.stack)):
        if module not in held and next(module.parameters(), None) is not None:
            model.set_submodule(name, AbsentPart(isinstance(base_of(module), nn.Embedding)))


def held_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a stage, or of a whole model, by the whole model's names."""
    stage = stage_of(model)
    whole_names = stage.whole_names if stage else {}
    return {whole_names.get(name, name): parameter for name, parameter in model.named_parameters()}


def tied_table(model: nn.Module) -> nn.Parameter | None:
    """Return the table that the first and the last stage share, on those two."""
    stage = stage_of(model)
    return model.get_parameter(stage.table) if stage and stage.table else None


def require_cut(model: PreTrainedModel, layers: tuple[int, ...]) -> None:
    """Raise UserError where a whole model cannot be cut into stages of so many layers."""
    has = text_config(model.config).num_hidden_layers
    require_stages(model, len(layers))
    if sum(layers) != has or min(layers) < 1:
        raise UserError(
            f"Stages of {list(layers)} layers do not make up a model of {has} layers: give each of them 1 or more, "
            f"{has} in all."
        )


def held_by(model: PreTrainedModel, cut: StageCut) -> set[nn.Parameter]:
    """Return the parameters of a whole model that a stage holds."""
    stages = stages_of(model, cut.layers)
    return {parameter for name, parameter in model.named_parameters() if cut.stage in stages[name]}


def held_modules(model: PreTrainedModel, parts: Parts, cut: StageCut) -> Iterator[nn.Module]:
    """Yield what a stage has of a whole model: a run of its layers, and on the first and last one what is outside."""
    layers: Any = model.get_submodule(parts.stack)
    yield from (layers[number] for number in cut.run)
    for name, module in parts_outside(model, parts.stack):
        if cut.is_first if name in parts.before else cut.is_last:
            yield module


_PARTS: dict[tuple[type[nn.Module], str], Parts | str] = {}
"""The parts by class and configuration; a text says why the family cannot be cut."""
OF_NO_PART = re.compile(r'"(dtype|vocab_size|\w+_token_id)": .*')
"""Lines in which configurations of the same parts may differ."""


def parts_of(model: PreTrainedModel) -> Parts:
    """Return the parts of a whole model of two layers or more, LoRA included. Raises UserError if it cannot be cut."""
    config: Any = model.config
    shape = type(model), OF_NO_PART.sub("", config.to_json_string(use_diff=False))
    if shape not in _PARTS:
        try:
            _PARTS[shape] = tried(model)
        except NoStages as reason:
            _PARTS[shape] = str(reason)
        except Exception:  # a family may do anything, on tensors without values and with layers that are not there
            _PARTS[shape] = "their layers cannot be tried one without the others"
    parts = _PARTS[shape]
    if isinstance(parts, str):
        raise UserError(
            f"Models of type '{config.model_type}' cannot be cut into pipeline stages ({parts}): use pipeline degree 1."
        )
    return parts


def tried(model: PreTrainedModel) -> Parts:
    """Return what a forward pass through all layers shows of a family, whose last layer then runs alone.

    Raises NoStages where more than hidden states passes from layer to layer.
    """
    shape, inputs = without_values(model)
    with torch.device("meta"), torch.enable_grad():
        parts = watched(shape, inputs)
        text: Any = text_config(shape.config)
        cut_out(shape, parts, StageCut(1, (text.num_hidden_layers - 1, 1)))
        received = torch.zeros(*inputs.pop("input_ids").shape, text.hidden_size, dtype=shape.dtype)
        with handing_over(shape, received):
            backbone_of(shape)(inputs_embeds=received, **inputs)
    return parts


def read_stage(
    whole: PreTrainedModel,
    directory: Path,
    cut: StageCut,
    may_miss: Collection[str] = (),
    may_have: Callable[[str], bool] = lambda key: False,
    **options: Any,
) -> tuple[PreTrainedModel, set[str]]:
    """Give `whole` this stage's weights in place of its own; returns it, and which of `may_miss` were made up.

    `whole` may be on the meta device; its buffers are not. The rest as in `read_weights`. A head of scores is read, or
    made up, on every stage: so all of them draw the same random numbers.
    """
    require_cut(whole, cut.layers)
    parts = parts_of(whole)
    prefix = f"{whole.base_model_prefix}."
    names = {name for key in whole.state_dict() for name in (key, key.removeprefix(prefix))}
    stage, made_up = read_weights(
        stage_class(whole, parts, cut),
        directory,
        may_miss=may_miss,
        may_have=lambda key: key in names or may_have(key),
        config=whole.config,
        **options,
    )
    for name, value in (*stage.named_parameters(remove_duplicate=False), *stage.named_buffers(remove_duplicate=False)):
        module, _, leaf = name.rpartition(".")
        setattr(whole.get_submodule(module), leaf, value)
    return whole, made_up


def stage_class(whole: PreTrainedModel, parts: Parts, cut: StageCut) -> type[PreTrainedModel]:
    """Make a class of the family whose models have one stage's parameters from the start: no others are searched."""
    family: Any = type(whole)
    always = {"score"}
    if cut.is_first or cut.is_last:  # both modules of a tied table, whichever the files know
        of_stages = holders(whole, parts, cut.layers)
        shared = {whole.get_parameter(name) for name, stages in of_stages.items() if len(stages) > 1}
        always |= {name for name, m in parts_outside(whole, parts.stack) if not shared.isdisjoint(m.parameters())}

    def __init__(self: Any, config: Any, *values: Any, **named: Any) -> None:
        family.__init__(self, config, *values, **named)
        held = {*held_modules(self, parts, cut)}
        held |= {module for name, module in parts_outside(self, parts.stack) if name in always}
        leave_out(self, parts, held)
        names = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        tied = self.all_tied_weights_keys.items()
        self.all_tied_weights_keys = {name: other for name, other in tied if {name, other} <= names}

    return type(family.__name__, (family,), {"__init__": __init__, "__module__": family.__module__})
