"""What a fused schedule is compared with."""

import math
from dataclasses import replace

from training.planner.fusion.event_loop import PER_DEVICE, PER_MODEL, EventLoop, Rule
from training.planner.fusion.instance import BACKWARD, FORWARD, WEIGHT, Instance
from training.planner.fusion.schedule import Order, Schedule, operations_of, timed


def one_forward_one_backward(instance: Instance, model: int, device: int) -> Order:
    """1F1B of one model on one device: forwards until the pipeline is full, then backward and forward in turn."""
    each = instance.models[model]
    full = min(each.micro_batches, each.stages - instance.stage(model, device))
    backward = [(model, kind) for kind in (BACKWARD, WEIGHT) if kind in each.kinds]
    steady = [*backward, (model, FORWARD)] * (each.micro_batches - full)
    return [*[(model, FORWARD)] * full, *steady, *backward * full]


def serial_1f1b(instance: Instance) -> Schedule:
    """Model A under 1F1B, then model B, with a barrier between them and between mini-batches."""
    one = instance.of_mini_batches(1)
    operations, before = [], 0.0
    for model in range(2):
        orders = [one_forward_one_backward(one, model, device) for device in range(one.devices)]
        found, _ = operations_of(one, orders)
        operations += [each._replace(start=each.start + before, end=each.end + before) for each in found]
        before = max(each.end for each in operations)
    return Schedule(one, tuple(operations)).repeated(instance.mini_batches)


def interleaved_greedy(instance: Instance) -> Schedule:
    """Whatever is ready starts: backwards first, and of what else is equal the model with more work on a device.

    As in RLHFuse's greedy schedule nothing holds forwards back, no memory cap either.
    """
    boundless = replace(instance, memory_cap=math.inf)
    loop = EventLoop(boundless)
    count = len(loop.time)
    longest = max(loop.total) + 1
    priority = []
    for slot in range(count):
        device, (model, kind) = slot // PER_DEVICE, divmod(slot % PER_DEVICE, PER_MODEL)
        a, b = (instance.micro_batches(each) * sum(instance.times(each, device)) for each in range(2))
        priority.append([2.0 * (kind == FORWARD) + (model != (a < b))] * longest)
    rule = Rule(priority, [longest] * count, [[math.inf] * longest] * count)
    state = loop.run(rule)
    assert state is not None  # what is ready starts, so the devices cannot wait for each other
    return timed(boundless, loop.orders(state))
