"""What `training` and `applications` ask of torch, DeepSpeed and Python beyond their public surface; only here.

Each function says why, and in which version it was read. `tests/training/test_private_surfaces.py` asks the installed
libraries for each, and fails where one has changed it.
"""

import atexit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

OWN_WEIGHTS = (
    "fp32_partitioned_groups_flat",  # ZeRO stage 3
    "single_partition_of_fp32_groups",  # 1 and 2
    "fp32_groups_flat_partition",  # 1 in bf16 with sums of gradients in fp32
)
"""Where DeepSpeed's optimisers keep this rank's part of the weights; its public functions give one parameter at a
time, through collectives. DeepSpeed 0.19.8."""

READ_WEIGHTS = ("parallel_partitioned_bit16_groups", "bf16_partitioned_groups")
"""Where those of ZeRO 1 and 2 keep what forward passes read, each rank's part of it. DeepSpeed 0.19.8."""
GATHERED = 2**20  # values of each rank in one collective


def without_shared_memory(deepspeed: Any) -> None:
    """Leave the all-reduce to gloo: DeepSpeed compiles its own over shared memory on first use on a CPU, which takes
    half a minute and a C++ compiler that a laptop may not have. No setting says so. DeepSpeed 0.19.8."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def classes_in_checkpoints(deepspeed: Any) -> list[type]:
    """List what DeepSpeed's checkpoints hold besides tensors, numbers and texts. To build one does nothing else.
    DeepSpeed 0.19.8."""
    from deepspeed.utils.tensor_fragment import fragment_address

    scaler = deepspeed.runtime.fp16.loss_scaler
    return [scaler.LossScaler, scaler.DynamicLossScaler, deepspeed.runtime.zero.config.ZeroStageEnum, fragment_address]


def reduce_nothing(engine: Any) -> None:
    """Reduce no gradients, for one rank, where DeepSpeed would copy all into one buffer and back. DeepSpeed 0.19.8."""
    engine.buffered_allreduce_fallback = lambda *_, **__: None


def own_weights(optimizer: Any) -> list[Tensor]:
    """Return this rank's flat part of the weights at ZeRO stage 1 to 3: writing into them is training."""
    name = next(name for name in OWN_WEIGHTS if hasattr(optimizer, name))
    return list(getattr(optimizer, name))


def summed_gradient(engine: Any, parameter: nn.Parameter) -> Tensor:
    """Return a parameter's gradient on this rank, summed over backward passes and not yet over ranks, under ZeRO 0 or
    1: adding to it is training. DeepSpeed's public function gives a copy. DeepSpeed 0.19.8."""
    optimizer, summed = engine.optimizer, cast(Any, parameter)
    if hasattr(optimizer, "non_expert_gradients"):  # stage 1 in bf16 with sums in fp32
        return summed._hp_grad
    if hasattr(optimizer, "get_param_gradient_attribute"):  # 1
        return optimizer.get_param_gradient_attribute(parameter)
    return summed.grad


def reduced_gradients(engine: Any) -> tuple[list[Tensor], bool]:
    """Return what an optimiser will step with, between the sum over ranks and the step, under ZeRO 0 or 1, and whether
    it is this rank's part alone: writing into it is training. DeepSpeed 0.19.8."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "non_expert_gradients"):
        return list(optimizer.non_expert_gradients), False
    if not hasattr(optimizer, "averaged_gradients"):
        return [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None], False
    if optimizer.cpu_offload:
        return [part.grad for part in optimizer.single_partition_of_fp32_groups], True
    return [gradient for group in optimizer.averaged_gradients.values() for gradient in group], True


def own_part(parameter: nn.Parameter) -> Tensor:
    """Return this rank's part of a parameter under ZeRO 3, as forward passes read it. DeepSpeed 0.19.8."""
    divided: Any = parameter
    return divided.ds_tensor


def numbers_of_zero_3() -> tuple[int, int]:
    """Return the numbers of the next parameter and the next module under ZeRO 3: DeepSpeed counts them through a
    process, and wants them equal on all ranks of an engine. DeepSpeed 0.19.8."""
    parameters, modules = _counters_of_zero_3()
    return parameters.param_id, modules[0]


def count_zero_3_from(parameter: int, module: int) -> None:
    """Set the counters that `numbers_of_zero_3` reads."""
    parameters, modules = _counters_of_zero_3()
    parameters.param_id, modules[0] = parameter, module


def _counters_of_zero_3() -> tuple[Any, list[int]]:
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    register: Any = DeepSpeedZeRoOffload._register_deepspeed_module
    return Init, register.__defaults__[0]


def forget_whole(parameter: nn.Parameter) -> None:
    """Free a parameter that is gathered whole, after this rank's part of it has been written; it is gathered again when
    it is read. DeepSpeed 0.19.8."""
    divided: Any = parameter
    if divided.ds_status == type(divided.ds_status).AVAILABLE:
        divided.partition()


