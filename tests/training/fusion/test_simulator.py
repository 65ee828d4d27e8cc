"""The simulator against closed forms, a step-by-step loop, and what must hold for any lengths."""

import itertools
import math
import random
from dataclasses import replace

import pytest

from inference.generation.engine import PREFILL_TOKENS
from training.fusion import simulator
from training.fusion.board import FusionPolicy, SampleLengths
from training.fusion.costs import Costs
from training.fusion.simulator import DecodingInstance, SimulatorConfig, fused, handed_out, serial

COSTS = Costs(rows=(1,), step=(1.0,), per_context=0.0, prefill=(2.0, 0.5), score=(3.0, 0.25))
"""Round numbers, for figures by hand."""
CONFIG = SimulatorConfig(COSTS, slots=16)
FLAT = Costs(rows=(1,), step=(1.0,), per_context=0.0, prefill=(0.0, 0.0), score=(0.0, 1e-6))
"""Decoding alone costs anything, and a step of many rows no more than one of few."""


def policy(threshold=0, rows=16, tick=4.0, unit_tokens=64):
    return FusionPolicy(threshold, rows, tick, unit_tokens)


def never_ends(tokens):
    """Tokens to come, where nothing is known."""
    return 1.0


def samples(*responses, prompt=4, first=0):
    return [SampleLengths(first + place, prompt, response) for place, response in enumerate(responses)]


def random_shares(seed, instances=6, each=8, longest=120):
    """Lognormal lengths, dealt out one by one."""
    drawn = random.Random(seed)
    made = [
        SampleLengths(
            index, drawn.randint(1, 40), min(longest, max(1, round(drawn.lognormvariate(math.log(longest / 8), 0.9))))
        )
        for index in range(instances * each)
    ]
    return [made[place::instances] for place in range(instances)]


def to_come(shares):
    """Mean tokens to come over these very lengths."""
    lengths = [sample.response for share in shares for sample in share]

    def remaining(tokens):
        longer = [length for length in lengths if length > tokens]
        return sum(longer) / len(longer) - tokens if longer else 1.0

    return remaining


def test_one_instance_without_a_tail():
    """Two prompts of 4 tokens: 2 + 8/2 s, each with its first token; 4 steps of 1 s; 18 tokens scored: 3 + 18/4 s."""
    outcome = serial([samples(5, 5)], CONFIG)
    assert (outcome.generated, outcome.seconds) == (10, 17.5)
    attending = replace(CONFIG, costs=replace(COSTS, per_context=0.125))
    assert serial([samples(5, 5)], attending).generated == 10 + 0.125 * 2 * (4 + 5 + 6 + 7)


def test_serial_is_generation_and_then_scoring():
    """Instances end after 2 + 2 + 9 and 2 + 2 + 1 s. 14 + 6 tokens are scored: 3 + 14/4 s beside 3 + 6/4 s."""
    outcome = serial([samples(10), samples(2, first=1)], CONFIG)
    assert (outcome.generated, outcome.seconds) == (13, 13 + 6.5)

    assert [[(span.kind, span.start, span.end) for span in rank] for rank in outcome.spans] == [
        [("generate", 0, 13), ("score", 13, 19.5)],
        [("generate", 0, 5), ("score", 13, 17.5)],
    ]


def test_with_fusion_the_instance_that_ends_first_scores_at_once():
    """As above: the second instance scores its own sample from 5 to 9.5 s, the first one its own from 13 to 19.5 s...
    unless the second one is free first, which it is; nobody waits for the end of generation."""
    outcome = fused([samples(10), samples(2, first=1)], CONFIG, policy(), never_ends)
    assert (outcome.generated, outcome.seconds, outcome.moved, outcome.repackings) == (13, 19.5, 0, 0)
    assert [[(span.kind, span.start, span.end) for span in rank] for rank in outcome.spans] == [
        [("generate", 0, 13)],
        [("generate", 0, 5), ("score", 5, 9.5), ("score", 13, 19.5)],
    ]


