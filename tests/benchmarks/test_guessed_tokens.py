"""Guessed tokens: the replay against cases worked by hand, the pass that checks guesses against decode steps."""

import pytest
import torch

from benchmarks.guessed_passes import EXACT, logits_of
from benchmarks.guessed_replay import Answer, FromNGrams, FromSameDraws, NGrams, Pass, agreeing, replay
from benchmarks.guessed_tokens import Costs, Kept, running
from inference.generation.kv_cache import KVCache
from inference.generation.passes import PackedPasses
from tests.families import build, narrow_config
from training.step3_rlhf.exactness import agrees, first_layers


def answer(index: int, tokens: list[int], group: int = 0, prompt: tuple[int, ...] = (7,)) -> Answer:
    return Answer(group, index, 0, list(prompt), tokens)


def of_itself() -> FromNGrams:
    return FromNGrams(lambda answer: answer.index, prompts=True)


def test_the_longest_known_context_decides_and_the_random_number_chooses_by_shares():
    ngrams = NGrams()
    for tokens in ([1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 5], [9, 2, 6]):
        ngrams.learn(tokens, 0)
    assert [ngrams.next([1, 2], drawn) for drawn in (0.0, 0.74, 0.76)] == [3, 3, 5]
    assert ngrams.next([9, 2], 0.0) == 6
    assert [ngrams.next([4, 2], drawn) for drawn in (0.59, 0.61, 0.81)] == [3, 5, 6]
    assert ngrams.next([3], 0.5) is None


def test_guesses_count_up_to_the_first_wrong_one():
    assert agreeing([1, 2, 3], [1, 2, 4, 5]) == 2
    assert agreeing([1, 2, 3], [1, 2]) == 2
    assert agreeing([], [1]) == 0


def test_an_answer_that_repeats_itself_is_drawn_in_fewer_passes():
    """1 is known from the prefill. Nothing follows 1, then 2; then 2 1 is right and brings a third token; then 1 2 is
    wrong."""
    passes = replay([answer(0, [1, 2, 1, 2, 1, 2, 9])], of_itself(), 4, lambda rows: 2)
    assert passes == [Pass(1, 1, 1), Pass(1, 1, 1), Pass(1, 3, 3), Pass(1, 3, 1)]


def test_without_guesses_a_pass_is_a_decode_step():
    answers = [answer(0, [1, 2, 3, 4]), answer(1, [1]), answer(2, [5, 6])]
    assert replay(answers, of_itself(), 2, lambda rows: 0) == [Pass(2, 2, 2), Pass(1, 1, 1), Pass(1, 1, 1)]


@pytest.mark.parametrize(("group", "passes"), [(0, 1), (1, 3)])
def test_answers_are_guessed_from_those_of_their_group_alone(group, passes):
    first, second = answer(0, [1, 2, 3, 4]), answer(1, [1, 2, 3, 4], group)
    found = replay([first, second], FromNGrams(lambda answer: answer.group), 1, lambda rows: 3)
    assert len(found) == 3 + passes


def test_answers_of_earlier_iterations_are_known_at_the_start():
    guesser = FromNGrams(lambda answer: answer.group, before=[answer(0, [1, 2, 3, 4])])
    assert replay([answer(1, [1, 2, 3, 4])], guesser, 1, lambda rows: 2) == [Pass(1, 3, 3)]


def test_the_same_numbers_guess_place_by_place():
    guesser = FromSameDraws([answer(0, [1, 2, 3, 4, 5, 6])])
    passes = replay([answer(0, [1, 2, 9, 4, 5])], guesser, 1, lambda rows: 2)
    assert passes == [Pass(1, 3, 2), Pass(1, 3, 2)]


def test_gains_are_tokens_a_pass_over_its_cost_between_the_sizes_that_were_timed():
    costs = Costs(
        {"rows": rows, "guesses": guesses, "seconds": seconds}
        for rows, guesses, seconds in ((1, 0, 1.0), (1, 2, 1.5), (3, 0, 2.0), (3, 2, 5.0))
    )
    assert (costs.seconds(1, 2), costs.seconds(2, 1), costs.seconds(2, 2)) == (1.25, 1.5, 2.375)
    assert costs.of([Pass(1, 2, 2), Pass(3, 9, 4)]) == 6.25
    kept = Kept({2: 1.8}, {2: 3.0})
    assert kept.gain(costs, 1) == (1.8 / 1.5, 2)
    assert kept.gain(costs, 3) == (1.0, 0)


def test_what_a_smaller_pass_took_longer_was_other_work():
    timed = [{"rows": 1, "guesses": guesses, "seconds": seconds} for guesses, seconds in ((0, 1.5), (1, 1.0), (2, 1.2))]
    assert [Costs(timed).seconds(1, tokens) for tokens in (1, 2, 3)] == [1.0, 1.0, 1.2]


def test_rows_of_a_decode_step_are_those_that_are_not_over():
    assert running([1, 4, 2]) == [2, 1, 1]


def stepwise_and_at_once(model, exact=None):
    """Logits (2, 3, vocabulary) of three tokens behind rows of different lengths, by decode steps and in one pass."""
    lengths, tokens = [39, 5], torch.randint(3, 50, (2, 3))
    prompts = [torch.randint(3, 50, (length,)) for length in lengths]
    with torch.inference_mode():
        stepwise, at_once = (PackedPasses(model, KVCache(2, 64, exact=exact), exact) for _ in range(2))
        for passes in (stepwise, at_once):
            passes.prefill(prompts, [0, 1])
        steps = [stepwise.decode(tokens[:, i], [length + i for length in lengths]) for i in range(3)]
        return torch.stack(steps, 1), logits_of(at_once, tokens, lengths).unflatten(0, (2, 3))


def test_a_pass_over_guesses_gives_what_decode_steps_give():
    """Query heads share key heads."""
    steps, found = stepwise_and_at_once(build(narrow_config("llama")).eval())
    torch.testing.assert_close(found, steps, atol=1e-5, rtol=0)


def test_where_training_equals_generation_so_does_a_pass_over_guesses_to_the_bit():
    exact = EXACT[torch.bfloat16]
    model = first_layers(build(narrow_config("llama")), None, torch.bfloat16)
    if not agrees(model, exact, 64):
        pytest.skip("this processor's products in bf16 depend on what is computed beside them")
    steps, found = stepwise_and_at_once(model, exact)
    assert torch.equal(steps, found)
