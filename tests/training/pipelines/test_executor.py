"""Orders computed on real ranks, and on all ranks in one process: the same gradients to the bit, in the order said."""

import time
from itertools import pairwise

import pytest
import torch

from benchmarks.fused_schedules import read_rows
from tests.ranks import run_ranks
from tests.training.pipelines.works import Layers, Llamas, play, random_orders
from tests.training.planner.schedules.test_bound import FILE
from training.pipelines.executor import connect, execute
from training.pipelines.orders import (
    Operation,
    Orders,
    Pipelines,
    fused,
    makespan,
    one_forward_one_backward,
    serial,
    timeline,
)
from training.planner.schedules.best import find_schedule
from training.planner.schedules.problem import FORWARD, Pipeline, SchedulingProblem

MESHES = {
    "one against the other": (((0, 1),), ((1, 0),), 4, 3),
    "a chain against two": (((0, 1, 2, 3),), ((1, 0), (3, 2)), 5, 3),
    "two against a chain": (((3, 2), (1, 0)), ((0, 1, 2, 3),), 2, 4),
    "stages against whole models": (((0, 1), (2, 3)), ((0,), (1,), (2,), (3,)), 3, 2),
}
"""Pipelines of actor and critic, and their micro-batches."""
APART = {
    "side by side": {"actor": Pipelines(((0, 1),), 3), "critic": Pipelines(((3, 2),), 2)},
    "one alone": {"actor": Pipelines(((2, 0, 3, 1),), 6)},
    "some ranks in common": {"actor": Pipelines(((0, 1, 2),), 2), "critic": Pipelines(((1, 2), (3, 0)), 4)},
    "the same way": {"actor": Pipelines(((0, 1), (2, 3)), 4), "critic": Pipelines(((0, 1), (2, 3)), 4)},
}


def roles_of(a, b, micro_batches_a, micro_batches_b):
    return {"actor": Pipelines(a, micro_batches_a), "critic": Pipelines(b, micro_batches_b)}


def orders_of(roles):
    """Of all kinds that the roles have."""
    found = {"serial": serial(roles), "1f1b": one_forward_one_backward(roles)}
    found |= {f"random {seed}": random_orders(roles, seed) for seed in range(3)}
    return found


def forwards_first(roles):
    """Both ranks send all that they can before they receive anything."""
    begins = {0: "actor", 1: "critic"}
    by_rank = {
        rank: sorted(order, key=lambda each: (each.kind, (each.role == begins[rank]) == each.kind))
        for rank, order in serial(roles).by_rank.items()
    }
    return Orders(roles, by_rank)


def fused_orders(roles):
    a, b = (Pipeline(each.stages, each.micro_batches, 2, 4, 1) for each in roles.values())
    return fused(roles, find_schedule(SchedulingProblem(a, b), effort=20_000).schedule)


def cases(size):
    fusing = {name: roles_of(*mesh) for name, mesh in MESHES.items()}
    for name, roles in (fusing | APART).items():
        if max(rank for each in roles.values() for rank in each.positions) == size - 1:
            found = orders_of(roles)
            if name in fusing:
                found["fused"] = fused_orders(roles)
            if size == 2:
                found["forwards first"] = forwards_first(roles)
            yield name, roles, found


def compute_everything(ranks, directory):
    """By case and kind of order: what was wrong, and the times of all operations."""
    wrong, times = [], {}
    for name, roles, found in cases(ranks.size):
        links = {role: connect(ranks, each) for role, each in roles.items()}
        models = {role: Layers(each, seed) for seed, (role, each) in enumerate(roles.items())}
        whole = {role: [models[role].whole(line) for line in range(len(each.ranks))] for role, each in roles.items()}
        for kind, orders in found.items():
            works = {
                role: models[role].work(ranks.rank) for role, each in roles.items() if ranks.rank in each.positions
            }
            events = []
            execute(orders, ranks.rank, works, links, events)
            if [event.operation for event in events] != list(orders.by_rank.get(ranks.rank, ())):
                wrong.append(f"{name}, {kind}: sequence")
            for role, work in works.items():
                line, stage = roles[role].positions[ranks.rank]
                expected = whole[role][line][2 * stage : 2 * stage + 2]
                if work.alive or not all(map(torch.equal, work.gradients(), expected)):
                    wrong.append(f"{name}, {kind}: gradients of {role}")
            times[f"{name}, {kind}"] = [[*event.operation, event.start, event.end] for event in events]
    return {"wrong": wrong, "times": times}


SCORED, STAGES = 16, {2: (0, 1), 4: (2, 0, 3, 1)}


def score_slowly(ranks, directory):
    """When each forward pass began and ended on this rank; the last stage is slow."""
    roles = {"reward": Pipelines((STAGES[ranks.size],), SCORED, (FORWARD,))}
    work, events = Layers(roles["reward"], seed=0).work(ranks.rank), []
    if ranks.rank == STAGES[ranks.size][-1]:
        work.note = lambda kind, number: time.sleep(0.01)
    links = {"reward": connect(ranks, roles["reward"])}
    execute(one_forward_one_backward(roles), ranks.rank, {"reward": work}, links, events)
    return [[event.start, event.end] for event in events]


