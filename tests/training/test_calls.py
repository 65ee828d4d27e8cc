import subprocess
import sys

import pytest

from inference.errors import UserError
from training import calls
from training.calls import ALGORITHMS, Call, DataflowGraph


def waits(graph: DataflowGraph) -> dict[str, set[str]]:
    return {call.name: {e.producer for e in graph.data_edges if e.consumer == call.name} for call in graph.calls}


def test_ppo_is_generate_then_three_scores_then_two_updates():
    scores = {"reference_score", "reward_score", "critic_score"}
    everything = {"actor_generate", *scores}
    assert waits(DataflowGraph.of("ppo")) == {
        "actor_generate": set(),
        **{score: {"actor_generate"} for score in scores},
        "actor_train": everything,
        "critic_train": everything,
    }


def test_weights_are_used_after_the_training_of_the_iteration_before():
    edges = {(e.producer, e.consumer, e.iterations_back) for e in DataflowGraph.of("ppo").version_edges}
    assert edges == {
        ("actor_train", "actor_generate", 1),
        ("actor_train", "actor_train", 1),
        ("critic_train", "critic_score", 1),
        ("critic_train", "critic_train", 1),
        ("reference_score", "reference_score", 1),
        ("reward_score", "reward_score", 1),
    }


def test_the_other_algorithms():
    assert waits(DataflowGraph.of("grpo"))["actor_train"] == {"actor_generate", "reference_score", "reward_score"}
    assert waits(DataflowGraph.of("dpo")) == {"reference_score": set(), "actor_train": {"reference_score"}}
    assert waits(DataflowGraph.of("sft")) == {"actor_train": set()}
    assert DataflowGraph.of("reward").trained_roles == ("reward",)
    assert all(DataflowGraph(of).calls for of in ALGORITHMS.values())


def test_renaming_or_adding_a_call_changes_the_graph():
    longer = DataflowGraph(calls.with_recomputed_logprobs(calls.PPO))
    assert waits(longer)["actor_score"] == {"actor_generate"}
    assert "actor_score" in waits(longer)["actor_train"]
    renamed = DataflowGraph((Call("policy", "generate", (), ("samples",)), Call("policy", "train", ("samples",))))
    assert waits(renamed) == {"policy_generate": set(), "policy_train": {"policy_generate"}}


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ((calls.ACTOR_TRAIN, calls.ACTOR_TRAIN), "stands twice"),
        ((calls.REWARD_SCORE, calls.ACTOR_GENERATE), "before it is made"),
        ((calls.ACTOR_GENERATE, Call("other", "generate", (), ("samples",))), "made twice"),
    ],
)
def test_calls_that_do_not_fit_together(wrong, sentence):
    with pytest.raises(UserError, match=sentence):
        DataflowGraph(wrong)


def test_an_unknown_algorithm():
    with pytest.raises(UserError, match="choose one of ppo"):
        DataflowGraph.of("pppo")


def test_the_trainer_can_declare_its_calls_without_torch_or_the_planner():
    code = "import sys, training.calls; print({'torch', 'numpy', 'training.planner'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize("with_critic", [True, False])
@pytest.mark.parametrize("with_reward_model", [True, False])
@pytest.mark.parametrize("with_reference", [True, False])
def test_what_step_3_runs_is_a_graph_with_the_roles_that_it_loads(with_critic, with_reward_model, with_reference):
    graph = DataflowGraph(calls.rlhf_calls(with_critic, with_reward_model, with_reference))
    roles = {"actor"}
    roles |= {"reference"} if with_reference else set()
    roles |= {"critic"} if with_critic else set()
    roles |= {"reward"} if with_reward_model else set()
    assert set(graph.roles) == roles
    assert graph.trained_roles == (("actor", "critic") if with_critic else ("actor",))
