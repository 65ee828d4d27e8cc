"""What a plan runs on: devices, links, and the constants that only measurement gives.

Peak rates are the makers' data sheets: dense matrix products, one direction of a link.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import yaml

from inference.errors import UserError
from inference.model_store import cache_directory
from training.merging import load_yaml
from training.planner.workload import Precision

GIB = 2**30
USABLE_MEMORY = 0.92
"""Share of a device's memory; the rest goes to its context, communication buffers and fragmentation."""
ACHIEVED_BANDWIDTH = 0.8
"""Share of the data sheet's memory and link bandwidth that long transfers reach."""
REPLAYED_LAYER_SECONDS = 4e-5
"""Seconds of a layer in a decode step that a CUDA graph replays: twenty kernels of two microseconds, an estimate."""
FASTER = 1.3
"""Where another format is faster by less than this factor, fp32's accuracy is worth more."""


@dataclass(frozen=True)
class Device:
    """Describes one GPU, or one CPU rank, in bytes, floating-point operations a second, bytes a second."""

    name: str
    memory: float
    peak_flops: Mapping[Precision, float]
    memory_bandwidth: float
    link_bandwidth: float
    """Bandwidth to another device of the same node."""
    host_bandwidth: float
    """Bandwidth to the host's memory."""

    @property
    def has_own_memory(self) -> bool:
        """Whether weights can wait in the host's memory: a rank without a GPU works there."""
        return self.host_bandwidth != self.memory_bandwidth

    @property
    def precision(self) -> Precision:
        """The number format to train in: bf16 where that is clearly faster than fp32, then fp16, else fp32."""
        formats: tuple[Precision, ...] = ("bf16", "fp16")
        fast = (name for name in formats if self.peak_flops.get(name, 0) > FASTER * self.peak_flops["fp32"])
        return next(fast, "fp32")


def _device(
    name: str,
    gib: float,
    tflops: tuple[float, float, float],
    memory_gb_s: float,
    link_gb_s: float,
    host_gb_s: float,
) -> Device:
    rates: dict[Precision, float] = {"fp32": tflops[0] * 1e12, "bf16": tflops[1] * 1e12, "fp16": tflops[2] * 1e12}
    return Device(name, gib * GIB, rates, memory_gb_s * 1e9, link_gb_s * 1e9, host_gb_s * 1e9)


DEVICES = {
    device.name: device
    for device in (
        # name, GiB, Tflop/s in fp32, bf16, fp16, GB/s of memory, link, host
        _device("a100-40g", 40, (19.5, 312, 312), 1555, 300, 25),
        _device("a100-80g", 80, (19.5, 312, 312), 2039, 300, 25),
        _device("a800-80g", 80, (19.5, 312, 312), 2039, 200, 25),  # an A100 with fewer links
        _device("h100", 80, (67, 989, 989), 3350, 450, 50),
        _device("h200", 141, (67, 989, 989), 4800, 450, 50),
        _device("v100", 32, (15.7, 15.7, 125), 900, 150, 12.5),  # without bf16
        _device("l40s", 48, (91.6, 362, 362), 864, 25, 25),  # devices talk over PCIe
        _device("rtx-4090", 24, (82.6, 165, 165), 1008, 12, 25),  # and these through the host
    )
}


@dataclass(frozen=True)
class Calibration:
    """Holds what no data sheet says. The defaults are fitted to ReaLHF's published times of PPO iterations, eager
    PyTorch on A100-class nodes: `python -m benchmarks.realhf_table --csv FILE --calibrate`."""

    compute_share: float = 0.690
    """Share of the peak rate that matrix products reach."""
    launch_seconds: float = 3.67e-4
    """Seconds to launch the kernels of one layer once, forward, from an eager program."""
    collective_seconds: float = 1.41e-4
    """Latency of a collective over two ranks, waiting for the later one included; grows with log2 of the ranks."""
    controller_seconds: float = 1.135
    """A call costs the controller, which serves all calls in turn while devices wait: data are fetched and cut,
    requests sent, results and statistics collected."""
    decode_seconds: float = 0.0
    """Seconds to run one layer in a decode step, nearly without arithmetic; 0: as to launch it in other passes."""
    decode_collective_seconds: float = 0.0
    """Latency of a collective in a decode step; 0: as in other passes."""
    gather_share: float = 1.0
    """Share of the link's bandwidth that an all-gather reaches."""
    scatter_share: float = 1.0
    """Share of the link's bandwidth that a reduce-scatter reaches."""
    reduce_share: float = 1.0
    """Share of it that gradients reach under ZeRO 1 and 2, where each rank needs a part of the sum; 0.5: an
    all-reduce."""
    copy_bandwidth: float = inf
    """Bytes a second written into memory that is new to a process, as when gradients are flattened; infinite where that
    is nothing beside the link."""
    hook_seconds: float = 0.0
    """Seconds of ZeRO 3's hooks around the modules of one layer, in a pass."""

    @property
    def decode_launch_seconds(self) -> float:
        return self.decode_seconds or self.launch_seconds

    @property
    def decode_collective(self) -> float:
        """Latency of a collective over two ranks in a decode step."""
        return self.decode_collective_seconds or self.collective_seconds


