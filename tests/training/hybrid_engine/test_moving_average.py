"""The average of weights under ZeRO 0-3 on two ranks, against one made by hand of gathered weights; and overflows."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from tests.ranks import run_ranks

CASES = (
    *((stage, 0, dtype) for stage in (1, 2, 3) for dtype in ("float32", "bfloat16")),
    (0, 0, "float32"),
    (3, 4, "float32"),
)
"""ZeRO stage, rank of LoRA, number format."""
DECAY, UPDATES = 0.7, 3


def make_engine(ranks, model, stage: int, lora: int = 0, dtype=torch.float32):
    from inference.chat_format import ChatFormat
    from training.hybrid_engine.zero_engine import ZeroEngine
    from training.models.loading import load_causal_lm
    from training.models.policy import Policy
    from training.role_settings import LoRASettings, OptimizerSettings

    torch.manual_seed(0)
    adapters = LoRASettings(rank=lora)
    settings = OptimizerSettings(learning_rate=1e-2, warmup=0, zero_stage=stage, lora=adapters)
    policy = Policy(load_causal_lm(model, ChatFormat.load(model), torch.float32), adapters)
    return ZeroEngine(policy, settings, dtype, 10, ranks)


def train(ranks, engine, number: int) -> None:
    """One update on rows that depend on its number."""
    from training.data.batching import TokenBatch, plan_micro_batches

    generator = torch.Generator().manual_seed(number)
    rows = [tuple(torch.randint(5, 200, (length,), generator=generator) for length in (4, 6)) for _ in range(4)]

    def loss(micro_batch):
        return -engine(TokenBatch.of([rows[i] for i in micro_batch.rows], ranks.device))[0].sum() / 24

    engine.update(plan_micro_batches([10] * 4, 20, ranks.size)[ranks.rank], loss)


@torch.no_grad()
def look(ranks, engine, average) -> list[torch.Tensor]:
    """What the engine says of a row, its weights and their average."""
    from training.data.batching import TokenBatch

    batch = TokenBatch.of([(torch.tensor([5, 6]), torch.tensor([7, 8]))], ranks.device)
    return [engine(batch)[0].clone(), *engine.trained_weights().values(), *average.weights().values()]


def average_everywhere(ranks, directory):
    from inference.families import build_tiny_model
    from training.hybrid_engine.stored_weights import MovingAverage, WeightsBackup

    model = directory / "tiny"
    if ranks.is_first:
        build_tiny_model(model)
    ranks.barrier()
    found = {}
    for stage, lora, dtype in CASES:
        engine = make_engine(ranks, model, stage, lora, getattr(torch, dtype))
        average = MovingAverage(engine, DECAY)
        by_hand = engine.trained_weights()
        for number in range(UPDATES):
            train(ranks, engine, number)
            average.update()
            present = engine.trained_weights()
            by_hand = {name: DECAY * by_hand[name] + (1 - DECAY) * present[name] for name in by_hand}
        ours = average.weights()
        untouched = all(torch.equal(value, present[name]) for name, value in engine.trained_weights().items())
        place = directory / f"{stage}{lora}{dtype}"
        if ranks.is_first:
            place.mkdir()
        ranks.barrier()
        engine.save(place / "engine")
        average.save(place / "ema")
        ranks.barrier()
        shards = sum(part.numel() for part in average.averages)
        backup, before = WeightsBackup(engine, average), look(ranks, engine, average)
        backup.store()

        train(ranks, engine, UPDATES)  # one that nobody stopped, and one that goes on from what was saved
        average.update()
        expected = average.weights()
        moved = look(ranks, engine, average)
        backup.put_back()
        back = look(ranks, engine, average)
        engine.load(place / "engine")
        average.load(place / "ema")
        train(ranks, engine, UPDATES)
        average.update()
        again = average.weights()
        found[f"{stage} {lora} {dtype}"] = {
            "error": max((float((ours[name] - by_hand[name]).abs().max()) for name in by_hand), default=0.0),
            "moved": max((float((present[name] - by_hand[name]).abs().max()) for name in by_hand), default=1.0),
            "untouched": untouched,
            "resumed": all(torch.equal(again[name], expected[name]) for name in expected),
            "back": [all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) for after in (back, moved)],
            "shards": shards,
            "weights": sum(weight.numel() for weight in ours.values()),
            "dtypes": sorted({str(part.dtype) for part in average.averages}),
        }
    return found


def overflow_of_one(ranks, directory):
    """A real engine of ZeRO stage 2 that looks for overflows; the gradient of one of the two is infinite."""
    from inference.families import build_tiny_model
    from training.hybrid_engine.zero_engine import step_together

    model = directory / "tiny"
    build_tiny_model(model)
    actor, critic = (make_engine(ranks, model, 2) for _ in range(2))
    for engine in (actor, critic):
        engine.engine.optimizer.check_grad_overflow = True
    start = actor.trained_weights()

    def accumulate(engine, factor: float) -> None:
        from training.data.batching import MicroBatch, TokenBatch

        row = (torch.tensor([5, 6]), torch.tensor([7, 8]))
        engine.accumulate([MicroBatch([0])], lambda _: factor * engine(TokenBatch.of([row], ranks.device))[0].sum())

    def same(engine) -> bool:
        return all(torch.equal(weight, start[name]) for name, weight in engine.trained_weights().items())

    found = []
    for factor in (float("inf"), 1.0):
        accumulate(actor, 1.0)
        accumulate(critic, factor)
        stepped = step_together([actor, critic], ranks)[1]
        found.append((stepped, same(actor), same(critic)))
    return found


@pytest.fixture(scope="module")
def averages(tmp_path_factory):
    return run_ranks(__file__, "average_everywhere", 2, tmp_path_factory.mktemp("average"))


def test_the_average_is_that_of_gathered_weights(averages):
    for case, found in averages[0].items():
        assert found["error"] < 2e-6 < 1e-3 < found["moved"], case
        assert found["dtypes"] == ["torch.float32"], case


def test_each_rank_averages_its_own_part(averages):
    for case, found in averages[0].items():
        whole, shards = found["weights"], [each[case]["shards"] for each in averages]
        if case.startswith("0"):
            assert shards == [whole, whole]
        else:
            assert whole <= sum(shards) < 1.1 * whole and max(shards) < 0.6 * whole, case  # and padding


def test_reading_the_average_leaves_the_weights_and_a_resumed_one_is_the_same_bit_for_bit(averages):
    for found in averages:
        assert all(case["untouched"] and case["resumed"] for case in found.values())


def test_weights_and_average_go_back_to_what_was_kept(averages):
    for found in averages:
        assert all(case["back"] == [True, False] for case in found.values())


def test_an_overflow_of_one_engine_keeps_both_from_stepping_and_the_next_step_is_made(tmp_path):
    assert run_ranks(__file__, "overflow_of_one", 1, tmp_path)[0] == [[False, True, True], [True, False, False]]


class FakeOptimizer:
    """DeepSpeed's fp16 optimiser as far as overflows go: its step looks for one, and sets the scale accordingly."""

    def __init__(self, overflows: bool):
        self.overflows, self.scale, self.steps = overflows, 64.0, 0

    def has_overflow(self, partition_gradients: bool = True) -> bool:
        found, self.overflows = self.overflows, False  # ZeRO 3 forgets after one look
        return found

    def _update_scale(self, has_overflow: bool) -> None:
        self.scale *= 0.5 if has_overflow else 1.0

    def step(self) -> None:
        overflow = self.has_overflow(True)
        self._update_scale(overflow)
        self.steps += not overflow


@pytest.mark.parametrize(("actor", "critic"), [*itertools.product((False, True), repeat=2)])
def test_fp16_roles_step_together_and_only_who_overflowed_lowers_its_scale(actor, critic):
    """With fake engines: fp16 does not run on a CPU."""
    from training.distributed import Ranks
    from training.hybrid_engine.zero_engine import step_together

    alone, optimizers = Ranks(0, 1, torch.device("cpu")), [FakeOptimizer(actor), FakeOptimizer(critic)]
    engines = [
        SimpleNamespace(
            engine=SimpleNamespace(optimizer=optimizer), step=lambda each=optimizer: each.step(), ranks=alone
        )
        for optimizer in optimizers
    ]
    _, stepped = step_together(engines, alone)
    assert stepped == (not actor and not critic)
    assert [optimizer.steps for optimizer in optimizers] == [int(stepped)] * 2
    assert [optimizer.scale for optimizer in optimizers] == [32.0 if own else 64.0 for own in (actor, critic)]
    for optimizer in optimizers:  # and the next step looks for itself again
        optimizer.step()
    assert [optimizer.steps for optimizer in optimizers] == [int(stepped) + 1] * 2
