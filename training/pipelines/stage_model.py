"""A model of transformers cut into pipeline stages: each has a run of its layers, and the family's own forward pass.

Layers of other stages become pass-throughs without parameters. In the one before its run a stage is handed what it has
received, and the one behind the run keeps what it sends on, so that nothing else that a family does outside of its
layers matters to it. Which families can be cut so is tried on a model of the same shape without memory.
"""

import copy
import inspect
import re
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from inference.errors import UserError
from inference.families import backbone_of, meta_model, text_config
from inference.generation.attention import PACKED_ATTENTION, Sequences, can_pack
from inference.private_surfaces import set_attention
from inference.tensor_parallel.shard import base_of
from training.pipelines.cut import StageCut

TRIAL_LENGTHS = (1, 2)
"""Of the sequences in a trial."""


class NoStages(ValueError):
    """Why a family cannot be cut."""


@dataclass(frozen=True)
class Parts:
    """What a model consists of, by the names of its modules."""

    stack: str
    """The list of its layers."""
    before: frozenset[str]
    """Those outside of it that are needed before the first layer. All others come after the last one."""
    outputs: int
    """A layer gives so many values, the hidden states first; 0: it gives them alone."""


class AbsentLayer(nn.Module):
    """A layer that another stage has: hidden states pass through it, or those that were `handed` to it instead."""

    def __init__(self, layer: nn.Module, outputs: int):
        super().__init__()
        plain = {name: value for name, value in vars(layer).items() if isinstance(value, str | int | float)}
        vars(self).update({name: value for name, value in plain.items() if not name.startswith("_")})  # its kind
        self.outputs = outputs
        self.handed: Tensor | None = None
        self.passed: Tensor | None = None

    def forward(self, *values: Any, **named: Any) -> Any:
        hidden = _hidden(values, named) if self.handed is None else self.handed
        self.passed = hidden
        return (hidden, *[None] * (self.outputs - 1)) if self.outputs else hidden


class AbsentPart(nn.Module):
    """A module outside of the layers that another stage has; what it gives here reaches no layer and no one."""

    def __init__(self, gives_nothing: bool):
        super().__init__()
        self.gives_nothing = gives_nothing

    def forward(self, *values: Any, **named: Any) -> Tensor:
        value = next(value for value in (*values, *named.values()) if isinstance(value, Tensor))
        return value.new_zeros((), dtype=torch.float32) if self.gives_nothing else value


@dataclass(frozen=True)
class StageParts:
    """What a cut model says of itself."""

    cut: StageCut
    stack: str
    whole_names: dict[str, str]
    """Of parameters that have another name in the whole model."""
    table: str | None
    """The parameter that first and last stage share."""


def stage_of(model: nn.Module) -> StageParts | None:
    """What `keep_stage` has left of a model; None of a whole one."""
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
    """Whether it is a stage but the last: what it gives are hidden states for the next one."""
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
    """For each parameter of a whole model the stages that hold it; `layers[i]` layers are on stage i.

    Only its structure is read. Raises UserError if it cannot be cut so.
    """
    require_cut(model, layers)
    if len(layers) == 1:
        return {name: (0,) for name, _ in model.named_parameters()}
    return holders(model, parts_of(model), layers)