@pytest.mark.parametrize("size", [2, 4])
def test_a_stage_that_scores_waits_for_the_next(size, tmp_path):
    found = run_ranks(__file__, "score_slowly", size, tmp_path, timeout=120)
    ahead = (size + 1) + 3  # sent; then one in place, one to compute and the one that is computed
    for rank, following in pairwise(STAGES[size]):
        for number in range(ahead, SCORED):
            assert found[following][number - ahead][1] <= found[rank][number][0], (rank, number)


@pytest.mark.parametrize("size", [2, 4])
def test_every_order_gives_the_gradients_of_the_whole_models_to_the_bit(size, tmp_path):
    found = run_ranks(__file__, "compute_everything", size, tmp_path, timeout=120)
    assert [each["wrong"] for each in found] == [[]] * size
    computed = 0
    for name, _, by_kind in cases(size):
        for kind, orders in by_kind.items():
            times = {
                (rank, Operation(*row[:3])): row[3:]
                for rank, each in enumerate(found)
                for row in each["times"][f"{name}, {kind}"]
            }
            for (rank, operation), (start, _) in times.items():
                needed = orders.needed(rank, operation)
                assert needed is None or times[needed][1] <= start, f"{name}, {kind}: {operation} on rank {rank}"
            computed += 1
    assert computed == {2: 7, 4: 3 * 6 + 4 * 5}[size]


LLAMAS = {2: ((2, 1), (1, 1)), 4: ((1, 2, 1, 1), (2, 1))}
"""Layers of the stages of actor and critic, by number of ranks."""


def roles_of_llamas(size):
    a, b, *_ = MESHES["one against the other" if size == 2 else "a chain against two"]
    return roles_of(a, b, 5, 3)


@pytest.mark.parametrize("size", [2, 4])
def test_two_llamas_in_one_process(size):
    """Stages and micro-batches of unlike lengths, two pipelines of the critic on four ranks."""
    roles = roles_of_llamas(size)
    models = {
        role: Llamas(each, 7, layers, role == "critic")
        for (role, each), layers in zip(roles.items(), LLAMAS[size], strict=True)
    }
    whole = {role: [models[role].whole(line) for line in range(len(each.ranks))] for role, each in roles.items()}
    for kind, orders in (orders_of(roles) | {"fused": fused_orders(roles)}).items():
        works = {(rank, role): models[role].work(rank) for role, each in roles.items() for rank in each.positions}
        play(orders, works, lambda rank, operation: 1.0)
        for role, each in roles.items():
            for line, ranks in enumerate(each.ranks):
                parts = [works[rank, role].gradients() for rank in ranks]
                joined = {name: gradient for part in parts for name, gradient in part.items()}
                assert sum(map(len, parts)) == len(joined) == len(whole[role][line])
                for name, gradient in whole[role][line].items():
                    assert torch.equal(joined[name], gradient), f"{kind}: {name} of {role}"


@pytest.mark.parametrize("row", read_rows(FILE), ids=lambda row: row.name)
def test_a_published_problem_is_computed_as_it_was_found(row):
    """All devices in this process: the gradients of serial order, the events and the memory of the schedule."""
    problem = row.problem
    schedule = find_schedule(problem, effort=40_000).schedule
    line = range(problem.devices)
    roles = {
        name: Pipelines(
            tuple(tuple(line[start : start + each.stages][::way]) for start in line[:: each.stages]), each.micro_batches
        )
        for name, each, way in zip("AB", problem.models, (1, -1), strict=True)
    }

    def seconds(rank, operation):
        return problem.times("AB".index(operation.role), rank)[operation.kind]

    def played(orders):
        """Gradients, events in their sequence, and the most memory of each device."""
        works = {}
        events, most = [], [0.0] * problem.devices

        def note(rank, operation):
            events.append((rank, "AB".index(operation.role), *operation[1:]))
            alive = (len(works[rank, role].alive) * problem.activation("AB".index(role), rank) for role in roles)
            most[rank] = max(most[rank], sum(alive))

        for role, pipelines in roles.items():
            model = Layers(pipelines, seed=3)
            works |= {(rank, role): model.work(rank, note, role) for rank in line}
        play(orders, works, seconds)
        return [gradient for work in works.values() for gradient in work.gradients()], events, most

    orders = fused(roles, schedule)
    assert makespan(timeline(orders, seconds)) == schedule.makespan == row.bound
    one_by_one, *_ = played(serial(roles))
    together, events, most = played(orders)
    assert all(map(torch.equal, one_by_one, together))
    starts = {each[:4]: each.start for each in schedule.operations}
    assert len(events) == len(starts) and [starts[each] for each in events] == sorted(starts.values())
    for device, operations in enumerate(schedule.by_device):
        assert [each for each in events if each[0] == device] == [each[:4] for each in operations]
    assert most == pytest.approx(schedule.device_memory)
