import random

import pytest
import torch

from training.data.batching import TokenBatch, plan_micro_batches


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_row_once_within_budget_and_equally_many_micro_batches(ranks):
    lengths = [random.Random(5).randint(1, 50) for _ in range(37)]
    lengths = [n + i % 7 for i, n in enumerate(lengths)]
    plans = plan_micro_batches(lengths, token_budget=120, ranks=ranks)
    rows = [row for plan in plans for batch in plan if batch.weight for row in batch.rows]
    assert sorted(rows) == list(range(37))
    assert len({len(plan) for plan in plans}) == 1
    for plan in plans:
        for batch in plan:
            assert len(batch.rows) == 1 or sum(lengths[row] for row in batch.rows) <= 120


def test_ranks_without_rows_keep_step_with_weight_zero():
    plans = plan_micro_batches([5, 4], token_budget=5, ranks=4)
    assert [[batch.weight for batch in plan] for plan in plans] == [[1.0], [1.0], [0.0], [0.0]]


def test_ranks_get_like_work():
    lengths = list(range(1, 101))
    work = [sum(lengths[row] for b in plan for row in b.rows) for plan in plan_micro_batches(lengths, 400, 2)]
    assert abs(work[0] - work[1]) <= 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_that_begin_alike_share_a_micro_batch(ranks):
    beginnings = [[7, 1], [8, 2], [7, 1], [8, 2], [9, 3], [7, 1], [8, 2], [7, 1]]
    plans = plan_micro_batches([4] * 8, token_budget=8, ranks=ranks, beginnings=beginnings)
    batches = [batch.rows for plan in plans for batch in plan]
    assert sorted(row for batch in batches for row in batch) == list(range(8))
    alike = sum(beginnings[first] == beginnings[second] for first, second in batches)
    assert alike == 3


def test_a_row_longer_than_the_budget_goes_alone():
    (plan,) = plan_micro_batches([100, 3, 3], token_budget=10)
    assert [batch.rows for batch in plan] == [[0], [1, 2]]


def test_token_batch_layout():
    rows = [(torch.tensor([5, 6]), torch.tensor([7])), (torch.tensor([8]), torch.tensor([9, 2, 3, 4]))]
    batch = TokenBatch.of(rows, device=torch.device("cpu"))
    assert batch.ids.tolist() == [5, 6, 7, 8, 9, 2, 3, 4]
    assert batch.predicting.tolist() == [1, 3, 4, 5, 6]
    assert batch.targets.tolist() == [7, 9, 2, 3, 4]
    assert batch.last.tolist() == [2, 7]
    ids, mask, positions = batch.padded()
    assert ids[mask.bool()].tolist() == batch.ids.tolist()
    assert mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert positions.tolist() == [[0, 1, 2, 3, 4]] * 2