def own_run(optimizer: Any, parameter: nn.Parameter) -> tuple[int, int, int, int]:
    """Find the values of a parameter in this rank's `own_weights`: the first of them, their count (0: none), in which
    tensor they are, and from where in it. ZeRO stage 1 to 3; DeepSpeed 0.19.8."""
    trained: Any = parameter
    if hasattr(trained, "ds_id"):
        tensor, offset, size = optimizer.grad_position[optimizer.get_param_id(trained)]
        start = size * optimizer._get_param_partition_rank(trained)
        return start, max(0, min(size, trained.ds_numel - start)), tensor, offset
    mapping = trained._hp_mapping
    if mapping is None:
        return 0, 0, 0, 0
    address = mapping.hp_fragment_address
    return mapping.lp_fragment_address.start, address.numel, mapping.param_group_index, address.start


def refresh_weights(optimizer: Any) -> None:
    """Update what forward passes read after `own_weights` were written, at ZeRO stage 1 to 3. All ranks call it.
    DeepSpeed does the same after a step, but below stage 3 it gathers all weights at once. DeepSpeed 0.19.8."""
    if not hasattr(optimizer, OWN_WEIGHTS[0]):
        name = next(name for name in READ_WEIGHTS if hasattr(optimizer, name))
        for parts, own in zip(getattr(optimizer, name), own_weights(optimizer), strict=True):
            parts[dist.get_rank()].data.copy_(own.data)
            for chunks in zip(*(part.data.split(GATHERED) for part in parts), strict=True):
                dist.all_gather(list(chunks), chunks[dist.get_rank()])
        return
    optimizer.checkpoint_event_prologue()  # small parameters, which stand whole on every rank, are divided
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    optimizer.checkpoint_event_epilogue()


def is_on_disk(optimizer: Any) -> bool:
    """Whether the optimiser's state lies on NVMe, so that `own_weights` are empty. DeepSpeed 0.19.8."""
    return bool(getattr(optimizer, "swap_optimizer", False))


SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What a dynamic loss scaler counts. DeepSpeed 0.19.8."""


def loss_scale(optimizer: Any) -> dict[str, float]:
    """Return the state of a dynamic loss scale; empty where there is none."""
    scaler = getattr(optimizer, "loss_scaler", None)
    return {name: getattr(scaler, name) for name in SCALE} if getattr(scaler, "dynamic", False) else {}


def restore_loss_scale(optimizer: Any, scale: dict[str, float]) -> None:
    """Go on from what `loss_scale` gave, where there is a dynamic one."""
    if loss_scale(optimizer):
        vars(optimizer.loss_scaler).update({name: scale[name] for name in SCALE if name in scale})


def has_overflow(optimizer: Any) -> bool:
    """Whether an optimiser of ZeRO stage 1 to 3 would find an overflow when stepping; the same on every rank. Some
    forget it after one look. DeepSpeed 0.19.8."""
    return bool(optimizer.has_overflow())


def overflow_replacements(overflow: bool, keeps_scale: bool) -> dict[str, Callable]:
    """Return methods, and what to put in front of them, so that an optimiser finds `overflow` when it looks, and does
    not lower its loss scale if it `keeps_scale`. DeepSpeed 0.19.8."""
    methods: dict[str, Callable] = {"has_overflow": lambda *_, **__: overflow}
    return {**methods, "_update_scale": lambda *_, **__: None} if keeps_scale else methods


def wait_at_most(patience: timedelta) -> None:
    """Set the time-out of groups made later without one, as DeepSpeed makes them: torch's own are 10 and 30 minutes.
    torch 2.13.0."""
    vars(dist.distributed_c10d).update(default_pg_timeout=patience, default_pg_nccl_timeout=patience)


def default_store() -> dist.Store:
    """Return the key-value store that every process group has; nothing public gives it. torch 2.13.0."""
    return dist.distributed_c10d._get_default_store()


@contextmanager
def default_group(group: dist.ProcessGroup) -> Iterator[None]:
    """Make `group` inside what torch takes where none is named, and DeepSpeed for all ranks: it knows no other way to
    work on a part of them but an `mpu`, of which there is one in a process. torch 2.13.0, DeepSpeed 0.19.8."""
    from deepspeed.utils import groups

    outside = dist.group.WORLD, groups._WORLD_GROUP
    dist.distributed_c10d._update_default_pg(group)
    groups._WORLD_GROUP = group
    try:
        yield
    finally:
        dist.distributed_c10d._update_default_pg(outside[0])
        groups._WORLD_GROUP = outside[1]


def multiplies_bf16() -> bool:
    """Whether this CPU multiplies bf16 fast. torch 2.13.0."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def run_exit_functions() -> None:
    """Run what an interpreter runs when it ends, and a process that multiprocessing has made does not. Python 3.11."""
    atexit._run_exitfuncs()
