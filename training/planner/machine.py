"""A measured machine as hardware of the planner: how it is kept in a file, and read again."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from inference.errors import UserError
from inference.model_store import cache_directory
from training.merging import load_yaml
from training.planner.hardware import GIB, Calibration, Cluster, Device

THIS_MACHINE = "this-machine"
GPU_NAMES = {"H200": "h200", "H100": "h100", "A800": "a800-80g", "V100": "v100", "L40S": "l40s", "4090": "rtx-4090"}
HEADER = "# A machine as measured by `rlhf-chat profile`: bytes, floating-point operations a second, bytes a second.\n"


@dataclass(frozen=True)
class MachineProfile:
    """One rank of a machine while all of its ranks work, and what a call costs there beside arithmetic."""

    device: Device
    ranks: int
    """That worked at the same time; they share the machine."""
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
    """Where `rlhf-chat profile` keeps what it measured with so many ranks; 0: the newest one."""
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
    """`nodes` machines like this one, each with so many ranks, and where their rates come from: a profile, or the data
    sheet of the first of `gpus` (name, bytes). None where neither is known."""
    file = profile_file(processes)
    if file.is_file():
        return replace(read_profile(file).cluster, nodes=nodes), "measured by `rlhf-chat profile`"
    device = gpu_named(*gpus[0]) if gpus else None
    if device is None:
        return None
    return Cluster.named(device, nodes, processes).ours, f"the data sheet of {device} and constants of A100 nodes"


def gpu_named(name: str, memory: int) -> str | None:
    """The planner's name of a GPU that calls itself `name`."""
    if "A100" in name:
        return "a100-80g" if memory > 60 * GIB else "a100-40g"
    return next((device for part, device in GPU_NAMES.items() if part in name), None)
