import random
from collections import Counter

from training.data.rated_texts import RatedReply, fit_together, make_pairs

PROMPT = [{"role": "user", "content": "Say something."}]


def test_what_fits_together():
    def fit(first, second):
        first, second = RatedReply("a", *first), RatedReply("b", *second)
        assert fit_together(first, second) == fit_together(second, first)
        return fit_together(first, second)

    assert fit((12, 0.5), (9, -0.5))  # 9 is 75 % of 12; 1 apart
    assert not fit((13, 0.5), (9, -2.0))
    assert fit((4, 0.5), (2, -1.0))  # two tokens apart
    assert not fit((5, 0.5), (2, -1.0))
    assert not fit((9, 0.5), (9, -0.4))


def test_pairs_give_nothing_away():
    rng = random.Random(3)
    scores = [rng.choice((-2.0, 0.0, 0.4, 2.5)) for _ in range(300)]
    # positive texts are longer here, as they are in real talk
    answers = [RatedReply(f"text {i}", rng.randint(2, 20) + round(2 * score), score) for i, score in enumerate(scores)]
    by_text = {answer.text: answer for answer in answers}
    pairs = make_pairs(answers, [PROMPT], random.Random(1))
    assert len(pairs) > 300  # of 450 at most
    used, longer = Counter(), Counter()
    for pair in pairs:
        chosen, rejected = by_text[pair["chosen"]], by_text[pair["rejected"]]
        assert fit_together(chosen, rejected) and chosen.score > rejected.score
        assert (pair["chosen_score"], pair["rejected_score"]) == (chosen.score, rejected.score)
        used.update((chosen.text, rejected.text))
        longer[(chosen.tokens > rejected.tokens) - (chosen.tokens < rejected.tokens)] += 1
    assert max(used.values()) == 3
    assert abs(longer[1] - longer[-1]) <= 1
    assert len({frozenset((pair["chosen"], pair["rejected"])) for pair in pairs}) == len(pairs)
    once = make_pairs(answers, [PROMPT], random.Random(1), uses=1)
    assert set(Counter(pair[side] for pair in once for side in ("chosen", "rejected")).values()) == {1}


def test_too_few_texts_give_no_pairs():
    assert make_pairs([RatedReply("alone", 5, 0.9)], [PROMPT], random.Random(1)) == []