def test_a_tail_is_gathered_at_the_tick_by_hand():
    """Three instances, one sample of 40 tokens each, two of them with one of 2 as well; steps of 1 s, no other costs.
    At tick 1 (4 s) three are unfinished and it is decided; at tick 2 (8 s) two are given away, with 9 tokens each; the
    keeper takes them at tick 3 (12 s, 13 tokens of its own) and the last token is drawn 31 steps later."""
    shares = [samples(40), samples(40, 2, first=1), samples(40, 2, first=3)]
    outcome = fused(shares, SimulatorConfig(FLAT, slots=8), policy(threshold=3, rows=3), never_ends)
    assert (outcome.repackings, outcome.moved) == (1, 2)
    assert outcome.generated == 12 + 31
    assert [rank[0].end for rank in outcome.spans] == [43, 8, 8]


def test_a_moved_sample_is_never_taken_before_it_was_given_away():
    """The keeper's own sample ends at 5 s, after the decision at 4 s; the other one leaves its instance at 8 s with 9
    of 40 tokens, so that it cannot end before 8 + 31 s."""
    shares = [samples(6), samples(40, first=1)]
    outcome = fused(shares, SimulatorConfig(FLAT, slots=8), policy(threshold=2, rows=2), never_ends)
    assert outcome.moved == 1
    assert outcome.generated >= 8 + 31


@pytest.mark.parametrize("tensor", [1, 2])
def test_each_rank_does_one_thing_after_the_other(tensor):
    shares = random_shares(3)
    config = replace(CONFIG, tensor=tensor, costs=replace(COSTS, prefill=(0.5, 0.01), score=(0.5, 0.02)))
    for outcome in (
        serial(shares, config),
        fused(shares, config, policy(), to_come(shares)),
        fused(shares, config, policy(threshold=12), to_come(shares)),
    ):
        assert len(outcome.spans) == 6 * tensor
        for rank in outcome.spans:
            assert all(before.end <= after.start for before, after in itertools.pairwise(rank))
            assert rank[-1].end <= outcome.seconds


@pytest.mark.parametrize("seed", range(5))
def test_threshold_0_never_moves_a_sample(seed):
    shares = random_shares(seed)
    costs = replace(COSTS, rows=(1, 8), step=(1.0, 2.0), per_context=1e-3)
    config = SimulatorConfig(costs, slots=8)
    without, outcome = serial(shares, config), fused(shares, config, policy(), to_come(shares))
    assert (outcome.moved, outcome.repackings) == (0, 0)
    assert outcome.generated == pytest.approx(without.generated)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("threshold", [0, 6, 16, 24, 40])
def test_with_scoring_that_is_cheap_fusion_costs_ticks_at_most(seed, threshold):
    """A sample that moves loses the time between two ticks and a step, at each repacking."""
    shares, config, tick = random_shares(seed), SimulatorConfig(FLAT, slots=64), 4.0
    outcome = fused(shares, config, policy(threshold, 8, tick), to_come(shares))
    assert outcome.seconds <= serial(shares, config).seconds + outcome.repackings * (tick + 2) + 0.01


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("threshold", [0, 6, 16, 24, 40])
def test_the_speed_up_is_at_most_1_plus_score_over_generate(seed, threshold):
    """Where rows are free and samples do not wait for slots, no order of work can end before the longest sample."""
    shares, costs = random_shares(seed), replace(FLAT, score=(0.5, 0.1), prefill=(1.0, 1e-3))
    config = SimulatorConfig(costs, slots=64)
    without = serial(shares, config)
    outcome = fused(shares, config, policy(threshold, 8), to_come(shares))
    bound = 1 + (without.seconds - without.generated) / without.generated
    assert without.seconds / outcome.seconds <= bound * (1 + 1e-9)
    assert bound > 1.2, "there was something to gain"


@pytest.mark.parametrize("seed", range(8))
def test_more_bandwidth_never_hurts(seed):
    """Where a prefill has no start that several samples could share."""
    shares = random_shares(seed)
    costs = replace(COSTS, prefill=(0.0, 0.2), score=(0.0, 1e-3), cache_bytes=100)
    seconds = []
    for bandwidth in (1.0, 200.0, 500.0, 1000.0, 1e4, 1e9):
        config = SimulatorConfig(replace(costs, bandwidth=bandwidth), slots=64)
        outcome = fused(shares, config, policy(16, 16, tick=5.0), to_come(shares))
        assert outcome.moved
        seconds.append(outcome.seconds)
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] < seconds[0]


