"""Checkpoints of one number of ranks and ZeRO stage open on another: weights, moments and steps to the bit."""

import json
import re
from collections import Counter

import pytest
import torch
from torch import Tensor

from inference.errors import UserError
from tests.ranks import run_ranks
from tests.training.hybrid_engine.test_moving_average import look, train
from training.checkpoints import Checkpoints
from training.distributed import Ranks
from training.hybrid_engine.fragments import Fragment, FragmentReader, write_fragments

KINDS = {
    "fp32": {},
    "lora": {"lora": {"rank": 4}},
    "bf16": {"dtype": "bf16"},
    "bf16 without masters": {"dtype": "bf16", "master_weights": False},
}
SIZES = (2, 3, 1, 4)
"""Ranks, one number after the other."""
STAGES = ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1))
"""ZeRO stages beside them: each comes after each other one."""
CASES = [*(("fp32", way) for way in range(4)), ("lora", 1), ("bf16", 2), ("bf16 without masters", 3)]
ALONE = Ranks(0, 1, torch.device("cpu"))


def make(ranks, model, kind: str, stage: int):
    from inference.chat_format import ChatFormat
    from training.hybrid_engine.zero_engine import ZeroEngine
    from training.models.loading import load_causal_lm
    from training.models.policy import Policy
    from training.role_settings import OptimizerSettings

    values = dict(KINDS[kind])
    dtype = torch.bfloat16 if values.pop("dtype", "") else torch.float32
    settings = OptimizerSettings(learning_rate=1e-2, warmup=0, weight_decay=0.1, zero_stage=stage, **values)
    torch.manual_seed(ranks.size)
    policy = Policy(load_causal_lm(model, ChatFormat.load(model), torch.float32), settings.lora)
    return ZeroEngine(policy, settings, dtype, 10, ranks)


def go_on_everywhere(ranks, directory) -> list[dict]:
    """By turn and case: fewer or more ranks open what was written, and write it as it is, and after two updates."""
    from inference.families import build_tiny_model

    if ranks.is_first:
        build_tiny_model(directory / "tiny")
    found: list[dict] = []
    for turn, size in enumerate(SIZES):
        group = ranks.part(range(size))
        ranks.barrier()
        found.append({})
        for kind, way in CASES if group is not None else ():
            found[-1][f"{kind} {way}"] = go_on(group, directory, kind, way, turn)
    return found


def go_on(ranks, directory, kind: str, way: int, turn: int) -> dict:
    from training.hybrid_engine.stored_weights import MovingAverage, WeightsBackup

    engine = make(ranks, directory / "tiny", kind, STAGES[way][turn])
    average = MovingAverage(engine, 0.5)
    at, before = directory / f"{turn} {kind} {way}", directory / f"{turn - 1} {kind} {way}"
    by_kept = None
    if turn:
        backup = WeightsBackup(engine, average)
        backup.load(before / "kept")
        backup.put_back()
        by_kept = said(ranks, engine, average)
        average = MovingAverage(engine, 0.5)
        engine.load(before / "trained")
        average.load(before / "ema")
    engine.save(at / "opened")
    average.save(at / "opened ema")
    opened = said(ranks, engine, average)
    for number in range(2):
        train(ranks, engine, 10 * turn + number)
        average.update()
    engine.save(at / "trained")
    average.save(at / "ema")
    WeightsBackup(engine, average).save_present(at / "kept")
    return {
        "kept": by_kept,
        "opened": opened,
        "trained": said(ranks, engine, average),
        "groups": [(group["weight_decay"], group["lr"]) for group in engine.engine.optimizer.param_groups],
        "written": sum(file.stat().st_size for file in (at / "trained").glob(f"{ranks.rank}.*")),
    }


