"""Trial of a model: a forward pass shows which parts it consists of, and whether it can be cut between its layers.

The model has no memory: autograd alone sees what is computed from what.
"""

import copy
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from inference.families import backbone_of, text_config
from inference.generation.attention import PACKED_ATTENTION, Sequences, can_pack
from inference.private_surfaces import set_attention

TRIAL_LENGTHS = (1, 2)
"""Tokens of the sequences in a trial."""


class NoStages(ValueError):
    """A family cannot be cut; the message says why, in a phrase."""


@dataclass(frozen=True)
class Parts:
    """Names the modules that a model consists of."""

    stack: str
    """The list of its layers."""
    before: frozenset[str]
    """Modules outside of it that are needed before the first layer. All others come after the last one."""
    outputs: int
    """A layer gives so many values, the hidden states first; 0: it gives them alone."""


def parts_outside(model: nn.Module, stack: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the largest modules outside of the layers, whose list is called `stack`."""
    way = stack.split(".")
    for depth, step in enumerate(way):
        start = "".join(f"{name}." for name in way[:depth])
        for name, module in model.get_submodule(start[:-1]).named_children():
            if name != step:
                yield start + name, module


def without_values(model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return a whole model of the same shape on the meta device, and its backbone's inputs for a few tokens."""
    packs, config = can_pack(model), copy.deepcopy(model.config)
    with torch.device("meta"):
        with no_init_weights():
            built: Any = type(model)(config)
        shape = built.to(torch.bfloat16).eval()  # grouped products have no shapes in fp32
        for part in shape.modules():
            if isinstance(part, PreTrainedModel):  # ids without values hold no padding to warn of
                vars(part)["warn_if_padding_and_no_attention_mask"] = lambda *_: None
        set_attention(shape.config, PACKED_ATTENTION if packs else "eager")
        row = Sequences(TRIAL_LENGTHS)
        ids = torch.zeros(1, sum(TRIAL_LENGTHS), dtype=torch.long)
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        takes = inspect.signature(backbone_of(shape).forward).parameters
        if packs:
            inputs |= {"position_ids": row.positions(ids.device), "tokens": row}
        elif "position_ids" in takes:  # else it makes its own of a mask
            inputs |= {"attention_mask": torch.zeros(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bfloat16)}
    return shape, inputs


def watched(model: PreTrainedModel, inputs: dict[str, Any]) -> Parts:
    """Return the parts of a model as one forward pass shows them. Raises NoStages where it cannot be cut."""
    stack = stack_of(model)
    layers: Any = model.get_submodule(stack)
    outside = dict(parts_outside(model, stack))
    watch = LayerHooks(layers)
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


class LayerHooks:
    """Hooks into a stack of layers, which must each take the hidden states of the one before as they are, and nothing
    else that was computed with weights."""

    def __init__(self, layers: Iterable[nn.Module]):
        self.layers = list(layers)
        self.called, self.outputs = 0, 0
        self.before: set[int] = set()
        """Ids of the parameters that the first layer's input is computed from."""
        self.early: set[nn.Module] = set()
        """Other modules that were called before the first layer."""
        self._passed: Tensor | None = None

    def note(self, module: nn.Module, *_: Any) -> None:
        if self._passed is None:
            self.early.add(module)

    def enter(self, layer: nn.Module, values: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if self.called == len(self.layers) or layer is not self.layers[self.called]:
            raise NoStages("they do not call each layer once, in order")
        hidden = hidden_of(values, named)
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
    """Return the name of the list of a model's layers. Raises NoStages where there is none."""
    text: Any = text_config(model.config)
    decoder = backbone_of(model) if text is model.config else model.get_decoder()
    start = next((f"{name}." for name, module in model.named_modules() if name and module is decoder), "")
    for name, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == text.num_hidden_layers:
            return start + name
    raise NoStages("they have no list of layers")


def leaves(tensor: Tensor) -> set[int]:
    """Return the ids of the tensors that `tensor` was computed from, as autograd sees it."""
    nodes: list[Any] = [tensor.grad_fn] if tensor.grad_fn is not None else []
    ids = {id(tensor)} if tensor.requires_grad and not nodes else set()
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            ids.add(id(node.variable))
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                nodes.append(before)
    return ids


def hidden_of(values: tuple, named: dict[str, Any]) -> Tensor:
    return values[0] if values else named["hidden_states"]
