import random
import time

from training.config import StepSettings
from training.data.rows import Epochs
from training.supervised import batch_of_update


def order_of_before(size: int, salt: str) -> list[int]:
    """As each optimiser step and each prompt shuffled all rows: runs that began so go on with the same batches."""
    order = list(range(size))
    random.Random(salt).shuffle(order)
    return order


def test_the_orders_are_those_of_runs_that_began_before():
    epochs = Epochs(7, "3/prompts")
    through = [row for epoch in range(3) for row in order_of_before(7, f"3/prompts/{epoch}")]
    assert epochs.rows(0, 7) == through[:7]
    assert epochs.rows(12, 9) == through[12:21]  # the end of one epoch, the whole next one
    assert epochs.rows(3, 2) == through[3:5]  # back again
    assert sorted(epochs.order(1)) == list(range(7))


def test_a_batch_of_any_step_is_the_one_of_before():
    settings, epochs = StepSettings(batch_size=4), Epochs(11, "5")
    for number in (0, 1, 2, 5, 3):  # two batches an epoch, the last three rows of each left out
        epoch, place = divmod(number, 2)
        assert batch_of_update(epochs, settings, number) == order_of_before(11, f"5/{epoch}")[place * 4 : place * 4 + 4]


def test_an_order_is_made_once_an_epoch():
    settings, epochs = StepSettings(batch_size=32), Epochs(1_000_000, "1")
    epochs.order(0)
    begun = time.process_time()
    for number in range(100):
        batch_of_update(epochs, settings, number)
    assert (time.process_time() - begun) / 100 < 0.005