@dataclass(frozen=True)
class Cluster:
    """Describes equal nodes of equal devices; rank r is device r % devices_per_node of node r // devices_per_node."""

    device: Device
    nodes: int
    devices_per_node: int
    network_bandwidth: float = 25e9
    """Bytes a second that a node sends, and receives, at the same time; 25e9 is 200 Gbit/s."""
    host_memory: float = inf
    """Bytes of main memory of a node; infinite where it is not known."""
    calibration: Calibration = Calibration()

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.devices_per_node < 1:
            raise UserError(
                f"{self.nodes} nodes of {self.devices_per_node} devices are no cluster; give 1 or more of both."
            )

    @classmethod
    def named(cls, device: str, nodes: int, devices_per_node: int) -> "Cluster":
        """Return a cluster of devices in the list. Raises UserError for another name."""
        if device not in DEVICES:
            raise UserError(f"There is no description of the device '{device}'; choose one of {', '.join(DEVICES)}.")
        return cls(DEVICES[device], nodes, devices_per_node)

    @property
    def without_controller(self) -> "Cluster":
        """The cluster under a runtime in which no process serves all calls."""
        return replace(self, calibration=replace(self.calibration, controller_seconds=0.0))

    @property
    def ours(self) -> "Cluster":
        """The cluster under our runtime: without a controller, and decode steps of GPUs are replayed as CUDA graphs."""
        without = self.without_controller
        return replace(without, calibration=replace(without.calibration, decode_seconds=REPLAYED_LAYER_SECONDS))

    @property
    def size(self) -> int:
        return self.nodes * self.devices_per_node

    @property
    def usable_memory(self) -> float:
        return self.device.memory * USABLE_MEMORY

    def node_of(self, rank: int) -> int:
        return rank // self.devices_per_node


THIS_MACHINE = "this-machine"
GPU_NAMES = {"H200": "h200", "H100": "h100", "A800": "a800-80g", "V100": "v100", "L40S": "l40s", "4090": "rtx-4090"}
HEADER = "# A machine as measured by `rlhf-chat profile`: bytes, floating-point operations a second, bytes a second.\n"


@dataclass(frozen=True)
class MachineProfile:
    """Describes one rank of a machine while all of its ranks work, and what a call costs there beside arithmetic."""

    device: Device
    ranks: int
    """How many ranks worked at the same time; they share the machine."""
    calibration: Calibration
    measured_on: Mapping[str, str]
    """Processor or GPU, threads of a rank, versions."""

    @property
    def cluster(self) -> Cluster:
        return Cluster(self.device, 1, self.ranks, calibration=self.calibration)

    def to_yaml(self) -> str:
        values = asdict(self) | {"device": asdict(self.device) | {"peak_flops": dict(self.device.peak_flops)}}
        return HEADER + yaml.safe_dump(values | {"measured_on": dict(self.measured_on)}, sort_keys=False)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "MachineProfile":
        """Raises KeyError or TypeError where something is missing or unknown."""
        device = Device(
            **{name: value if name == "name" else _number(value) for name, value in values["device"].items()}
        )
        calibration = Calibration(**{name: float(value) for name, value in values["calibration"].items()})
        return cls(device, int(values["ranks"]), calibration, values.get("measured_on", {}))


def _number(value: Any) -> Any:
    return {key: float(rate) for key, rate in value.items()} if isinstance(value, Mapping) else float(value)


def profile_file(ranks: int = 0) -> Path:
    """Return the file in which `rlhf-chat profile` stores what it measured with so many ranks; 0: the newest one."""
    return cache_directory() / "hardware" / (f"{THIS_MACHINE}-{ranks}.yaml" if ranks else f"{THIS_MACHINE}.yaml")


def read_profile(file: Path) -> MachineProfile:
    """Raises UserError for a file that is not there or is no profile."""
    try:
        return MachineProfile.from_values(load_yaml(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"There is no profile {file}; `rlhf-chat profile` measures this machine.") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{file} is no profile of a machine ({reason}); measure it with `rlhf-chat profile`."
        ) from error


def cluster_here(processes: int, nodes: int, gpus: Sequence[tuple[str, int]]) -> tuple[Cluster, str] | None:
    """Return `nodes` machines like this one, each with so many ranks, and the source of their rates: a profile, or the
    data sheet of the first of `gpus` (name, bytes). None where neither is known."""
    file = profile_file(processes)
    if file.is_file():
        return replace(read_profile(file).cluster, nodes=nodes), "measured by `rlhf-chat profile`"
    device = gpu_named(*gpus[0]) if gpus else None
    if device is None:
        return None
    return Cluster.named(device, nodes, processes).ours, f"the data sheet of {device} and constants of A100 nodes"


def gpu_named(name: str, memory: int) -> str | None:
    """Return the planner's name of a GPU that calls itself `name`."""
    if "A100" in name:
        return "a100-80g" if memory > 60 * GIB else "a100-40g"
    return next((device for part, device in GPU_NAMES.items() if part in name), None)
