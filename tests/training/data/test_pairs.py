import random
from collections import Counter

from training.data.pairs import Sample, fit_together, make_pairs


def sample(dialogue, tokens, score, question="q"):
    prompt = [{"role": "user", "content": f"to {dialogue}"}]
    return Sample(str(dialogue), question, prompt, f"reply {dialogue} {tokens} {score}", tokens, score)


def test_what_fits_together():
    def fit(first, second):
        assert fit_together(first, second) == fit_together(second, first)
        return fit_together(first, second)

    assert fit(sample(1, 12, 0.5), sample(2, 9, 0.2))  # 9 is 75 % of 12; 0.3 apart
    assert not fit(sample(1, 13, 0.5), sample(2, 9, 0.0))
    assert fit(sample(1, 4, 0.5), sample(2, 2, 0.0))  # two tokens apart
    assert not fit(sample(1, 5, 0.5), sample(2, 2, 0.0))
    assert not fit(sample(1, 9, 0.5), sample(2, 9, 0.21))
    assert not fit(sample(1, 9, 0.5), sample(1, 9, 0.0))  # one dialogue


def many(question, count, rng):
    return [
        sample(f"{question}{i}", rng.randint(2, 20), rng.choice((0.0, 0.0, 0.4, 0.8)), question) for i in range(count)
    ]


def test_pairs_give_nothing_away():
    rng = random.Random(3)
    samples = many("a", 150, rng) + many("b", 300, rng)
    # upbeat replies are longer here, as they are in real talk
    samples = [sample(s.dialogue, s.tokens + round(5 * s.score), s.score, s.question) for s in samples]
    by_reply = {s.reply: s for s in samples}
    by_prompt = {s.prompt[0]["content"]: s for s in samples}
    pairs = make_pairs(samples, 100, random.Random(1))
    assert len(pairs) == 200
    uses, longer, owner, questions = Counter(), Counter(), Counter(), Counter()
    for pair in pairs:
        chosen, rejected = by_reply[pair["chosen"]], by_reply[pair["rejected"]]
        assert chosen.question == rejected.question
        assert fit_together(chosen, rejected)
        assert (pair["chosen_score"], pair["rejected_score"]) == (chosen.score, rejected.score)
        assert chosen.score > rejected.score
        uses.update((chosen.reply, rejected.reply))
        longer[(chosen.tokens > rejected.tokens) - (chosen.tokens < rejected.tokens)] += 1
        owner[by_prompt[pair["prompt"][0]["content"]] is chosen] += 1
        questions[chosen.question] += 1
    assert max(uses.values()) <= 3
    assert abs(longer[1] - longer[-1]) <= 2  # one for each question
    assert 70 <= owner[True] <= 130  # 200 throws of a coin, within 4 standard deviations
    assert questions == {"a": 100, "b": 100}
    assert len({(pair["chosen"], pair["rejected"]) for pair in pairs}) == 200


def test_too_few_replies_give_no_pairs():
    assert make_pairs([sample(1, 5, 0.9)], 10, random.Random(1)) == []
