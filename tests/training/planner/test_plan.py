from dataclasses import replace

import pytest

from inference.errors import UserError
from tests.families import narrow_config
from tests.training.planner.conftest import graphs_on
from training.hybrid_engine.layout import Layout
from training.plan import Assignment, Plan, from_yaml, read_plan, to_yaml
from training.plan_checks import cannot_run, problems, unrunnable
from training.planner.hardware import USABLE_MEMORY
from training.planner.search import deepspeed_chat_plan, estimate, megatron_plan
from training.planner.workload import Workload
from training.rlhf_settings import RLHFSettings
from training.shape import Shape


def test_a_plan_file_reads_as_it_was_written(random_plans):
    scattered = Plan({"actor_train": Assignment(Layout((0, 2), 2, zero_stage=3), 4)})
    for plan in [*random_plans, scattered]:
        assert from_yaml(to_yaml(plan)) == plan


def test_what_a_person_reads():
    assignment = Assignment(Layout(tuple(range(8)), 2, 2, 2, zero_stage=1), 4)
    assert to_yaml(Plan({"actor_train": assignment})) == (
        "actor_train:\n  mesh: 0-7\n  data: 2\n  tensor: 2\n  pipeline: 2\n  zero_stage: 1\n  micro_batches: 4\n"
    )
    short = from_yaml("reward_score: {mesh: 3, offload: yes}")
    assert short["reward_score"] == Assignment(Layout((3,)), offload=True)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "empty"),
        ("a: [1", "not YAML"),
        ("a: 3", "says nothing about 'a'"),
        ("a: {mesh: 0-3, tensr: 4}", "unknown key 'tensr'"),
        ("a: {data: 4}", "no mesh"),
        ("3", "The plan is 3; name a file"),
        ("a: {mesh: 3-0}", "^'a': The mesh 3-0 names no ranks"),
        ("a: {mesh: 0-²}", "names no ranks"),
        ("a: {mesh: 0-99999999999}", "names no ranks"),
        ("a: {mesh: 0-3, data: two}", "no whole number"),
        ("a: {mesh: 0-3, data: 2}", "'a': A layout of data 2"),
        ("a: {mesh: 0, offload: 3}", "write yes or no"),
    ],
)
def test_mistakes_in_a_plan_file(text, sentence):
    with pytest.raises(UserError, match=sentence):
        from_yaml(text)


def test_a_plan_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_plan(tmp_path / "plan.yaml")


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        (Assignment(Layout(tuple(range(6, 10)), 4)), "uses rank 9, but the cluster has ranks 0 to 7"),
        (Assignment(Layout((-1, 0), 2)), "uses rank -1, but"),
        (Assignment(Layout(tuple(range(3)), tensor=3)), "cuts 32 attention heads into 3 parts"),
        (Assignment(Layout(tuple(range(8)), 8), micro_batches=4), "divides 16 samples by data 8 x micro_batches 4"),
        (Assignment(Layout(tuple(range(4)), 2, pipeline=2, zero_stage=3)), "joins ZeRO stage 3 with a pipeline"),
        (Assignment(Layout((0,)), offload=True), "offloads weights that are trained"),
        (Assignment(Layout((0,)), micro_batches=0), "has 0 micro-batches"),
        (Assignment(Layout((0, 1), pipeline=2, layers=(12, 11))), r"[12, 11] layers, 23 together, of a model of 24"),
    ],
)
def test_what_keeps_a_plan_from_running(two_nodes, assignment, sentence):
    good = megatron_plan(two_nodes.graph, two_nodes.costs.cluster)
    bad = Plan({**good.assignments, "actor_train": assignment})
    found = problems(bad, two_nodes.graph, two_nodes.costs.workload, two_nodes.costs.cluster.size)
    assert len(found) == 1 and sentence in found[0]
    with pytest.raises(UserError, match="actor_train"):
        estimate(bad, two_nodes)


def test_calls_that_are_missing_or_misspelt(two_nodes):
    good = megatron_plan(two_nodes.graph, two_nodes.costs.cluster)
    names = {("actor_trian" if name == "actor_train" else name): one for name, one in good.assignments.items()}
    found = problems(Plan(names), two_nodes.graph, two_nodes.costs.workload, two_nodes.costs.cluster.size)
    assert "no line for the call 'actor_train'" in found[0] and "did you mean 'actor_train'?" in found[1]


def test_the_searchs_candidates_are_valid(two_nodes, random_plans):
    for plan in random_plans:
        assert problems(plan, two_nodes.graph, two_nodes.costs.workload, two_nodes.costs.cluster.size) == []


def test_the_plans_that_people_use(two_nodes):
    cluster, workload = two_nodes.costs.cluster, two_nodes.costs.workload
    megatron = megatron_plan(two_nodes.graph, cluster)
    assert {a.layout for a in megatron.assignments.values()} == {Layout(tuple(range(8)), 1, 4, 2)}
    assert [megatron[call.name].micro_batches for call in two_nodes.graph.calls] == [2, 2, 2, 2, 4, 4]
    assert [call.name for call in two_nodes.graph.calls if megatron[call.name].offload] == [
        "reference_score", "reward_score",
    ]  # fmt: skip
    chat = deepspeed_chat_plan(two_nodes.graph, workload, cluster)
    assert chat["actor_generate"].layout == Layout.over(8)
    assert {chat[call.name].layout.zero_stage for call in two_nodes.graph.calls[1:]} == {3}
    assert estimate(chat, two_nodes).peak_bytes <= cluster.usable_memory


