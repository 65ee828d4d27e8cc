"""Checkpoints of every kind load again, DeepSpeed's own too; one that would run code is refused, and did not run it."""

import os

import pytest
import torch

from inference.errors import UserError
from tests.ranks import run_ranks
from training.checkpoints import Checkpoints
from training.distributed import Ranks
from training.hybrid_engine.deepspeed_setup import tensors_only

CASES = {
    **{
        f"zero{stage} {dtype}": {"zero_stage": stage, "dtype": dtype}
        for stage in range(4)
        for dtype in ("fp32", "bf16")
    },
    **{f"zero{stage} lora": {"zero_stage": stage, "lora": {"rank": 4}} for stage in (0, 3)},
    "zero1 without masters": {"zero_stage": 1, "dtype": "bf16", "master_weights": False},
    "zero2 offload": {"zero_stage": 2, "offload": "optimizer"},
    "zero3 offload": {"zero_stage": 3, "offload": "optimizer+parameters"},
}
OLD = ("zero0 fp32", "zero3 fp32")


class Payload:
    """What unpickling runs: a directory appears."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def load_everything(ranks, directory):
    """{case: whether the weights are back, and what a malicious file said}."""
    from inference.chat_format import ChatFormat
    from inference.families import build_tiny_model
    from training.hybrid_engine.zero_engine import ZeroEngine
    from training.models.loading import load_causal_lm
    from training.models.policy import Policy
    from training.role_settings import OptimizerSettings

    build_tiny_model(directory / "tiny")
    chat_format = ChatFormat.load(directory / "tiny")

    def make(case):
        values = dict(CASES[case])
        dtype = torch.bfloat16 if values.pop("dtype", "fp32") == "bf16" else torch.float32
        settings = OptimizerSettings(**{"learning_rate": 1e-2, "warmup": 0, **values})
        torch.manual_seed(0)
        policy = Policy(load_causal_lm(directory / "tiny", chat_format, torch.float32), settings.lora)
        return ZeroEngine(policy, settings, dtype, 10, ranks)

    found = {}
    for number, case in enumerate(CASES):
        checkpoints = Checkpoints(directory / f"c{number}", 2, ranks)
        engine = make(case)
        begun = engine.trained_weights()
        train(engine, ranks)
        checkpoints.save(1, engine.save, {})
        again = make(case)
        place, _ = checkpoints.newest()
        with checkpoints.reading(place):
            again.load(place)
        train(engine, ranks)  # a second update needs the optimiser's state as well
        train(again, ranks)
        kept, loaded = engine.trained_weights(), again.trained_weights()
        found[case] = {
            "equal": all(torch.equal(kept[name], loaded[name]) for name in kept),
            "moved": any(not torch.equal(kept[name], begun[name]) for name in kept),
        }
        if case in OLD:  # as earlier versions wrote it
            old = Checkpoints(directory / f"old{number}", 2, ranks)
            old.save(2, lambda at, own=engine.engine: own.save_checkpoint(str(at), "state", {"updates": 2}), {})
            place, _ = old.newest()
            again.load(place)
            train(engine, ranks)
            train(again, ranks)
            kept, loaded = engine.trained_weights(), again.trained_weights()
            found[case]["old"] = again.updates == 3 and all(torch.equal(kept[name], loaded[name]) for name in kept)
            found[case]["files"] = {}
            for file in sorted(place.rglob("*.pt")):
                good = file.read_bytes()
                values = torch.load(file, weights_only=False)
                torch.save({**values, "more": Payload(directory / "trace")}, file)
                try:
                    with checkpoints.reading(place):
                        again.load(place)
                    found[case]["files"][file.name] = "loaded"
                except UserError as error:
                    found[case]["files"][file.name] = str(error)
                file.write_bytes(good)
    return found


def train(engine, ranks) -> None:
    from training.data.batching import TokenBatch, plan_micro_batches

    generator = torch.Generator().manual_seed(1)
    rows = [tuple(torch.randint(5, 200, (length,), generator=generator) for length in (4, 6)) for _ in range(2)]

    def loss(micro_batch):
        return -engine(TokenBatch.of([rows[i] for i in micro_batch.rows], ranks.device))[0].sum() / 12

    engine.update(plan_micro_batches([10] * 2, 20, 1)[0], loss)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    return run_ranks(__file__, "load_everything", 1, directory)[0], directory


def test_good_checkpoints_load(loaded):
    found, _ = loaded
    assert found.keys() == CASES.keys()
    for case, result in found.items():
        assert result["equal"] and result["moved"] and result.get("old", True), case


@pytest.mark.parametrize("case", OLD)
def test_a_checkpoint_that_would_run_code_is_refused(loaded, case):
    found, directory = loaded
    files = found[case]["files"]
    assert len(files) == (1 if case == "zero0 fp32" else 2)
    for name, said in files.items():
        assert "would run posix.mkdir, which none of rlhf-chat asks for, so it was not read: delete" in said, name
    assert not (directory / "trace").exists()


def test_the_environment_is_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"more": Payload(tmp_path / "trace")}, tmp_path / "x.pt")
    with tensors_only(), pytest.raises(Exception, match=r"posix\.mkdir"):
        torch.load(tmp_path / "x.pt", weights_only=False)
    assert not (tmp_path / "trace").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("damage", [b"", b"hello" * 100, b"PK\x03\x04" + b"x" * 500, "half", "another"])
def test_a_damaged_file_is_a_sentence(tmp_path, damage):
    checkpoints = Checkpoints(tmp_path / "c", 2, Ranks(0, 1, torch.device("cpu")))
    checkpoints.save(7, lambda place: torch.save({"a": torch.zeros(100)}, place / "x.pt"), {})
    file = tmp_path / "c" / "7" / "x.pt"
    if damage == "half":
        damage = file.read_bytes()[: file.stat().st_size // 2]
    with pytest.raises(UserError, match=r"is damaged or of another model .*; delete .*/c/7 to go on from the start"):
        with tensors_only(), checkpoints.reading(tmp_path / "c" / "7"):
            if damage == "another":
                torch.nn.Linear(2, 2).load_state_dict(torch.load(file))
            file.write_bytes(damage)
            torch.load(file, weights_only=False)
