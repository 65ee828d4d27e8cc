"""`rlhf-chat profile`: measures this machine, so that `rlhf-chat plan --gpu this-machine` can plan for it."""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from applications.files import write_text
from applications.fit import Machine
from applications.launch import run_on_ranks
from inference.errors import UserError, typed
from training.metrics import size
from training.planner.hardware import ACHIEVED_BANDWIDTH
from training.planner.machine import MachineProfile, profile_file


def profile_command(processes: int | None, out: Path | None) -> None:
    """Raises UserError for more processes than GPUs, or cores where there are none."""
    machine = Machine.here()
    ranks = processes or len(machine.gpus) or 1
    machine.require_room(ranks)
    if not machine.gpus and ranks > machine.cores:
        raise UserError(
            f"{ranks} processes would wait for each other on {machine.cores} cores: use --processes {machine.cores} at "
            "most."
        )
    files = [out] if out is not None else [profile_file(ranks), profile_file()]
    print(describe(measure_to(files, ranks)))
    target = "this-machine" if out is None else typed(out)
    print(f"\nWritten to {files[0]}; plan with: rlhf-chat plan --gpu {target} --gpus-per-node {ranks} --model ...")


def measure_to(files: Sequence[Path], ranks: int) -> MachineProfile:
    """What this machine reaches with so many ranks, also written to `files`."""
    print(f"Measuring with {ranks} process{'es' * (ranks > 1)}; other work spoils the figures.", flush=True)
    import training.planner.profile as script

    profile = MachineProfile.from_values(run_on_ranks(script.__file__, [], ranks, "measurement"))
    for file in files:
        write_text(file, profile.to_yaml())
    return profile


def describe(profile: MachineProfile) -> str:
    """A line a figure, of one rank."""
    device, calibration = profile.device, profile.calibration
    rates = ", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in device.peak_flops.items())
    lines = [
        f"{'machine':<22}{profile.measured_on.get('processor', '')}; {profile.ranks} ranks at the same time",
        f"{'memory':<22}{size(device.memory)} a rank",
        f"{'matrix products':<22}{rates} Tflop/s",
        f"{'memory bandwidth':<22}{device.memory_bandwidth * ACHIEVED_BANDWIDTH / 1e9:.1f} GB/s",
        f"{'link':<22}{device.link_bandwidth * ACHIEVED_BANDWIDTH / 1e9:.2f} GB/s",
        f"{'layers reach':<22}{calibration.compute_share:.0%} of the matrix products' rate",
        f"{'launching a layer':<22}{calibration.launch_seconds * 1e6:.0f} us",
        f"{'... to decode a token':<22}{calibration.decode_seconds * 1e6:.0f} us",
    ]
    if profile.ranks > 1:
        lines.append(f"{'a collective':<22}{calibration.collective_seconds * 1e6:.0f} us over two ranks")
        lines.append(f"{'... to decode a token':<22}{calibration.decode_collective * 1e6:.0f} us")
    if isfinite(calibration.copy_bandwidth):
        shares = (
            f"all-gather {calibration.gather_share:.0%}, reduce-scatter {calibration.scatter_share:.0%} of the link"
        )
        lines.append(f"{'ZeRO':<22}{shares}; new memory {calibration.copy_bandwidth / 1e9:.2f} GB/s")
        lines.append(f"{'... around a layer':<22}{calibration.hook_seconds * 1e6:.0f} us a pass under ZeRO 3")
    return "\n".join(lines)
