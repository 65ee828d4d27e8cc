"""Profiles of machines: kept in a file, read again, used as hardware; what the meter measures has the right unit."""

import itertools
from dataclasses import fields

import pytest
import torch

from inference.errors import UserError
from training.distributed import Ranks
from training.planner.hardware import Calibration, Device, MachineProfile, profile_file, read_profile
from training.planner.profile import Meter

PROFILE = MachineProfile(
    Device("this-machine", 8e9, {"fp32": 1e11, "bf16": 4e11}, 2e10, 1.5e9, 2e10),
    2,
    Calibration(0.8, 2e-4, 3e-4, 0.0),
    {"processor": "of a test"},
)


def test_a_profile_survives_its_file(tmp_path):
    file = tmp_path / "machine.yaml"
    file.write_text(PROFILE.to_yaml())
    assert read_profile(file) == PROFILE
    cluster = read_profile(file).cluster
    assert (cluster.nodes, cluster.devices_per_node, cluster.calibration) == (1, 2, PROFILE.calibration)


def test_a_profile_of_an_earlier_version_opens(tmp_path):
    """What it does not say costs nothing beyond the link, as in the data sheets."""
    file, later = tmp_path / "machine.yaml", [field.name for field in fields(Calibration)[4:]]
    file.write_text(
        "".join(line for line in PROFILE.to_yaml().splitlines(True) if line.split(":")[0].strip() not in later)
    )
    assert read_profile(file) == PROFILE and "share: 0.8" in file.read_text() and "copy" not in file.read_text()


@pytest.mark.parametrize("text", ["", "device: 3", "[1, 2]", "a: b: c", "device: {name: x}\nranks: 1\ncalibration: {}"])
def test_a_file_that_is_no_profile_is_refused_in_a_sentence(tmp_path, text):
    file = tmp_path / "machine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"no profile of a machine .*rlhf-chat profile"):
        read_profile(file)


def test_a_machine_that_was_not_profiled_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CHAT_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="rlhf-chat profile"):
        read_profile(profile_file(4))


@pytest.mark.parametrize(("rates", "expected"), [
    ({"fp32": 19.5, "bf16": 312.0, "fp16": 312.0}, "bf16"),
    ({"fp32": 15.7, "bf16": 15.7, "fp16": 125.0}, "fp16"),
    ({"fp32": 100.0, "bf16": 110.0}, "fp32"),
])  # fmt: skip
def test_precision_is_the_fast_format(rates, expected):
    assert Device("x", 1, rates, 1, 1, 1).precision == expected


def test_the_meter_counts_operations_and_bytes(monkeypatch):
    """With a clock that says one second for everything, rates are the work itself."""
    meter = Meter(Ranks(0, 1, torch.device("cpu")))
    monkeypatch.setattr(meter, "seconds", lambda program: program() is None or 1.0)
    assert meter.matrix_products() == {"fp32": 2 * 1024**3, "bf16": 2 * 1024**3}
    assert meter.memory_bandwidth() == 8192 * 4096 * 4


def test_the_meter_counts_what_a_rank_sends_in_zero_s_collectives(monkeypatch):
    """Of 128 MiB in four ranks' parts."""
    meter, sizes = Meter(Ranks(0, 4, torch.device("cpu"))), []
    monkeypatch.setattr(meter, "seconds", lambda program, _: program() or 0.5)
    for collective in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        monkeypatch.setattr(
            f"training.planner.profile.dist.{collective}", lambda *tensors: sizes.append(tuple(map(len, tensors)))
        )
    assert meter.gather_bandwidth() == meter.scatter_bandwidth() == 2**27 * 3 / 4 / 0.5
    assert sizes == [(2**25, 2**23), (2**23, 2**25)]
    monkeypatch.setattr(meter, "seconds", lambda program: len(program()) / 2**25)
    assert meter.copy_bandwidth() == 2**26 / 0.5


def test_a_collective_of_a_decode_step_is_what_a_tensor_parallel_layer_takes_longer(monkeypatch):
    """Two a layer, in each of 8 steps; between four ranks two rounds."""
    meter, taken = Meter(Ranks(0, 4, torch.device("cpu"))), []

    def decode(model, _):
        taken.append([layer.fc1.out_features for layer in model.model.decoder.layers])
        return {1: 0.4, 2: 2.0}[len(taken)]

    monkeypatch.setattr(meter, "_decode", decode)
    assert meter.decode_collective_seconds(0.02) == pytest.approx((1.6 / 4 / 8 - 0.02) / 2 / 2)
    assert taken == [[256] * 2, [256] * 6]  # of 1,024


def test_a_layer_of_a_decode_step_is_what_a_deeper_model_takes_longer(monkeypatch):
    """16 layers more, in the 8 steps behind the prefill."""
    meter, lengths = Meter(Ranks(0, 1, torch.device("cpu"))), []

    def seconds(program, _):
        lengths.append([len(sample.response_ids) for sample in program()])
        return {1: 0.4, 2: 2.0}[len(lengths)]

    monkeypatch.setattr(meter, "seconds", seconds)
    assert meter.decode_seconds() == pytest.approx(1.6 / 16 / 8)
    assert lengths == [[9] * 16] * 2


def test_the_meter_takes_the_median(monkeypatch):
    meter = Meter(Ranks(0, 1, torch.device("cpu")))
    calls = []
    assert meter.seconds(lambda: calls.append(1)) >= 0 and len(calls) == 9
    clock = itertools.count(step=2.5)
    monkeypatch.setattr("training.planner.profile.time.perf_counter", lambda: next(clock))
    assert meter.seconds(lambda: calls.append(1)) == 2.5 and len(calls) == 10  # a slow one is not repeated
