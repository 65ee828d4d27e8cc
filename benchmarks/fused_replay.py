"""A second look at schedules, independent of `schedule.py`: events in order of time, and rules checked one by one."""

import itertools
from collections import Counter
from collections.abc import Sequence
from heapq import heappop, heappush

from training.planner.schedules.problem import BACKWARD, FORWARD, ROUNDING, SchedulingProblem
from training.planner.schedules.schedule import ImpossibleSchedule, Order, Schedule, ScheduledOperation


def replay(problem: SchedulingProblem, orders: Sequence[Order]) -> tuple[float, float]:
    """Makespan and peak memory of devices that work off their orders and tell each other when something has ended."""
    arrived: Counter[tuple[int, int, int]] = Counter()  # what a device may do, by (device, model, kind)
    done: Counter[tuple[int, int, int]] = Counter()
    for device, model in itertools.product(range(problem.devices), range(2)):
        if problem.before(model, device) is None:
            arrived[device, model, FORWARD] = problem.models[model].micro_batches
    waiting = [list(reversed(order)) for order in orders]
    alive = [[0, 0] for _ in orders]
    running: list[tuple[float, int, int, int]] = []  # (end, device, model, kind)
    idle = set(range(problem.devices))
    now = peak = 0.0
    while True:
        for device in sorted(idle):
            if not waiting[device]:
                continue
            model, kind = waiting[device][-1]
            if done[device, model, kind] == arrived[device, model, kind]:  # nothing of this kind is running here
                continue
            waiting[device].pop()
            idle.remove(device)
            if kind == FORWARD:
                alive[device][model] += 1
                peak = max(peak, sum(alive[device][each] * problem.activation(each, device) for each in (0, 1)))
            heappush(running, (now + problem.times(model, device)[kind], device, model, kind))
        if not running:
            break
        now = running[0][0]
        while running and running[0][0] == now:
            _, device, model, kind = heappop(running)
            each = problem.models[model]
            done[device, model, kind] += 1
            idle.add(device)
            if kind == each.kinds[-1]:
                alive[device][model] -= 1
            following = problem.after(model, device) if kind == FORWARD else problem.before(model, device)
            if kind == FORWARD and following is None:
                arrived[device, model, BACKWARD] += 1
            elif following is not None and kind in (FORWARD, BACKWARD):
                arrived[following, model, kind] += 1
            if kind == BACKWARD and each.is_split:
                arrived[device, model, each.kinds[-1]] += 1
    if any(waiting):
        raise ImpossibleSchedule("the devices wait for each other")
    return now, peak


def check(schedule: Schedule) -> None:
    """Raises ImpossibleSchedule, with the reason, for what no devices could do or the problem does not allow."""
    problem = schedule.problem
    rounding = ROUNDING * schedule.makespan
    known: dict[tuple[int, int, int, int], ScheduledOperation] = {each[:4]: each for each in schedule.operations}
    needed = {
        (device, model, kind, micro_batch)
        for device, (model, each) in itertools.product(range(problem.devices), enumerate(problem.models))
        for kind, micro_batch in itertools.product(each.kinds, range(each.micro_batches))
    }
    if known.keys() != needed or len(known) != len(schedule.operations):
        raise ImpossibleSchedule("an operation is missing, unknown or there twice")
    for operation in schedule.operations:
        device, model, kind, micro_batch, start, end = operation
        if abs(end - start - problem.times(model, device)[kind]) > rounding or start < -rounding:
            raise ImpossibleSchedule(f"{operation} runs from {start:g} to {end:g}")
        for key in _predecessors(problem, device, model, kind, micro_batch):
            if known[key].end > start + rounding:
                raise ImpossibleSchedule(f"{operation} starts at {start:g}, before the end of {known[key]}")
    for row in schedule.by_device:
        for one, other in itertools.pairwise(row):
            if one.end > other.start + rounding:
                raise ImpossibleSchedule(f"{other} starts at {other.start:g}, while {one} runs")
    if schedule.peak_memory > problem.memory_cap * (1 + ROUNDING):
        raise ImpossibleSchedule(f"memory is {schedule.peak_memory:g}, more than {problem.memory_cap:g}")


def _predecessors(
    problem: SchedulingProblem, device: int, model: int, kind: int, micro_batch: int
) -> list[tuple[int, int, int, int]]:
    """What must have ended before: in the micro-batch, and of the one before it."""
    found = [(device, model, kind, micro_batch - 1)] if micro_batch else []
    if kind != FORWARD:
        found.append((device, model, kind - 1, micro_batch))
    neighbour = {FORWARD: problem.before, BACKWARD: problem.after}.get(kind)
    if neighbour is not None:
        source = neighbour(model, device)
        if source is not None:
            found.append((source, model, kind, micro_batch))
    return found