def said(ranks, engine, average) -> list:
    """By forward passes, and the norms of the averages on the first rank."""
    outputs, *weights = look(ranks, engine, average)
    averages = weights[len(weights) // 2 :]
    return [outputs.float().tolist(), [float(weight.double().norm()) for weight in averages]]


def contents(directory) -> dict[str, Tensor]:
    """Every value of every parameter in the files, put together by hand from what safetensors reads."""
    from safetensors import safe_open

    runs: dict[str, dict[int, Tensor]] = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                kind, start, name = key.split(":", 2)
                parts = runs.setdefault(f"{kind} {name}", {})
                assert int(start) not in parts, "two ranks wrote the same"
                parts[int(start)] = opened.get_tensor(key)
            for name, step in json.loads(opened.metadata()["notes"]).get("steps", {}).items():
                runs[f"step {name}"] = {0: torch.tensor([step])}
    for name, parts in runs.items():
        ends = [start + len(part) for start, part in sorted(parts.items())]
        assert sorted(parts) == [0, *ends[:-1]], name  # each value once
    return {name: torch.cat([part for _, part in sorted(parts.items())]) for name, parts in runs.items()}


@pytest.fixture(scope="module")
def turns(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fragments")
    return run_ranks(__file__, "go_on_everywhere", max(SIZES), directory), directory


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_what_is_opened_is_what_was_written(turns, kind, way):
    found, directory = turns
    for turn in range(1, len(SIZES)):
        for written, opened in (("trained", "opened"), ("ema", "opened ema")):
            old = contents(directory / f"{turn - 1} {kind} {way}" / written)
            new = contents(directory / f"{turn} {kind} {way}" / opened)
            assert old.keys() == new.keys()
            assert all(torch.equal(old[name], new[name]) for name in old), turn
        kinds = Counter(name.split()[0] for name in contents(directory / f"{turn} {kind} {way}" / "trained"))
        assert kinds.keys() == {"weight", "exp_avg", "exp_avg_sq", "step"} and len(set(kinds.values())) == 1
        before, after = (found[0][number][f"{kind} {way}"] for number in (turn - 1, turn))
        assert before["trained"] == after["opened"] == after["kept"] != after["trained"], turn
        decays = sorted({decay for decay, _ in after["groups"]})
        assert decays == ([0.1] if kind == "lora" else [0.0, 0.1])


def test_ranks_write_like_parts(turns):
    for turn, size in enumerate(SIZES):
        for kind, way in CASES:
            sizes = [of_rank[turn][f"{kind} {way}"]["written"] for of_rank in turns[0][:size]]
            if kind != "lora":  # whose headers are longer than their values
                assert max(sizes) < 1.2 * sum(sizes) / size, (turn, kind, way)


def write_some(directory, count: int = 1000, dtype=torch.float32) -> None:
    values = torch.arange(count, dtype=dtype)
    for rank in range(2):
        part = Fragment("a:b", count, 0, count, 0, 0).share(rank, 2)
        write_fragments(directory / f"{rank}.safetensors", [part], {"weight": [values]}, {"updates": 1})


def test_bytes_that_are_asked_for_are_read_and_no_others(tmp_path):
    write_some(tmp_path)
    flat = torch.full((20,), -1.0)
    FragmentReader(tmp_path).read([Fragment("a:b", 1000, 495, 10, 0, 5)], {"weight": [flat]})
    assert flat.tolist() == [-1.0] * 5 + [float(value) for value in range(495, 505)] + [-1.0] * 5


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda place: (place / "1.safetensors").unlink(), "has 500 values there and 1000 here"),
        (lambda place: (place / "0.safetensors").unlink(), "is not whole"),
        (lambda place: [file.unlink() for file in place.iterdir()], "holds no"),
        (lambda place: (place / "1.safetensors").write_bytes(b"\xff" * 100), "1.safetensors is cut"),
        (lambda place: (place / "1.safetensors").write_bytes(b""), "JSONDecodeError"),
        (lambda place: write_some(place, 999), "has 999 values there and 1000 here"),
        (lambda place: write_some(place, 1000, torch.bfloat16), "is BF16 there and F32 here"),
        (lambda place: cut(place / "1.safetensors"), "is cut"),
    ],
)
def test_what_is_damaged_or_of_another_model_is_a_sentence(tmp_path, damage, said):
    checkpoints = Checkpoints(tmp_path / "c", 2, ALONE)
    checkpoints.save(7, write_some, {})
    place = tmp_path / "c" / "7"
    (place / "state.json").unlink()
    damage(place)
    with pytest.raises(UserError, match=rf"damaged or of another model \(.*{re.escape(said)}.*\); delete .*/c/7 to go"):
        with checkpoints.reading(place):
            FragmentReader(place).read([Fragment("a:b", 1000, 0, 1000, 0, 0)], {"weight": [torch.zeros(1000)]})


def cut(file) -> None:
    file.write_bytes(file.read_bytes()[:-4])
