"""Which instances keep the tail, and which samples go where: all by hand."""

from training.fusion.board import FusionPolicy, Repacking, SampleLengths, SampleMove, decide


def policy(threshold, rows):
    return FusionPolicy(threshold, rows, tick=1.0, unit_tokens=1)


def samples(*responses, first=0, prompt=10):
    """Indices from `first` on."""
    return [SampleLengths(first + place, prompt, response) for place, response in enumerate(responses)]


def to_come(response):
    """All end at 100 tokens."""
    return 100 - response


def test_nothing_happens_above_the_threshold():
    left = {0: samples(5), 1: samples(6, first=1), 2: samples(7, first=2)}
    assert decide(left, policy(threshold=2, rows=4), to_come) is None
    assert decide(left, policy(threshold=3, rows=4), to_come).keepers == (0,)


def test_as_few_instances_as_hold_the_rest_with_so_many_rows():
    left = {0: samples(5, 5), 1: samples(5, first=2), 2: samples(5, first=3), 3: samples(5, first=4)}
    kept = [decide(left, policy(threshold=5, rows=rows), to_come) for rows in (1, 2, 3, 4, 5)]
    assert [repacking and len(repacking.keepers) for repacking in kept] == [None, 3, 2, 2, 1]


def test_the_instances_with_most_work_to_come_keep_the_tail():
    """To come: 10, 2 x 40, 95, 2 x 50 tokens; equal work goes by the number of the instance."""
    left = {0: samples(90), 1: samples(60, 60, first=1), 2: samples(5, first=3), 3: samples(50, 50, first=4)}
    assert decide(left, policy(threshold=6, rows=3), to_come).keepers == (2, 3)
    alike = {4: samples(7), 1: samples(7, first=1), 2: samples(7, first=2)}
    assert decide(alike, policy(threshold=3, rows=2), to_come).keepers == (1, 2)


def test_longest_first_to_the_keeper_with_the_fewest_samples_then_tokens():
    """Keepers 0 (two samples, 100 tokens in sum) and 3 (one, 50). Of 40, 30 and 20 tokens, 40 goes to 3 (fewer
    samples), 30 to 3 or 0 by tokens: 90 against 100, so 3; 20 to 0 (two samples against three)."""
    left = {
        0: [SampleLengths(0, 10, 40), SampleLengths(1, 10, 40)],
        1: [SampleLengths(2, 10, 10), SampleLengths(3, 10, 20)],
        2: [SampleLengths(4, 20, 20)],
        3: [SampleLengths(5, 50, 0)],
    }
    to_come = {40: 90, 0: 90}  # the others have next to nothing
    repacking = decide(left, policy(threshold=6, rows=3), lambda response: to_come.get(response, 1))
    assert repacking == Repacking(
        keepers=(0, 3), moves=(SampleMove(4, 40, 2, 3), SampleMove(3, 30, 1, 3), SampleMove(2, 20, 1, 0))
    )  # fmt: skip


def test_equal_lengths_move_in_the_order_of_their_indices():
    left = {0: samples(1, first=0), 1: samples(5, 5, first=3), 2: samples(5, 5, first=1)}
    moves = decide(left, policy(threshold=5, rows=5), lambda response: 99 if response == 1 else 1).moves
    assert [(move.index, move.source, move.target) for move in moves] == [(1, 2, 0), (2, 2, 0), (3, 1, 0), (4, 1, 0)]


def test_empty_instances_are_freed_without_a_move():
    left = {0: samples(5), 1: [], 2: samples(6, first=1)}
    assert decide(left, policy(threshold=0, rows=4), to_come) == Repacking(keepers=(0, 2))
    assert decide(left, policy(threshold=2, rows=1), to_come) == Repacking(keepers=(0, 2))
    assert decide({0: [], 1: []}, policy(threshold=0, rows=4), to_come) == Repacking(keepers=())


def test_no_repacking_that_frees_none():
    left = {0: samples(5, 6), 1: samples(7, 8, first=2)}
    assert decide(left, policy(threshold=0, rows=4), to_come) is None
    assert decide(left, policy(threshold=9, rows=1), to_come) is None, "four instances would be wanted"
    assert decide(left, policy(threshold=9, rows=2), to_come) is None
    assert decide({1: samples(3)}, policy(threshold=9, rows=9), to_come) is None
