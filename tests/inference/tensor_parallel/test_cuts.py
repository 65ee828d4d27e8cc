"""What a rank keeps, by hand; and models that cannot be cut."""

import pytest
import torch

from inference.errors import UserError
from inference.tensor_parallel.cuts import Heads, check_divides, cut_layers
from inference.tensor_parallel.shard import Cut, TensorParallel, empty_shard, even, rows_of
from tests.inference.tensor_parallel.families import FAMILIES, build


def test_a_fused_projection_is_cut_in_each_of_its_blocks():
    whole = torch.arange(12)  # query 0-3, key 4-7, value 8-11
    assert Cut(0, even(12, 1, 2, blocks=3))(whole).tolist() == [2, 3, 6, 7, 10, 11]


def test_a_vocabulary_is_padded_with_zeros():
    cuts = [Cut(0, *rows_of(5, rank, 4)) for rank in range(4)]  # 2 rows each: 0 1 | 2 3 | 4 - | - -
    assert [cut(torch.arange(1, 6)).tolist() for cut in cuts] == [[1, 2], [3, 4], [5, 0], [0, 0]]
    assert all(cut.shape((5, 7)) == (2, 7) for cut in cuts)


def test_a_cut_in_one_piece_copies_nothing():
    whole = torch.zeros(4, 6)
    assert Cut(1, even(6, 1, 3))(whole).untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("query", "key_value", "size", "kept"),
    [
        (8, 8, 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (8, 4, 2, [[0, 1], [2, 3]]),
        (8, 2, 4, [[0], [0], [1], [1]]),  # two ranks share each
        (12, 3, 4, [[0, 0, 0], [0, 1, 1], [1, 1, 2], [2, 2, 2]]),  # unequal groups: one for each query head
    ],
)
def test_key_heads_follow_their_query_heads(query, key_value, size, kept):
    assert [Heads(query, key_value, 8).local_keys(rank, size) for rank in range(size)] == kept


def test_heads_that_do_not_divide_are_refused_in_a_sentence():
    model = build("opt")  # 8 heads, feed-forward width 48
    with pytest.raises(UserError, match=r"8 attention heads.*width of 48.*3 .*degrees that fit it: 1, 2, 4, 8\."):
        empty_shard(model, TensorParallel(0, 3))
    check_divides(model.config, 1)
    check_divides(model.config, 8)


def test_a_feed_forward_width_that_does_not_divide_is_refused():
    model = build("llama 3 key heads of 12")  # 12 heads divide by 6, and so does 48
    check_divides(model.config, 6)
    model.config.intermediate_size = 40
    with pytest.raises(UserError, match=r"width of 40.*degrees that fit it: 1, 2, 4"):
        check_divides(model.config, 6)


def test_a_family_without_a_plan_is_refused():
    model = build("opt")
    model.config.model_type = "unheard-of"
    with pytest.raises(UserError, match="'unheard-of' cannot be cut over ranks"):
        cut_layers(model)


def test_an_adapter_that_cannot_be_cut_is_refused():
    from peft import LoraConfig, get_peft_model

    model = build("llama")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(UserError, match=r"adapter of model\.layers\.0\.self_attn\.q_proj"):
        empty_shard(model, TensorParallel(0, 2))


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama"])
def test_shapes_can_be_read_from_a_model_on_the_meta_device(family):
    from transformers import AutoModelForCausalLM

    model = build(family)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(model.config)
    shard, _ = empty_shard(shapes, TensorParallel(1, 2), torch.device("cpu"))
    real, _ = empty_shard(model, TensorParallel(1, 2))
    assert {name: p.shape for name, p in shard.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(parameter.device.type == "cpu" and not parameter.requires_grad for parameter in shard.parameters())


def test_degree_one_is_a_plain_copy_for_every_family():
    for family in FAMILIES:
        model = build(family)
        copied, pieces = empty_shard(model, TensorParallel())
        assert [name for name, _ in copied.named_parameters()] == [piece.name for piece in pieces]
        assert all(piece.cut is None for piece in pieces)
        assert [type(module) for module in copied.modules()] == [type(module) for module in model.modules()]
