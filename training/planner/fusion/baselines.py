"""What a fused schedule is compared with."""

from training.planner.fusion.instance import BACKWARD, FORWARD, WEIGHT, Instance
from training.planner.fusion.schedule import Order, Schedule, operations_of


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