def holders(model: PreTrainedModel, parts: Parts, layers: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """`stages_of`, of a model whose parts are known."""
    found: dict[int, set[int]] = {}
    for stage in range(len(layers)):
        for module in held_modules(model, parts, StageCut(stage, layers)):
            for parameter in module.parameters():
                found.setdefault(id(parameter), set()).add(stage)
    return {name: tuple(sorted(found[id(parameter)])) for name, parameter in model.named_parameters()}


def keep_stage(model: PreTrainedModel, cut: StageCut) -> None:
    """Take from a whole model, in place, all parameters that its stage does not hold; the others keep their names.

    LoRA layers are in it before. Raises UserError if it cannot be cut so.
    """
    require_cut(model, cut.layers)
    if len(cut.layers) > 1:
        cut_out(model, parts_of(model), cut)


def cut_out(model: PreTrainedModel, parts: Parts, cut: StageCut) -> None:
    """`keep_stage`, of a model whose parts are known."""
    whole_names = {id(parameter): name for name, parameter in model.named_parameters()}
    shared = {name for name, stages in holders(model, parts, cut.layers).items() if len(stages) > 1}
    leave_out(model, parts, set(held_modules(model, parts, cut)))
    held = {name: whole_names[id(parameter)] for name, parameter in model.named_parameters()}
    renamed = {name: whole for name, whole in held.items() if name != whole}
    table = next((name for name, whole in held.items() if whole in shared), None)
    vars(model)["stage"] = StageParts(cut, parts.stack, renamed, table)


def leave_out(model: PreTrainedModel, parts: Parts, kept: Set[nn.Module]) -> None:
    """Put absent ones in the places of all layers, and of all parts with parameters, that are not kept."""
    layers: Any = model.get_submodule(parts.stack)
    for number, layer in enumerate(layers):
        if layer not in kept:
            layers[number] = AbsentLayer(layer, parts.outputs)
    for name, module in list(parts_outside(model, parts.stack)):
        if module not in kept and next(module.parameters(), None) is not None:
            model.set_submodule(name, AbsentPart(isinstance(base_of(module), nn.Embedding)))


def held_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a stage, or of a whole model, by the whole model's names."""
    stage = stage_of(model)
    whole_names = stage.whole_names if stage else {}
    return {whole_names.get(name, name): parameter for name, parameter in model.named_parameters()}


def tied_table(model: nn.Module) -> nn.Parameter | None:
    """The table that the first and the last stage share, on those two."""
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
    """The parameters of a whole model that a stage holds."""
    stages = stages_of(model, cut.layers)
    return {parameter for name, parameter in model.named_parameters() if cut.stage in stages[name]}


def held_modules(model: PreTrainedModel, parts: Parts, cut: StageCut) -> Iterator[nn.Module]:
    """What a stage has of a whole model: a run of its layers, and on the first and last one what is outside of them."""
    layers: Any = model.get_submodule(parts.stack)
    yield from (layers[number] for number in cut.run)
    for name, module in parts_outside(model, parts.stack):
        if cut.is_first if name in parts.before else cut.is_last:
            yield module


def parts_outside(model: nn.Module, stack: str) -> Iterator[tuple[str, nn.Module]]:
    """The largest modules that have nothing of the layers, whose list is called `stack`."""
    way = stack.split(".")
    for depth, step in enumerate(way):
        start = "".join(f"{name}." for name in way[:depth])
        for name, module in model.get_submodule(start[:-1]).named_children():
            if name != step:
                yield start + name, module


_PARTS: dict[tuple[type[nn.Module], str], Parts | str] = {}
"""By class and configuration; a text says why the family cannot be cut."""
OF_NO_PART = re.compile(r'"(dtype|vocab_size|\w+_token_id)": .*')
"""What a configuration may say otherwise of the same parts."""


def parts_of(model: PreTrainedModel) -> Parts:
    """The parts of a whole model of at least two layers, perhaps with LoRA. Raises UserError if it cannot be cut."""
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
    """What a forward pass through all layers shows of a family, and whether its last layers then run alone.

    Raises NoStages where more passes from layer to layer than hidden states.
    """
    packs, config = can_pack(model), copy.deepcopy(model.config)
    with torch.device("meta"), torch.enable_grad():
        with no_init_weights():
            built: Any = type(model)(config)
        shape = built.to(torch.bfloat16).eval()  # grouped products have no shapes in fp32
        for part in shape.modules():
            if isinstance(part, PreTrainedModel):  # ids without values hold no padding to warn of
                vars(part)["warn_if_padding_and_no_attention_mask"] = lambda *_: None
        set_attention(shape.config, PACKED_ATTENTION if packs else "eager")
        row = Sequences(TRIAL_LENGTHS)
        ids = torch.zeros(1, sum(TRIAL_LENGTHS), dtype=torch.long)
        inputs: dict[str, Any] = {"use_cache": False}
        if packs:
            inputs |= {"position_ids": row.positions(ids.device), "tokens": row}
        elif (
            "position_ids" in inspect.signature(backbone_of(shape).forward).parameters
        ):  # else it makes its own of a mask
            inputs |= {"attention_mask": torch.zeros(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bfloat16)}
        parts = watched(shape, {"input_ids": ids, **inputs})
        last = StageCut(1, (len(shape.get_submodule(parts.stack)) - 1, 1))
        cut_out(shape, parts, last)
        received = torch.zeros(*ids.shape, text_config(config).hidden_size, dtype=torch.bfloat16)
        with handing_over(shape, received):
            backbone_of(shape)(inputs_embeds=received, **inputs)
    return parts


def watched(model: Any, inputs: dict[str, Any]) -> Parts:
    """What one forward pass shows of a model's parts."""
    stack = stack_of(model)
    layers, outside = model.get_submodule(stack), dict(parts_outside(model, stack))
    watch = Watch(layers)
    hooks = [layer.register_forward_pre_hook(watch.enter, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(watch.leave) for layer in layers]
    hooks += [module.register_forward_hook(watch.note) for module in outside.values()]
    last = backbone_of(model)(**inputs).last_hidden_state
    for hook in hooks:
        hook.remove()
    if watch.called < len(layers):
        raise NoStages("they do not call each layer once, in order")
    if watch.before & leaves(last):
        raise NoStages("weights are used before their layers and behind them")
    if set(model.parameters()) - {p for module in (layers, *outside.values()) for p in module.parameters()}:
        raise NoStages("some of their weights are in no layer")
    used = {name for name, module in outside.items() if not watch.before.isdisjoint(map(id, module.parameters()))}
    early = {name for name, module in outside.items() if module in watch.early}  # some let all pass where there is text
    return Parts(stack, frozenset(used | early), watch.outputs)


class Watch:
    """Hooks of a stack of layers: each must take the hidden states of the one before as they are, and nothing else that
    was made with weights."""

    def __init__(self, layers: Iterable[nn.Module]):
        self.layers = list(layers)
        self.called, self.outputs = 0, 0
        self.before: set[int] = set()
        """Ids of the parameters that the first layer's input is made of."""
        self.early: set[nn.Module] = set()
        """Other modules that were called before the first layer."""
        self._passed: Tensor | None = None

    def note(self, module: nn.Module, *_: Any) -> None:
        if self._passed is None:
            self.early.add(module)

    def enter(self, layer: nn.Module, values: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if self.called == len(self.layers) or layer is not self.layers[self.called]:
            raise NoStages("they do not call each layer once, in order")
        hidden = _hidden(values, named)
        if self._passed is None:
            self.before = leaves(hidden)
            self._passed = hidden.detach().requires_grad_()
        elif hidden is not self._passed:
            raise NoStages("something is done between their layers")
        return ((self._passed, *values[1:]), named) if values else (values, {**named, "hidden_states": self._passed})

    def leave(self, layer: nn.Module, _: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if leaves(hidden) - {id(self._passed), *(id(parameter) for parameter in layer.parameters())}:
            raise NoStages("more passes from layer to layer than hidden states")
        if hidden.dtype != next(layer.parameters()).dtype:
            raise NoStages("their hidden states are kept in another number format than the weights")
        self.called += 1
        self._passed = hidden.detach().requires_grad_()
        if not isinstance(output, tuple):
            return self._passed
        self.outputs = len(output)
        return (self._passed, *[None] * (len(output) - 1))


def stack_of(model: PreTrainedModel) -> str:
    """The name of the list of a model's layers. Raises NoStages where there is none."""
    text: Any = text_config(model.config)
    decoder = backbone_of(model) if text is model.config else model.get_decoder()
    start = next((f"{name}." for name, module in model.named_modules() if name and module is decoder), "")
    for name, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == text.num_hidden_layers:
            return start + name
    raise NoStages("they have no list of layers")


def leaves(tensor: Tensor) -> set[int]:
    """Ids of the tensors that one was made of, as autograd sees it."""
    nodes: list[Any] = [tensor.grad_fn] if tensor.grad_fn is not None else []
    found = {id(tensor)} if tensor.requires_grad and not nodes else set()
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                nodes.append(before)
    return found


def _hidden(values: tuple, named: dict[str, Any]) -> Tensor:
    return values[0] if values else named["hidden_states"]