def test_deepspeed_chat_takes_tensor_parallel_groups_where_weights_do_not_fit():
    graphs = graphs_on(1, 8)
    roomy = deepspeed_chat_plan(graphs.graph, graphs.costs.workload, graphs.costs.cluster)
    weights = graphs.costs.workload.models["actor"].parameters * 2
    held = estimate(roomy, graphs).memory[0].held("device")
    usable = held + weights
    tight = replace(graphs.costs.cluster, device=replace(graphs.costs.cluster.device, memory=usable / USABLE_MEMORY))
    plan = deepspeed_chat_plan(graphs.graph, graphs.costs.workload, tight)
    assert roomy["actor_generate"].layout.tensor == 1 < plan["actor_generate"].layout.tensor
    with pytest.raises(UserError, match="No plan in which all 8 ranks"):
        tiny = replace(tight, device=replace(tight.device, memory=1e9))
        deepspeed_chat_plan(graphs.graph, graphs.costs.workload, tiny)
    with pytest.raises(UserError, match="leaves some of 32 ranks idle"):
        deepspeed_chat_plan(graphs.graph, graphs.costs.workload, graphs_on(4, 8).costs.cluster)


def test_what_our_runtime_does_not_run(two_nodes):
    settings, graph, fp16 = RLHFSettings(), two_nodes.graph, two_nodes.costs.workload
    workload = replace(fp16, precision="bf16")
    ours = Plan.of(settings, 4, 512)
    assert unrunnable(ours, graph, workload, settings, 4) == []
    everywhere = tuple(range(4))
    staged = Layout(everywhere, 2, pipeline=2)
    fused = settings.model_copy(update={"fusion": settings.fusion.model_copy(update={"mode": "inter"})})
    exact = settings.model_copy(update={"exact": True})
    for call, layout, asked, load, sentence in (
        ("actor_train", staged, settings, workload, ""),
        ("actor_train", replace(staged, zero_stage=1), fused, workload, ""),
        ("reward_score", staged, settings, workload, ""),
        ("reward_score", staged, fused, workload, "roles that score whole on each of them, which reward_score is not"),
        ("actor_generate", staged, settings, workload, "actor_generate has 2 pipeline stages, and generation"),
        ("reward_score", Layout(everywhere, 1, 2, 2), settings, workload, "each of them tensor-parallel"),
        ("critic_train", staged, settings, fp16, "critic_train has 2 pipeline stages, which do not run in fp16"),
        ("actor_train", Layout(everywhere, 2, 2), settings, workload, "actor_train is tensor-parallel"),
        ("actor_generate", Layout(everywhere, 2, 2), settings, workload, ""),
        ("actor_generate", Layout(everywhere, 2, 2), exact, workload, "tensor-parallel, which rlhf.exact=true cannot"),
    ):
        changed = Plan({**ours.assignments, call: Assignment(layout)})
        found = unrunnable(changed, graph, load, asked, 4)
        assert len(found) == bool(sentence) and sentence in "".join(found)


def test_families_that_cannot_be_cut_into_stages_are_not_planned_so(two_nodes):
    shapes = [Shape.of(narrow_config(family)) for family in ("llama", "gemma3n_text")]
    assert [bool(shape.why_no_stages) for shape in shapes] == [False, True]
    score = next(call for call in two_nodes.graph.calls if call.name == "reward_score")
    for shape in shapes:
        workload = Workload.of({"reward": shape}, 16, 8, 8)
        found = cannot_run(score, Assignment(Layout((0, 1), pipeline=2)), workload, RLHFSettings(), 2)
        assert found == [f"reward_score has 2 pipeline stages. {shape.why_no_stages}"] * bool(shape.why_no_stages)


def test_a_line_for_a_call_that_does_not_run_is_left_out():
    blocks = {name: {"mesh": 0} for name in ("actor_generate", "actor_score", "actor_train")}
    settings = RLHFSettings.model_validate({"plan": blocks})
    assert list(Plan.of(settings, 1, 512).assignments) == list(blocks)
    assert list(Plan.of(settings, 1, 512, settings.calls).assignments) == ["actor_generate", "actor_train"]


def test_the_plan_of_settings():
    settings = RLHFSettings.model_validate(
        {
            "prompts_per_iteration": 20, "samples_per_prompt": 2, "mini_batches": 2, "micro_batch_tokens": 700,
            "generation_tensor_parallel": 4, "generation_batch": 3, "actor": {"zero_stage": 3},
            "critic": {"zero_stage": 2}, "scoring_tensor_parallel": {"reward": 2},
        }
    )  # fmt: skip
    everywhere = (0, 1, 2, 3)
    assert Plan.of(settings, 4, length=200).assignments == {
        "actor_generate": Assignment(Layout(everywhere, 1, 4), micro_batch_limit=3),
        "reference_score": Assignment(Layout(everywhere, 4), 4, micro_batch_limit=700),
        "reward_score": Assignment(Layout(everywhere, 2, 2), 7, micro_batch_limit=700),
        "critic_score": Assignment(Layout(everywhere, 4), 4, micro_batch_limit=700),
        "actor_train": Assignment(Layout(everywhere, 4, zero_stage=3), 2, micro_batch_limit=700),
        "critic_train": Assignment(Layout(everywhere, 4, zero_stage=2), 2, micro_batch_limit=700),
    }
    waiting = {"reference": {"zero_stage": 3, "offload": "parameters"}}
    for rank, waits in ((0, True), (4, False)):  # then it is the actor
        adapted = RLHFSettings.model_validate({**waiting, "actor": {"lora": {"rank": rank}}})
        assert Plan.of(adapted, 4, 200)["reference_score"].offload == waits
    with pytest.raises(UserError, match=r"rlhf\.scoring_tensor_parallel\.reward=2"):
        Plan.of(settings.model_copy(update={"generation_tensor_parallel": 1}), 3, 200)
