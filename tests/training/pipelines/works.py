"""Stages of small models for the executor, and random orders."""

import copy
import random
from collections.abc import Callable, Mapping

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from training.data.batching import TokenBatch
from training.hybrid_engine.layout import StageCut
from training.models.policy import Policy, Scorer, hidden_shape
from training.pipelines.executor import PipelineWork
from training.pipelines.orders import Operation, Orders, Pipelines, timeline
from training.pipelines.stage_model import held_weights, keep_stage
from training.planner.schedules.problem import BACKWARD, FORWARD

WIDTH = 6


class Layer(torch.nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)

    def forward(self, hidden):
        return torch.tanh(torch.nn.functional.linear(hidden, self.weight, self.bias))


class Layers:
    """A role: layers in stages, and for each pipeline micro-batches of unlike lengths. Equal seeds give equal roles."""

    def __init__(self, pipelines: Pipelines, seed: int, each: int = 1):
        self.pipelines, self.each = pipelines, each
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape):
            return torch.randn(*shape, generator=generator)

        self.layers = [Layer(drawn(WIDTH, WIDTH), drawn(WIDTH)) for _ in range(each * pipelines.stages)]
        self.inputs = [
            [drawn(1 + (number * 5 + line) % 7, WIDTH) for number in range(pipelines.micro_batches)]
            for line in range(len(pipelines.ranks))
        ]

    def work(self, rank: int, note=None, role: str = "") -> "StageWork":
        """With weights of its own; `note(rank, operation)` is called with each operation."""
        line, stage = self.pipelines.positions[rank]
        layers = copy.deepcopy(self.layers[stage * self.each : (stage + 1) * self.each])
        work = StageWork(layers, self.inputs[line], stage == 0, stage == self.pipelines.stages - 1)
        if note is not None:
            work.note = lambda kind, number: note(rank, Operation(role, kind, number))
        return work

    def whole(self, line: int) -> list[torch.Tensor]:
        """Gradients of all layers from the micro-batches of a pipeline, by plain autograd of the whole model."""
        work = StageWork(copy.deepcopy(self.layers), self.inputs[line], True, True)
        for number in range(work.count):
            work.forward(number, None)
            work.backward(number, None)
        return work.gradients()


class StageWork(PipelineWork):
    def __init__(self, layers, inputs, is_first, is_last):
        self.layers, self.inputs = torch.nn.Sequential(*layers), inputs
        self.is_first, self.is_last = is_first, is_last
        self.count = len(inputs)
        self.alive: dict[int, tuple] = {}

    def note(self, kind, micro_batch):
        pass

    def room(self, micro_batch):
        return torch.full_like(self.inputs[micro_batch], torch.nan)

    def forward(self, micro_batch, received):
        assert (received is None) == self.is_first
        entered = self.inputs[micro_batch] if received is None else received.requires_grad_()
        result = self.layers(entered)
        if self.is_last:
            result = (result**2).mean() * (micro_batch + 1)
        self.alive[micro_batch] = entered, result
        self.note(FORWARD, micro_batch)
        return None if self.is_last else result

    def backward(self, micro_batch, gradient):
        assert (gradient is None) == self.is_last
        self.note(BACKWARD, micro_batch)
        entered, result = self.alive.pop(micro_batch)
        result.backward(gradient)
        return entered.grad

    def gradients(self):
        return [parameter.grad for parameter in self.layers.parameters()]


def random_orders(roles: dict[str, Pipelines], seed: int) -> Orders:
    """Any orders that work: again and again one of the operations that are ready, whichever it is."""
    rng = random.Random(seed)
    by_rank: dict[int, list[Operation]] = {rank: [] for each in roles.values() for rank in each.positions}
    done: set[tuple[int, Operation]] = set()

    def ready():
        for name, each in roles.items():
            for rank, kind in [(rank, kind) for rank in each.positions for kind in each.kinds]:
                number = sum(operation[:2] == (name, kind) for operation in by_rank[rank])
                operation = Operation(name, kind, number)
                source = each.source(rank, kind)
                comes = (rank, operation._replace(kind=FORWARD)) if kind == BACKWARD else None
                needed = [comes] if comes else []
                if source is not None:
                    needed.append((source, operation))
                if number < each.micro_batches and done.issuperset(needed):
                    yield rank, operation

    while found := list(ready()):
        rank, operation = rng.choice(found)
        by_rank[rank].append(operation)
        done.add((rank, operation))
    return Orders(roles, by_rank)


