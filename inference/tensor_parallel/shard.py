"""Which part of a whole tensor a rank keeps, and the layers that compute with parts."""

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inference.errors import UserError
from inference.private_surfaces import HOOKS, put_plain_parameters, whole_shape
from inference.tensor_parallel.cuts import Heads, Kind, check_divides, cut_layers, no_plan


@dataclass(frozen=True)
class TensorParallel:
    """Which part of the model this rank holds: the `rank`-th of `size`. Without a group it is alone with all of it."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over the ranks, the same bits on each; `partial` is overwritten."""
        if self.group is not None:
            dist.all_reduce(partial, group=self.group)
        return partial

    def join_last(self, part: Tensor) -> Tensor:
        """(..., n) on each rank -> (..., size * n), in rank order, the same bits on each."""
        if self.group is None:
            return part
        parts = part.new_empty(self.size, *part.shape)
        dist.all_gather(list(parts.unbind(0)), part.contiguous(), group=self.group)
        return parts.movedim(0, -2).flatten(-2)


def join_groups(groups: Sequence[Sequence[int]]) -> TensorParallel | None:
    """The part of this process in one of `groups` (global ranks), or None if it is in none.

    Every process of the world calls it with the same groups.
    """
    rank, own = dist.get_rank(), None
    for ranks in groups:
        group = cast(dist.ProcessGroup, dist.new_group(list(ranks))) if len(ranks) > 1 else None
        if rank in ranks:
            own = TensorParallel(list(ranks).index(rank), len(ranks), group)
    return own


class RowParallel(nn.Module):
    """A linear layer cut over its inputs: partial sums are added up over the ranks, then the bias is added once.

    `partial` may be a peft LoRA layer: base and adapter are summed before they travel.
    """

    def __init__(self, partial: nn.Module, bias: nn.Parameter | None, tensor_parallel: TensorParallel):
        super().__init__()
        self.partial, self.bias, self.tensor_parallel = partial, bias, tensor_parallel

    def forward(self, inputs: Tensor) -> Tensor:  # (..., inputs / size) -> (..., outputs)
        outputs = self.tensor_parallel.sum(self.partial(inputs))
        return outputs if self.bias is None else outputs + self.bias


class PartialConv1D(nn.Module):
    """GPT-2's linear layer, whose weight is (inputs, outputs), without its bias."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight


class VocabularyEmbedding(nn.Module):
    """An embedding cut over the vocabulary: a rank answers for its tokens, the others for theirs."""

    def __init__(self, part: nn.Module, vocabulary: int, tensor_parallel: TensorParallel):
        super().__init__()
        self.part, self.num_embeddings, self.tensor_parallel = part, vocabulary, tensor_parallel
        self.rows = -(-vocabulary // tensor_parallel.size)
        self.first = tensor_parallel.rank * self.rows

    @property
    def weight(self) -> Any:
        return self.part.weight

    def forward(self, ids: Tensor) -> Tensor:
        local = ids - self.first
        elsewhere = (local < 0) | (local >= self.rows)
        rows = self.part(local.masked_fill(elsewhere, 0))
        return self.tensor_parallel.sum(rows.masked_fill(elsewhere[..., None], 0.0))


class VocabularyHead(nn.Module):
    """An output head cut over the vocabulary; every rank gets all logits, without the padding."""

    def __init__(self, part: nn.Module, vocabulary: int, tensor_parallel: TensorParallel):
        super().__init__()
        self.part, self.out_features, self.tensor_parallel = part, vocabulary, tensor_parallel

    @property
    def weight(self) -> Any:
        return self.part.weight

    def forward(self, hidden: Tensor) -> Tensor:  # (..., hidden) -> (..., vocabulary)
        return self.tensor_parallel.join_last(self.part(hidden))[..., : self.out_features]


class LocalAlibi:
    """A forward pre-hook for BLOOM's attention: of the slopes of all heads it passes on those of the local heads."""

    def __init__(self, heads: int, tensor_parallel: TensorParallel):
        self.heads = heads
        self.first = tensor_parallel.rank * heads // tensor_parallel.size
        self.count = heads // tensor_parallel.size

    def __call__(self, module: nn.Module, inputs: tuple, keywords: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        whole = keywords["alibi"].unflatten(0, (-1, self.heads))  # (rows, heads, 1, keys)
        return inputs, {**keywords, "alibi": whole.narrow(1, self.first, self.count).flatten(0, 1)}


@dataclass(frozen=True)
class Cut:
    """Keeps `ranges` (start, length) of dimension `dim`, one behind the other, then `padding` zeros."""

    dim: int
    ranges: tuple[tuple[int, int], ...]
    padding: int = 0

    @property
    def length(self) -> int:
        return sum(length for _, length in self.ranges) + self.padding

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        return (*whole[: self.dim], self.length, *whole[self.dim + 1 :])

    def __call__(self, whole: Tensor) -> Tensor:
        """The part of `whole`: a view where it lies in one piece."""
        parts = [whole.narrow(self.dim, start, length) for start, length in self.ranges]
        if self.padding:
            shape = (*whole.shape[: self.dim], self.padding, *whole.shape[self.dim + 1 :])
            parts.append(whole.new_zeros(shape))
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)


