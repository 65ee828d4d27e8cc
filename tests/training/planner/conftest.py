"""A toy workload on toy clusters, and random plans for it."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from training.calls import DataflowGraph
from training.plan import Plan
from training.planner.cost import CallCosts
from training.planner.hardware import Calibration, Cluster
from training.planner.options import Options, meshes
from training.planner.reallocation_cost import AugmentedGraphs
from training.planner.workload import Workload
from training.role_settings import LoRASettings
from training.shape import Shape

CALIBRATION = Calibration(compute_share=0.5, launch_seconds=1e-4, collective_seconds=5e-5, controller_seconds=0.01)


def opt(layers: int, hidden: int, vocabulary: int = 50272) -> Shape:
    """Matrices only; the output matrix is the embedding."""
    parameters = layers * 12 * hidden**2 + vocabulary * hidden
    heads = hidden // 64
    return Shape(layers, hidden, 4 * hidden, heads, heads, 64, vocabulary, False, parameters, 0, linears=())


LARGE, SMALL = opt(24, 2048), opt(24, 1024)


def ppo_workload(samples: int = 64, response_tokens: int = 128, lora_rank: int = 0) -> Workload:
    shapes = {"actor": LARGE, "reference": LARGE, "critic": SMALL, "reward": SMALL}
    lora = {"actor": LoRASettings(rank=lora_rank)}
    return Workload.of(shapes, samples, 128, response_tokens, mini_batches=4, precision="fp16", lora=lora)


def graphs_on(
    nodes: int, devices: int, device: str = "a100-80g", workload: Workload | None = None, algorithm: str = "ppo"
) -> AugmentedGraphs:
    cluster = replace(Cluster.named(device, nodes, devices), calibration=CALIBRATION)
    return AugmentedGraphs(DataflowGraph.of(algorithm), CallCosts(workload or ppo_workload(), cluster))


class Plans:
    """Plans of all assignments that the search could choose, with or without room in memory."""

    def __init__(self, graphs: AugmentedGraphs):
        options = Options(graphs)
        places = list(meshes(graphs.costs.cluster, options.space))
        self.candidates = {
            call.name: [one for mesh in places for one in options.candidates(call, mesh)] for call in graphs.graph.calls
        }

    def draw(self, random_: random.Random) -> Plan:
        return Plan({name: random_.choice(candidates) for name, candidates in self.candidates.items()})

    def all(self) -> Iterator[Plan]:
        """Every plan of a small space."""
        for picked in itertools.product(*self.candidates.values()):
            yield Plan(dict(zip(self.candidates, picked, strict=True)))


@pytest.fixture(scope="session")
def two_nodes() -> AugmentedGraphs:
    return graphs_on(2, 4)


@pytest.fixture(scope="session")
def random_plans(two_nodes: AugmentedGraphs) -> list[Plan]:
    plans, random_ = Plans(two_nodes), random.Random(0)
    return [plans.draw(random_) for _ in range(60)]
