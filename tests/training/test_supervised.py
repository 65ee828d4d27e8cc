import pytest

from tests.supervised_steps import batches_of_epoch
from training.config import StepSettings
from training.data.rows import count_updates
from training.hybrid_engine.zero_engine import learning_rate
from training.role_settings import OptimizerSettings
from training.supervised import rows_trained_on


def test_an_epoch_uses_every_row_once_and_differs_from_the_next():
    settings = StepSettings(batch_size=4)
    first, second = (batches_of_epoch(12, settings, seed=1, epoch=e) for e in (0, 1))
    assert sorted(row for batch in first for row in batch) == list(range(12))
    assert first != second
    assert first == batches_of_epoch(12, settings, seed=1, epoch=0)
    assert first != batches_of_epoch(12, settings, seed=2, epoch=0)


def test_a_short_last_batch_is_left_out_unless_it_is_the_only_one():
    settings = StepSettings(batch_size=5)
    assert [len(batch) for batch in batches_of_epoch(12, settings, 0, 0)] == [5, 5]
    assert [len(batch) for batch in batches_of_epoch(3, settings, 0, 0)] == [3]


def test_rows_trained_on_are_those_of_the_batches():
    settings = StepSettings(batch_size=4, epochs=3, max_steps=4)  # of 10 rows: two batches each of two epochs
    batches = [batch for epoch in (0, 1) for batch in batches_of_epoch(10, settings, seed=5, epoch=epoch)]
    assert rows_trained_on(10, settings, seed=5) == sorted({row for batch in batches for row in batch})
    assert rows_trained_on(10, StepSettings(batch_size=4, max_steps=1), seed=5) == sorted(batches[0])
    assert rows_trained_on(3, settings, seed=5) == [0, 1, 2]


@pytest.mark.parametrize(("rows", "max_steps", "expected"), [(100, 0, 30), (100, 7, 7), (3, 0, 3), (100, 99, 30)])
def test_count_updates(rows, max_steps, expected):
    assert count_updates(rows, StepSettings(batch_size=10, epochs=3, max_steps=max_steps)) == expected


def test_learning_rate_rises_then_falls_to_zero():
    settings = OptimizerSettings(learning_rate=1.0, warmup=0.2, schedule="linear")
    rates = [learning_rate(settings, update, 10) for update in range(11)]
    # 2 updates of warm-up: 1/2, 1; then 1 - done over 8 updates
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0.0])
    constant = OptimizerSettings(learning_rate=1.0, warmup=0, schedule="constant")
    assert {learning_rate(constant, update, 10) for update in range(10)} == {1.0}
    cosine = OptimizerSettings(learning_rate=1.0, warmup=0, schedule="cosine")
    assert learning_rate(cosine, 5, 10) == pytest.approx(0.5)