def even(total: int, rank: int, size: int, blocks: int = 1) -> tuple[tuple[int, int], ...]:
    """The ranges of rank `rank` of `size` where each of `blocks` equal blocks of `total` is cut evenly."""
    block = total // blocks
    part = block // size
    return tuple((start * block + rank * part, part) for start in range(blocks))


def rows_of(total: int, rank: int, size: int) -> tuple[tuple[tuple[int, int], ...], int]:
    """Ranges and padding of rank `rank`'s part of a vocabulary of `total`, padded up to a multiple of `size`."""
    part = -(-total // size)
    start = min(rank * part, total)
    length = min(part, total - start)
    return ((start, length),), part - length


_QUERY_HEADS = ("num_heads", "num_attention_heads", "n_head")
_WIDTHS = ("split_size", "embed_dim", "hidden_size", "all_head_size")


@dataclass(frozen=True)
class ShardParameter:
    """A parameter of a shard: the `cut` (None: all) of the whole model's parameter `name`."""

    name: str
    local: nn.Parameter
    cut: Cut | None


def empty_shard(
    model: nn.Module, tensor_parallel: TensorParallel, device: torch.device | None = None
) -> tuple[nn.Module, list[ShardParameter]]:
    """This rank's part of `model` (of transformers, perhaps with LoRA layers), its parameters uninitialised.

    The part has the forward pass of the family, gives the whole model's logits or scores, and has no gradients.
    `device` is where its parameters lie (default: where the model's are). Raises UserError if the model cannot be cut.
    """
    cuts = cuts_of(model, tensor_parallel)
    parameters, memo = [], {}
    for name, parameter in model.named_parameters():
        cut = cuts.get(id(parameter))
        shape = whole_shape(parameter)
        local = torch.empty(
            shape if cut is None else cut.shape(shape), dtype=parameter.dtype, device=device or parameter.device
        )
        memo[id(parameter)] = nn.Parameter(local, requires_grad=False)
        parameters.append(ShardParameter(name, memo[id(parameter)], cut))
    shard = copy_structure(model, memo).eval()
    if tensor_parallel.size > 1:
        install_layers(shard, cut_layers(model), tensor_parallel)
    return shard, parameters


def copy_structure(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy with other parameters (`memo`: id of the old -> new) and without hooks, which hold the engine."""
    hooks = [(module, {name: getattr(module, name) for name in HOOKS}) for module in model.modules()]
    for module, own_hooks in hooks:
        vars(module).update({name: type(hook)() for name, hook in own_hooks.items()})
    try:
        copied = copy.deepcopy(model, memo)
    finally:
        for module, own_hooks in hooks:
            vars(module).update(own_hooks)
    for module in copied.modules():
        put_plain_parameters(module)
    return copied


def cuts_of(model: nn.Module, tensor_parallel: TensorParallel) -> dict[int, Cut]:
    """The cut of each parameter that is not whole, by the parameter's id (tied parameters are one).

    Raises UserError if the model cannot be cut.
    """
    rank, size = tensor_parallel.rank, tensor_parallel.size
    cuts: dict[int, Cut] = {}
    if size == 1:
        return cuts
    check_divides(model.config, size)
    heads = Heads.of(model.config)
    for name, kind in cut_layers(model).items():
        layer = model.get_submodule(name)
        inputs, outputs = features(base_of(layer))
        blocks = 3 if kind == "qkv" else 1
        if (inputs if kind == "row" else outputs // blocks) % size and kind != "key_value":
            raise no_plan(model.config, f"{name} does not divide by {size}")
        if kind == "key_value" and outputs != heads.key_value * heads.size:
            raise no_plan(model.config, f"{name} holds more than key or value heads")
        if kind == "row":
            cuts.update(layer_cuts(name, layer, even(inputs, rank, size), by_input=True))
        elif kind == "key_value":
            ranges = tuple((head * heads.size, heads.size) for head in heads.local_keys(rank, size))
            cuts.update(layer_cuts(name, layer, ranges))
        else:
            cuts.update(layer_cuts(name, layer, even(outputs, rank, size, blocks)))
    for table in filter(None, vocabulary_tables(model)):
        layer = model.get_submodule(table)
        ranges, padding = rows_of(vocabulary_of(layer), rank, size)
        cuts.update(layer_cuts(table, layer, ranges, padding))
    return cuts


def layer_cuts(
    name: str, layer: nn.Module, ranges: tuple[tuple[int, int], ...], padding: int = 0, by_input: bool = False
) -> Iterator[tuple[int, Cut]]:
    """Cuts of a linear layer's or embedding's parameters that keep `ranges` of its outputs, or of its inputs.

    A LoRA adapter is B A: cut by outputs A stays whole, cut by inputs B does.
    """
    transposed = type(base_of(layer)).__name__ == "Conv1D"
    for parameter_name, parameter in layer.named_parameters():
        match parameter_name.removeprefix("base_layer.").split("."):
            case ["weight"]:
                yield id(parameter), Cut(1 if by_input != transposed else 0, ranges, padding)
            case ["bias"]:
                if not by_input:
                    yield id(parameter), Cut(0, ranges, padding)
            case ["lora_A", _, "weight"]:
                if by_input:
                    yield id(parameter), Cut(1, ranges)
            case ["lora_B", _, "weight"]:
                if not by_input:
                    yield id(parameter), Cut(0, ranges, padding)
            case _:
                raise UserError(
                    f"The adapter of {name} has a part that cannot be cut over ranks ({parameter_name}); "
                    f"use tensor-parallel degree 1 or plain LoRA on linear layers."
                )


def base_of(layer: nn.Module) -> nn.Module:
    """The layer under a LoRA layer."""
    return getattr(layer, "base_layer", layer)


def features(layer: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer or a Conv1D."""
    return (layer.nx, layer.nf) if hasattr(layer, "nf") else (layer.in_features, layer.out_features)


def vocabulary_of(table: nn.Module) -> int:
    base: Any = base_of(table)
    return base.num_embeddings if hasattr(base, "num_embeddings") else base.out_features


def vocabulary_tables(model: Any) -> tuple[str, str | None]:
    """Names of the input embedding and of the output head; a scorer has none."""
    names = {id(module): name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    return names[id(model.get_input_embeddings())], None if head is None else names[id(head)]


def install_layers(shard: nn.Module, layers: dict[str, Kind], tensor_parallel: TensorParallel) -> None:
    """Make the cut layers work together: sums over ranks, local numbers of heads, local ALiBi slopes."""
    heads = Heads.of(shard.config)
    embedding_name, head_name = vocabulary_tables(shard)
    attention = set()
    for name, kind in layers.items():
        layer = shard.get_submodule(name)
        parent = shard.get_submodule(name.rpartition(".")[0])
        if any(hasattr(parent, attribute) for attribute in ("head_dim", "head_size", *_QUERY_HEADS)):
            attention.add(parent)
        if kind == "row":
            shard.set_submodule(name, row_parallel(layer, tensor_parallel))
        else:
            set_outputs(base_of(layer))
    for module in attention:
        count_local_heads(module, heads, tensor_parallel)
    embedding: Any = shard.get_submodule(embedding_name)
    vocabulary = vocabulary_of(embedding)
    embedding.num_embeddings = embedding.weight.shape[0]
    embedding.padding_idx = None  # it counts in whole rows, and only gradients care
    shard.set_submodule(embedding_name, VocabularyEmbedding(embedding, vocabulary, tensor_parallel))
    if head_name is not None:
        head = shard.get_submodule(head_name)
        vocabulary = vocabulary_of(head)
        set_outputs(base_of(head))
        shard.set_submodule(head_name, VocabularyHead(head, vocabulary, tensor_parallel))


def row_parallel(layer: Any, tensor_parallel: TensorParallel) -> RowParallel:
    base: Any = base_of(layer)
    bias, base.bias = base.bias, None
    if not hasattr(base, "nf"):
        base.in_features = base.weight.shape[1]
    elif hasattr(layer, "base_layer"):
        layer.base_layer = PartialConv1D(base.weight)
    else:
        layer = PartialConv1D(base.weight)
    return RowParallel(layer, bias, tensor_parallel)


def set_outputs(layer: Any) -> None:
    """Let a layer know how many outputs it has now."""
    if hasattr(layer, "nf"):
        layer.nf = layer.weight.shape[1]
    else:
        layer.out_features = layer.weight.shape[0]


def count_local_heads(attention: Any, heads: Heads, tensor_parallel: TensorParallel) -> None:
    """Set the numbers that an attention module of any family keeps of its heads."""
    query = heads.query // tensor_parallel.size
    key_value = len(heads.local_keys(tensor_parallel.rank, tensor_parallel.size))
    local = dict.fromkeys(_QUERY_HEADS, query) | dict.fromkeys(_WIDTHS, query * heads.size)
    local |= {"num_key_value_heads": key_value, "num_key_value_groups": query // key_value}
    for name, value in local.items():
        if hasattr(attention, name):
            setattr(attention, name, value)
    if "alibi" in inspect.signature(attention.forward).parameters:
        attention.register_forward_pre_hook(LocalAlibi(heads.query, tensor_parallel), with_kwargs=True)
    if hasattr(attention, "slow_but_exact"):
        attention.slow_but_exact = False  # BLOOM's other way of adding up the same sum reads the whole weight
