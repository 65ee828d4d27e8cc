"""The cost curves by hand, and fits that find known costs again."""

import json
import random
from dataclasses import asdict, replace

import pytest

from inference.generation.engine import StepWork
from training.fusion.costs import Costs, Measured, fit, fit_line

COSTS = Costs(
    rows=(1, 4, 8), step=(1.0, 1.0, 3.0), per_context=0.1, prefill=(1.0, 0.1), score=(2.0, 0.5),
    bandwidth=16.0, cache_bytes=8,
)  # fmt: skip


def test_a_decode_step_is_a_curve_over_rows_and_a_share_of_the_context():
    assert [COSTS.step_seconds(rows) for rows in (1, 2, 4, 6, 8)] == pytest.approx([1, 1, 1, 2, 3])
    assert COSTS.step_seconds(16) == pytest.approx(3 + 8 * 0.5), "the last slope goes on"
    assert COSTS.decode_seconds(6, 10) == pytest.approx(3)
    alike = replace(COSTS, rows=(1,), step=(0.25,))
    assert [alike.step_seconds(rows) for rows in (1, 9)] == [0.25, 0.25]


def test_other_work_is_a_start_and_a_share_of_each_token():
    assert COSTS.prefill_seconds(20) == pytest.approx(3)
    assert COSTS.score_seconds(20) == pytest.approx(12)
    assert COSTS.work_seconds(StepWork(prefilled=20)) == pytest.approx(3)
    assert COSTS.work_seconds(StepWork(rows=6, context=10)) == pytest.approx(3)


def test_the_cache_moves_where_that_is_faster_than_a_new_prefill():
    """Four tokens add 0.4 s to a prefill, whose start is shared with others; 32 bytes take 2 s at 16 bytes a second,
    0.5 s at 64 and 0.25 s at 128."""
    assert COSTS.move_seconds(4) == 2
    assert not COSTS.moves_cache(4)
    assert not replace(COSTS, bandwidth=64.0).moves_cache(4)
    assert replace(COSTS, bandwidth=128.0).moves_cache(4)
    assert not replace(COSTS, cache_bytes=0).moves_cache(4), "nothing is known of the cache"


def test_costs_from_a_checkpoint_are_the_same():
    assert Costs.from_dict(json.loads(json.dumps(asdict(COSTS)))) == COSTS


TRUE = Costs(
    rows=(1, 2, 4, 8), step=(1e-3, 1e-3, 1.5e-3, 4e-3), per_context=2e-6, prefill=(5e-4, 1e-5), score=(1e-3, 4e-5),
    bandwidth=1e9, cache_bytes=64,
)  # fmt: skip


def measurements(costs, seed=0, noise=0.0, outliers=0.0):
    """Of all three kinds; each off by up to a share `noise`, and a share of them taking 3 to 6 times as long."""
    drawn = random.Random(seed)
    works = [StepWork(rows=drawn.randint(1, 8), context=drawn.randint(20, 2000)) for _ in range(300)]
    works += [StepWork(prefilled=drawn.randint(16, 1024)) for _ in range(60)]

    def disturbed(seconds):
        slow = drawn.uniform(3, 6) if drawn.random() < outliers else 1
        return seconds * slow * (1 + drawn.uniform(-noise, noise))

    found = [Measured(disturbed(costs.work_seconds(work)), work=work) for work in works]
    amounts = [drawn.randint(64, 2048) for _ in range(60)]
    return found + [Measured(disturbed(costs.score_seconds(tokens)), scored=tokens) for tokens in amounts]


def flat(costs):
    return [*costs.step, costs.per_context, *costs.prefill, *costs.score]


@pytest.mark.parametrize(("noise", "outliers", "within"), [(0.0, 0.0, 1e-6), (0.0, 0.03, 1e-6), (0.02, 0.03, 0.05)])
def test_a_fit_finds_the_costs_again(noise, outliers, within):
    costs = fit(measurements(TRUE, 1, noise, outliers), bandwidth=1e9, cache_bytes=64)
    assert (costs.rows, costs.bandwidth, costs.cache_bytes) == (TRUE.rows, 1e9, 64)
    assert flat(costs) == pytest.approx(flat(TRUE), rel=within)


def test_between_rows_that_were_seen_the_curve_is_straight():
    """Seen are 1, 3 and 9 rows alone: nothing is known of 2, 4 and 8 but what lies between them."""
    straight = replace(TRUE, rows=(1, 9), step=(1e-3, 9e-3))
    works = [StepWork(rows=rows, context=context) for rows in (1, 3, 9) for context in (10, 500, 900)]
    decoded = [Measured(straight.work_seconds(work), work=work) for work in works]
    costs = fit([*decoded, *(m for m in measurements(TRUE) if not (m.work and m.work.rows))], 1e9, 64)
    assert [costs.step_seconds(rows) for rows in (1, 2, 3, 5, 9)] == pytest.approx([1e-3, 2e-3, 3e-3, 5e-3, 9e-3])


@pytest.mark.parametrize("kind", ["decoded", "prefilled", "scored"])
def test_no_fit_while_a_kind_of_work_has_not_been_seen(kind):
    def seen(m):
        return {"decoded": m.work and m.work.rows, "prefilled": m.work and m.work.prefilled, "scored": m.scored}[kind]

    assert fit([m for m in measurements(TRUE) if not seen(m)], 1e9, 64) is None


def test_more_rows_never_cost_less_and_more_context_neither():
    """Measured are steps that get cheaper with rows and with context, as noise makes them."""
    falling = replace(TRUE, step=(4e-3, 3.8e-3, 3.5e-3, 3e-3), per_context=-1e-7)
    costs = fit(measurements(falling), 1e9, 64)
    assert list(costs.step) == sorted(costs.step)
    assert costs.per_context == 0
    assert all(costs.step_seconds(rows + 1) >= costs.step_seconds(rows) for rows in range(1, 20))
    assert costs.step_seconds(1) == pytest.approx(4e-3, rel=0.05)


def test_amounts_too_much_alike_make_a_line_through_the_origin():
    """Shares of a token: 2, 2 and 5; the median is 2."""
    assert fit_line([100, 101, 102], [200, 202, 510]) == (0, 2)
    assert fit_line([100, 200, 300], [300, 200, 100])[0] == 0, "a line that falls is none"
    assert fit_line([100, 200, 300], [210, 410, 610]) == pytest.approx((10, 2))


def test_a_block_of_steps_is_so_many_steps():
    """On CUDA several decode steps are one piece of work, with rows and context summed."""
    blocks = [
        Measured(4 * m.seconds, replace(m.work, rows=4 * m.work.rows, context=4 * m.work.context, steps=4))
        if m.work is not None and m.work.rows
        else m
        for m in measurements(TRUE)
    ]
    single, block = fit(measurements(TRUE), 1e9, 64), fit(blocks, 1e9, 64)
    assert block.step == pytest.approx(single.step) and block.per_context == pytest.approx(single.per_context)
    work = StepWork(rows=4 * 3, context=4 * 100, steps=4)
    assert single.work_seconds(work) == pytest.approx(4 * single.decode_seconds(3, 100))