class Llamas:
    """A role as `Layers` is: a Llama, a policy or one that gives every token a number, cut as `layers` says."""

    def __init__(self, pipelines: Pipelines, seed: int, layers: tuple[int, ...], scores: bool):
        self.pipelines, self.layers, self.scores, self.seed = pipelines, layers, scores, seed
        generator = torch.Generator().manual_seed(seed)

        def row():
            lengths = torch.randint(1, 6, (2,), generator=generator)
            return [torch.randint(4, 60, (int(length),), generator=generator) for length in lengths]

        self.inputs = [
            [
                TokenBatch.of([row() for _ in range(1 + number % 3)], torch.device("cpu"))
                for number in range(pipelines.micro_batches)
            ]
            for _ in pipelines.ranks
        ]

    def whole_model(self):
        sizes = {"vocab_size": 60, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
        config = LlamaConfig(**sizes, num_hidden_layers=sum(self.layers), num_labels=1, pad_token_id=0)
        torch.manual_seed(self.seed)
        return Scorer(LlamaForSequenceClassification(config)) if self.scores else Policy(LlamaForCausalLM(config))

    def work(self, rank: int) -> "ModelWork":
        line, stage = self.pipelines.positions[rank]
        model, cut = self.whole_model(), StageCut(stage, self.layers)
        keep_stage(model.model, cut)
        return ModelWork(model, self.inputs[line], cut)

    def whole(self, line: int) -> dict[str, torch.Tensor]:
        """Gradients from the micro-batches of a pipeline, by plain autograd of the whole model."""
        work = ModelWork(self.whole_model(), self.inputs[line], StageCut(0, (sum(self.layers),)))
        for number in range(work.count):
            work.forward(number, None)
            work.backward(number, None)
        return work.gradients()


class ModelWork(PipelineWork):
    def __init__(self, model, batches, cut):
        self.model, self.batches, self.cut = model, batches, cut
        self.count = len(batches)
        self.alive: dict[int, tuple] = {}

    def room(self, micro_batch):
        return torch.full(hidden_shape(self.model.model, self.batches[micro_batch]), torch.nan)

    def forward(self, micro_batch, received):
        if received is not None:
            received.requires_grad_()
        made = self.model(self.batches[micro_batch], received=received)
        if self.cut.is_last:
            made = (made if torch.is_tensor(made) else made[0]).square().sum() * (micro_batch + 1)
        self.alive[micro_batch] = received, made
        return None if self.cut.is_last else made

    def backward(self, micro_batch, gradient):
        received, made = self.alive.pop(micro_batch)
        made.backward(gradient)
        return None if received is None else received.grad

    def gradients(self):
        return {name: weight.grad for name, weight in held_weights(self.model.model).items()}


def play(
    orders: Orders, works: Mapping[tuple[int, str], PipelineWork], seconds: Callable[[int, Operation], float]
) -> None:
    """What `execute` does, on all ranks in this one process, in the sequence of the orders' `timeline`; works by rank
    and role."""
    messages: dict[tuple[int, Operation], torch.Tensor] = {}
    for event in timeline(orders, seconds):
        rank, operation = event.rank, event.operation
        work, pipelines = works[rank, operation.role], orders.roles[operation.role]
        received = None
        if pipelines.source(rank, operation.kind) is not None:
            received = work.room(operation.micro_batch).copy_(messages.pop((rank, operation)))
        step = work.forward if operation.kind == FORWARD else work.backward
        result = step(operation.micro_batch, received)
        target = pipelines.target(rank, operation.kind)
        if target is not None:
            messages[target, operation] = result.detach()
