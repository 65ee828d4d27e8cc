"""Layouts by hand."""

import pytest

from inference.errors import UserError
from training.hybrid_engine.layout import Layout


def test_tensor_ranks_are_neighbours_then_data_then_pipeline():
    layout = Layout(mesh=(10, 11, 12, 13, 14, 15, 16, 17), data=2, tensor=2, pipeline=2)
    assert layout.tensor_groups == ((10, 11), (12, 13), (14, 15), (16, 17))
    assert layout.data_groups == ((10, 12), (11, 13), (14, 16), (15, 17))
    assert (layout.tensor_rank(15), layout.data_rank(15), layout.pipeline_rank(15)) == (1, 0, 1)
    assert layout.tensor_group(15) == (14, 15) and layout.data_group(15) == (15, 17)
    assert layout.stage_meshes == ((10, 11, 12, 13), (14, 15, 16, 17)) and layout.pipeline_group(15) == (11, 15)


@pytest.mark.parametrize(("data", "tensor", "pipeline"), [(1, 4, 1), (4, 1, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2)])
def test_every_rank_has_its_own_place(data, tensor, pipeline):
    layout = Layout((0, 1, 2, 3), data, tensor, pipeline)
    places = {(layout.tensor_rank(r), layout.data_rank(r), layout.pipeline_rank(r)) for r in layout.mesh}
    assert len(places) == 4
    for rank in layout.mesh:
        assert layout.tensor_group(rank)[layout.tensor_rank(rank)] == rank
        assert layout.data_group(rank)[layout.data_rank(rank)] == rank
        assert layout.pipeline_group(rank)[layout.pipeline_rank(rank)] == rank


def test_all_ranks_in_groups_of_a_degree():
    assert Layout.over(6, tensor=2, zero_stage=3) == Layout((0, 1, 2, 3, 4, 5), data=3, tensor=2, zero_stage=3)


def test_who_holds_all_weights():
    assert Layout.over(4, zero_stage=2).is_whole
    assert not Layout.over(4, zero_stage=3).is_whole
    assert not Layout.over(4, tensor=2).is_whole


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout((0, 1, 2), data=2), "data 2 x tensor 1 x pipeline 1 does not fill 3 ranks"),
        (lambda: Layout((0, 1), data=-1, tensor=-2), "does not fill 2 ranks"),
        (
            lambda: Layout.over(6, tensor=4),
            "does not divide 6 processes: take a degree of 1, 2, 3 or 6, or --processes 8",
        ),
        (lambda: Layout((0, 0), data=2), "names a rank twice"),
        (lambda: Layout((0,), zero_stage=4), "no ZeRO stage 4"),
    ],
)
def test_layouts_that_do_not_come_out_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