def test_ended_samples_are_handed_out_at_the_first_tick_once_somebody_scores():
    """Samples of 8 tokens end at 1 and 6 s, one of 24 at 50 s; from 10 s on there are ranks that score. What is there
    goes out at 10 s, the rest when the instance ends."""
    instance = DecodingInstance([], CONFIG)
    instance.clock = 50.0
    instance.ended = [(1.0, SampleLengths(0, 4, 4)), (6.0, SampleLengths(1, 4, 4)), (50.0, SampleLengths(2, 4, 20))]
    units = handed_out(instance, 10.0, policy(unit_tokens=8))
    assert [(time, tokens) for time, _, tokens in units] == [(10, 8), (10, 8), (50, 24)]


def test_half_a_unit_waits_for_more():
    """Units of 16 tokens: 8 + 8 make one at 10 s, the third sample waits though 8 is just half; it is not less."""
    instance = DecodingInstance([], CONFIG)
    instance.clock = 13.0
    instance.ended = [
        (1.0, SampleLengths(0, 4, 4)),
        (2.0, SampleLengths(1, 4, 4)),
        (3.0, SampleLengths(2, 4, 3)),
        (13.0, SampleLengths(3, 4, 4)),
    ]
    units = handed_out(instance, 10.0, policy(unit_tokens=16))
    assert [(time, tokens) for time, _, tokens in units] == [(10, 16), (13, 15)]
    assert [(time, tokens) for time, _, tokens in handed_out(instance, math.inf, policy(unit_tokens=16))] == [
        (13, 16),
        (13, 15),
    ]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("threshold", [0, 12, 30])
def test_no_tick_is_skipped_at_which_something_is_decided(seed, threshold, monkeypatch):
    shares, config = random_shares(seed), SimulatorConfig(COSTS, slots=4)  # a prefill takes many ticks
    asked = policy(threshold, 4, tick=5.3)
    outcome = fused(shares, config, asked, to_come(shares))
    monkeypatch.setattr(simulator, "first_tick", lambda active, ends, policy: 1)
    assert fused(shares, config, asked, to_come(shares)) == outcome


def step_by_step(share, config, until):
    """A second implementation of `DecodingInstance.advance`: one step at a time. Returns clock, ends by index, tokens
    by index of what is left."""
    costs, clock, ends = config.costs, 0.0, {}
    tokens = {sample.index: 0 for sample in share}
    by_index = {sample.index: sample for sample in share}
    queue, running = [sample.index for sample in share], []
    while (queue or running) and clock < until:
        admitted = []
        while queue and len(running) + len(admitted) < config.slots:
            prompts = sum(by_index[index].prompt for index in [*admitted, queue[0]])
            if admitted and prompts > PREFILL_TOKENS:
                break
            admitted.append(queue.pop(0))
        if admitted:
            clock += costs.prefill_seconds(sum(by_index[index].prompt for index in admitted))
            running += admitted
            grown = admitted
        else:
            attended = sum(by_index[index].prompt + tokens[index] - 1 for index in running)
            clock += costs.decode_seconds(len(running), attended)
            grown = running
        for index in grown:
            tokens[index] += 1
        for index in [index for index in running if tokens[index] == by_index[index].response]:
            running.remove(index)
            ends[index] = clock
            del tokens[index]
    return clock, ends, tokens


@pytest.mark.parametrize("seed", range(20))
def test_steps_summed_in_closed_form_are_those_made_one_by_one(seed):
    """With few slots, prompts that do not all fit one prefill, and stops in the middle."""
    drawn = random.Random(seed)
    costs = Costs((1, 2, 5), (1.0, 1.25, 2.0), per_context=1e-4, prefill=(0.75, 1e-3), score=(0.0, 1.0))
    config = SimulatorConfig(costs, slots=drawn.randint(1, 6))
    share = [
        SampleLengths(index, drawn.choice([1, 20, 1500, 5000]), drawn.choice([1, 2, 7, 30, drawn.randint(1, 200)]))
        for index in range(drawn.randint(1, 14))
    ]
    instance = DecodingInstance(share, config)
    for until in [*sorted(drawn.uniform(0, 300) for _ in range(6)), math.inf]:
        instance.advance(until)
        clock, ends, left = step_by_step(share, config, until)
        assert instance.clock == pytest.approx(clock, rel=1e-9)
        assert {sample.index: time for time, sample in instance.ended} == pytest.approx(ends, rel=1e-9)
        assert {sample.index: sample.response for sample in instance.left} == left
