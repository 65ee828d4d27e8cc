"""Sequences that begin alike: what is computed of them, and that it comes to the same."""

import itertools
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from inference.generation.attention import Sequences, packed
from inference.generation.cpu import Exactness, Groups
from inference.generation.passes import Prefixes, at

ROWS = [[5, 6, 7, 8], [5, 6, 9], [6, 7], [5, 6, 7, 8, 3]]


def prefixes_of(rows: list[list[int]], apart: list[int] | None = None) -> Prefixes | None:
    sequences = Sequences([len(row) for row in rows])
    return Prefixes.of(sequences, itertools.chain(*rows), torch.device("cpu"), apart or ())


def test_each_beginning_is_computed_once():
    found = prefixes_of(ROWS)
    assert found.computed.tolist() == [0, 1, 2, 3, 6, 7, 8, 13]
    assert found.stands_for.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 0, 1, 2, 3, 7]


def test_tokens_apart_are_computed_for_each_sequence_and_so_are_those_behind_them():
    found = prefixes_of(ROWS, apart=[10])  # the second token of the last row
    assert found.stands_for.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 0, 7, 8, 9, 10]


def test_where_little_is_repeated_nothing_is_put_together():
    assert prefixes_of([[5] + [6] * 15, [5] + [7] * 14]) is None
    assert prefixes_of([[5, 6] + [6] * 14, [5, 6] + [7] * 14]) is not None


def test_the_model_sees_the_computed_tokens_and_gives_what_it_gives_for_all():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=16, num_key_value_heads=2, **shape)).eval()
    ids, found = torch.tensor([token for row in ROWS for token in row]), prefixes_of(ROWS)
    positions, weights = found.sequences.positions(ids.device), torch.randn(len(ids), 16)

    def logits_of(places, tokens):
        inputs = {"input_ids": ids[places][None], "position_ids": positions[:, places], "tokens": tokens}
        return model(**inputs, use_cache=False).logits[0]

    with packed(model):
        expected = logits_of(slice(None), found.sequences)
        (expected * weights).sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        fewer = logits_of(found.computed, found)
        (at(fewer, found.stands_for) * weights).sum().backward()
    assert len(fewer) == 8 < len(expected)
    assert torch.allclose(at(fewer, found.stands_for), expected, atol=1e-6)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-5)


def test_gradients_of_many_repeats_are_added_in_fp32():
    tokens = torch.ones(2, 3, 2, dtype=torch.bfloat16, requires_grad=True)
    at(tokens, torch.tensor([1] * 300)).sum().backward()
    assert tokens.grad[1].eq(300).all()  # in bf16 the sum would stay at 256
    assert tokens.grad[0].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[5, 3, 60, 5, 61, 1, 90], [4, 4, 4], [7]])
def test_groups_of_like_length_see_what_each_sequence_sees_and_no_more(lengths, dtype):
    torch.manual_seed(0)
    of_query, *of_others = (torch.randn(heads, sum(lengths), 8).to(dtype).requires_grad_() for heads in (4, 2, 2))
    weights = torch.randn(sum(lengths), 4, 8)
    found, alone = [], []
    for exact, parts, results in ((Exactness(keys=16), [lengths], found), (None, [[n] for n in lengths], alone)):
        seen, begin = [], 0
        for part in parts:
            own = [heads[:, begin : begin + sum(part)].float() for heads in (of_query, *of_others)]
            own = own if exact is None else [heads.to(dtype) for heads in own]
            seen.append(Sequences(part, exact=exact).attend(0, *own, None, None).float())
            begin += sum(part)
        (torch.cat(seen) * weights).sum().backward()
        results += [torch.cat(seen), *(heads.grad for heads in (of_query, *of_others))]
        for heads in (of_query, *of_others):
            heads.grad = None
    for ours, expected in zip(found, alone, strict=True):
        size = float(expected.abs().max())
        assert float((ours - expected).abs().max()) <= size * (1e-5 if dtype == torch.float32 else 0.03)


def test_sequences_of_like_length_come_together():
    lengths = [5, 3, 60, 5, 61, 1, 90]
    assert Groups(lengths, 48**2, 2048).shapes == [(1, 90), (2, 61), (4, 5)]
    assert Groups(lengths, 48**2, 100).shapes == [(1, 90), (1, 61), (1, 60), (4, 5)]
    assert Groups(lengths, math.inf, math.inf).shapes == [(7, 90)]
    filled = Groups([2, 3], math.inf, math.inf)
    assert filled.source.tolist() == [2, 3, 4, 0, 1, 1]
    assert filled.places.tolist() == [3, 4, 0, 1, 2]
    assert Groups([3, 3], 0, math.inf).is_plain and not filled.is_plain
