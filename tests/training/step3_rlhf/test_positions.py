"""Where each rank stands in calls with and without stages; no process groups are made."""

from collections import Counter
from dataclasses import dataclass, field

import torch

from training.distributed import Ranks
from training.hybrid_engine.layout import StageCut
from training.plan import from_yaml
from training.step3_rlhf.positions import call_positions

PLAN = from_yaml("""
actor_generate: {mesh: 0-3, data: 4}
reward_score:   {mesh: 1-2, data: 2}
critic_score:   {mesh: [3, 2], pipeline: 2}
actor_train:    {mesh: 0-3, data: 2, pipeline: 2, layers: [1, 3]}
critic_train:   {mesh: [3, 2, 1, 0], data: 2, pipeline: 2, zero_stage: 1}
""")


@dataclass(frozen=True)
class Alone(Ranks):
    """Ranks that are not there."""

    made: list[tuple[int, ...]] = field(default_factory=list)

    def part(self, mesh):
        self.made.append(tuple(mesh))
        mesh = tuple(sorted(mesh))
        return Ranks(mesh.index(self.rank), len(mesh), self.device, mesh=mesh) if self.rank in mesh else None


def test_ranks_of_stages_in_both_directions():
    ranks = [Alone(rank, 4, torch.device("cpu")) for rank in range(4)]
    positions = [call_positions(PLAN, each, {"actor": 4, "critic": 5}) for each in ranks]
    assert len({tuple(each.made) for each in ranks}) == 1  # all make the same groups, one after the other
    assert set(Counter(ranks[0].made).values()) == {1}

    actor = [each["actor_train"] for each in positions]
    assert [position.cut for position in actor] == [StageCut(stage, (1, 3)) for stage in (0, 0, 1, 1)]
    lines = [(0, (0, 2)), (1, (1, 3))] * 2
    assert [(position.data_rank, position.pipeline.mesh) for position in actor] == lines
    critic = [each["critic_train"] for each in positions]
    assert [position.cut.stage for position in critic] == [1, 1, 0, 0] and critic[0].cut.layers == (3, 2)
    assert [(position.data_rank, position.pipeline.mesh) for position in critic] == lines
    for position in (*actor, *critic):
        assert (
            position.ranks.size == 4
            and position.stage_ranks.size == 2
            and position.stage_ranks.rank == position.data_rank
        )
    assert [actor[0].stage_ranks.mesh, actor[2].stage_ranks.mesh] == [(0, 1), (2, 3)]

    scored = positions[3]["critic_score"]
    assert (scored.cut, scored.pipeline.mesh, scored.stage_ranks.size) == (StageCut(0, (3, 2)), (2, 3), 1)
    whole = positions[2]["reward_score"]
    assert (whole.cut, whole.pipeline, whole.stage_ranks, whole.data_rank) == (None, None, whole.ranks, 1)
    assert "reward_score" not in positions[0] and "critic_score" not in positions[1]


def test_one_rank_speaks_for_those_that_compute_the_same_samples():
    lengths = [5, 9, 2, 7, 3]
    for call in PLAN.assignments:
        positions = [
            call_positions(PLAN, Alone(rank, 4, torch.device("cpu")), {"actor": 4, "critic": 5}) for rank in range(4)
        ]
        there = [each[call] for each in positions if call in each]
        said = sorted(
            row
            for position in there
            if position.speaks
            for each in position.micro_batches(lengths)
            for row in each.rows
        )
        assert set(said) == set(range(5))
        assert sum(position.speaks for position in there) == PLAN[call].layout.data
        assert all(position.cut is None or position.cut.is_last for position in there if position.speaks)
