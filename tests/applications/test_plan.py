"""`rlhf-chat plan`: tables, data, pictures and plan files, without a search of full length."""

import json
import random
import xml.etree.ElementTree
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from applications import plan as plan_module
from applications.cli import app
from applications.fit import GIB, Machine, Outlook, find_shape
from applications.plan import fastest, with_auto_plan
from applications.plan_report import ranks_text
from applications.plan_request import Request, make_request
from applications.preset_store import load_preset
from applications.profile import _ppo
from inference.errors import UserError
from tests.training.planner.test_machine import PROFILE
from training.calls import ACTOR_SCORE
from training.config import RunConfig
from training.distributed import Ranks
from training.hybrid_engine.layout import Layout
from training.models import loading
from training.plan import Plan, from_blocks, to_blocks
from training.planner.footprint import DTYPES
from training.planner.hardware import THIS_MACHINE, profile_file
from training.planner.options import Options, meshes
from training.planner.search import estimate
from training.rlhf_settings import RLHFSettings
from training.run_directory import RunDirectory
from training.step3_rlhf import planned as step3_planned
from training.step3_rlhf import roles
from training.step3_rlhf.planned import iteration_calls, require_runnable
from training.steps import PPO

SMALL = ["plan", "--model", "opt-1.3b", "--reward-model", "opt-350m", "--gpus-per-node", "2", "--effort", "0.05"]


def run(*arguments):
    return CliRunner().invoke(app, [*SMALL, *map(str, arguments)])


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The data that --json prints, and the directory with the plan and the picture of the same search."""
    directory = tmp_path_factory.mktemp("plan")
    done = run(
        "--price", 2, "--json", "--everything", "--out", directory / "plan.yaml", "--svg", directory / "plan.svg"
    )
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout), directory


def test_everything_as_data(planned):
    data, _ = planned
    assert [plan["name"] for plan in data["plans"]] == [
        "searched", "as set", "one mesh", "DeepSpeed-Chat", "Megatron-style", "in stages", "not yet runnable",
    ]  # fmt: skip
    searched, *others = data["plans"]
    others, beyond = others[:-1], others[-1]
    assert searched["runs"] and all(
        searched["seconds_per_iteration"] <= plan["seconds_per_iteration"] for plan in others if plan["runs"]
    )
    assert beyond["seconds_per_iteration"] <= searched["seconds_per_iteration"]
    staged = data["plans"][5]
    assert {call["pipeline"] for name, call in staged["calls"].items() if name.endswith("train")} == {2}
    plain, slower = (f"{plan['seconds_per_iteration']:.1f} s" for plan in (searched, staged))
    assert data["stages"].startswith(
        f"An iteration takes {plain} at best without pipeline stages; with stages {slower}"
    )
    assert "so they lose" in data["stages"]
    for plan in data["plans"]:
        cut = any(
            (call["pipeline"] > 1 and name.endswith("generate")) or (name.endswith("train") and call["tensor"] > 1)
            for name, call in plan["calls"].items()
        )
        assert not (cut and plan["runs"]) and bool(plan.get("refused")) == (plan["fits"] and not plan["runs"])
    assert "Megatron-style" in [plan["name"] for plan in data["plans"] if plan.get("refused")]
    for plan in data["plans"]:
        assert list(plan["calls"]) == [call.name for call in iteration_calls(RLHFSettings(), torch.bfloat16)]
        for call in plan["calls"].values():
            assert call["seconds"] == pytest.approx(sum(call["parts"].values()))
            assert call["data"] * call["tensor"] * call["pipeline"] == len(call["mesh"])
        hours = plan["seconds_per_iteration"] * data["iterations"] / 3600
        assert plan["hours"] == pytest.approx(hours) and plan["cost"] == pytest.approx(hours * 2 * 2.0)
        assert set(plan["peak_bytes"]) == {"0", "1"}
    actor = find_shape("facebook/opt-1.3b", None)
    assert others[3]["host_peak_bytes"] == 2 * 4 * actor.parameters  # both ranks of the node read it in fp32


def test_the_plan_file_costs_what_the_search_said(planned):
    data, directory = planned
    done = run("--check", directory / "plan.yaml", "--json")
    assert done.exit_code == 0, done.output
    (checked,) = json.loads(done.stdout)["plans"]
    assert checked["seconds_per_iteration"] == pytest.approx(data["plans"][0]["seconds_per_iteration"])


def test_an_edited_plan_that_cannot_run_is_explained(planned):
    _, directory = planned
    text = (directory / "plan.yaml").read_text()
    broken = directory / "broken.yaml"
    broken.write_text(text.replace("actor_train:", "actor_trian:"))
    with pytest.raises(UserError, match=r"no line for the call 'actor_train'.*did you mean 'actor_train'"):
        CliRunner().invoke(app, [*SMALL, "--check", str(broken)], catch_exceptions=False)


def test_the_picture_has_a_panel_a_plan(planned):
    _, directory = planned
    picture = xml.etree.ElementTree.fromstring((directory / "plan.svg").read_text())
    texts = [element.text for element in picture.iter() if element.tag.endswith("text")]
    assert sum("s an iteration" in (text or "") for text in texts) == 7
    assert sum(element.tag.endswith("title") for element in picture.iter()) >= 42  # six calls of seven plans


def test_a_faster_network_never_hurts(planned):
    _, directory = planned
    seconds = []
    for gbit in (10, 1600):
        check = ["--check", directory / "plan.yaml", "--network", gbit, "--json"]
        done = run(*check, "--nodes", 2, "--gpus-per-node", 1)
        seconds.append(json.loads(done.stdout)["plans"][0]["seconds_per_iteration"])
    assert seconds[0] > seconds[1]


def test_ranks_in_an_order_of_their_own():
    assert [ranks_text(mesh) for mesh in ((0, 1, 2), (4, 5, 0, 1, 3), (2,))] == ["0-2", "4-5,0-1,3", "2"]


def test_the_table_for_people():
    done = run("--price", 2, "--set", "rlhf.kl.coefficient=0")
    assert done.exit_code == 0, done.output
    assert "reference_score" not in done.stdout  # neither planned nor in the legend
    for text in ("actor_generate", "s/iteration", "DeepSpeed-Chat", "Megatron-style", "G actor_generate"):
        assert text in done.stdout
    assert "CANNOT BE RUN YET, only costed. " in done.stdout and "cannot be run yet" in done.stdout
    chart = [line for line in done.stdout.splitlines() if "|" in line]
    assert chart and all(line.count("|") == 2 and "G" in line for line in chart)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpu", "z80"], "--gpu takes .*this-machine or a profile's YAML file, not 'z80'"),
        (["--model", "someone/unknown"], "is not known without the hub"),
        (["--set", "rlhf.exact=true"], "works on CPUs only; take rlhf.exact=auto to plan for a100-80g"),
        (["--model", "opt-66b", "--gpus-per-node", "1", "--gpu", "rtx-4090"], "fit"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        CliRunner().invoke(app, [*SMALL, *arguments], catch_exceptions=False)


def test_a_profile_is_hardware(tmp_path):
    profile = tmp_path / "mine.yaml"
    profile.write_text(PROFILE.to_yaml())
    done = CliRunner().invoke(
        app,
        ["plan", "--model", "opt-125m", "--gpu", str(profile), "--effort", "0.05", "--json"],
        catch_exceptions=False,
    )
    data = json.loads(done.stdout)
    assert data["gpus_per_node"] == 2 and data["gpu"] == "this-machine"
    assert data["plans"][0]["seconds_per_iteration"] > 0


def test_the_calls_of_the_settings_are_planned_and_no_others():
    settings = ["rlhf.advantage=grpo", "rlhf.samples_per_prompt=2", "rlhf.reward_function=a.py:f"]
    options = [option for setting in [*settings, "rlhf.reward_weights.model=0"] for option in ("--set", setting)]
    done = run("--effort", "0.01", "--json", *options)
    assert done.exit_code == 0, done.output
    for plan in json.loads(done.stdout)["plans"]:
        assert set(plan["calls"]) - {"actor_score"} == {"actor_generate", "reference_score", "actor_train"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("setting", ["auto", "generation", "recompute"])
@pytest.mark.parametrize("multiplies", [False, True])
@pytest.mark.parametrize("advantage", ["gae", "grpo", "rloo", "reinforce++"])
def test_what_is_planned_is_what_a_rollout_runs(dtype, setting, multiplies, advantage, monkeypatch, tmp_path):
    """`plan`, the expected time of a dry run, and the trainer's own list of calls."""
    values = {"rlhf.advantage": advantage, "rlhf.samples_per_prompt": 2, "rlhf.old_logprobs": setting}
    overrides = [f"{name}={value}" for name, value in {**values, "dtype": dtype}.items()]
    request = make_request("opt-125m", None, 1, 2, "a100-80g", 200, None, None, overrides)
    request = replace(request, machine=Machine(2, 8 * GIB))
    for loads in ("_train", "_freeze"):
        monkeypatch.setattr(roles.Roles, loads, lambda *_: None)
    monkeypatch.setattr(step3_planned, "multiplies_bf16", lambda: multiplies)
    monkeypatch.setattr(roles, "settle_exactness", lambda stage, _: (multiplies and dtype == "bf16") or None)
    stage = SimpleNamespace(config=request.config, seed=1, dtype=DTYPES[dtype], ranks=Ranks(0, 1, torch.device("cpu")))
    ran = roles.Roles(stage, None, tmp_path, None, (1, 1)).calls
    assert request.graphs_of(request.as_set).graph.calls == ran
    another, one = (replace(request, machine=machine) for machine in (None, request.machine))
    together = replace(one.as_set["actor_generate"], layout=Layout((0, 1), tensor=2))
    for asked, changed in ((another, {}), (one, {"actor_generate": together})):  # no run there is exact
        calls = asked.graphs_of(Plan({**one.as_set.assignments, **changed})).graph.calls
        assert (ACTOR_SCORE in calls) == (setting == "recompute" or (setting == "auto" and dtype != "fp32"))
    monkeypatch.setattr(Outlook, "dtype", DTYPES[dtype])  # fp16 needs a GPU
    costed, plan = _ppo(Outlook.of(request.config, [PPO]), request.cluster)
    assert costed.graph.calls == ran and list(plan.assignments) == [call.name for call in ran]
    assert ("actor_score" in plan.assignments) == (
        setting != "generation" and not (setting == "auto" and (dtype == "fp32" or (dtype == "bf16" and multiplies)))
    )


def test_a_reward_model_of_fewer_layers_is_planned_as_such():
    request = make_request("smollm2-135m", None, 1, 2, "a100-80g", 200, None, None, ["reward.layers=15"])
    assert [request.workload.models[role].shape.layers for role in ("actor", "critic", "reward")] == [30, 15, 15]


def test_roles_have_no_place_for_a_call_that_does_not_run(monkeypatch, tmp_path):
    for loads in ("_train", "_freeze"):
        monkeypatch.setattr(roles.Roles, loads, lambda *_: None)
    monkeypatch.setattr(roles, "settle_exactness", lambda *_: None)
    blocks = {**to_blocks(Plan.of(RLHFSettings(), 1, 512)), "actor_score": {"mesh": 0}}
    config = RunConfig.model_validate({"model": "m", "rlhf": {"plan": blocks}})
    for dtype in (torch.float32, torch.bfloat16):
        display = SimpleNamespace(say=print)
        stage = SimpleNamespace(
            config=config, seed=1, dtype=dtype, ranks=Ranks(0, 1, torch.device("cpu")), display=display
        )
        made = roles.Roles(stage, None, tmp_path, None, (1, 1))
        assert ("actor_score" in made.positions) == (dtype == torch.bfloat16)
        assert set(made.plan.assignments) == {call.name for call in made.calls}


@pytest.fixture
def profiled(tmp_path, monkeypatch):
    """A cache in which this machine has been profiled with two ranks."""
    monkeypatch.setenv("RLHF_CHAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(plan_module, "FULL_EFFORT_RANKS", 100)  # a short search
    file = profile_file(2)
    file.parent.mkdir(parents=True)
    file.write_text(PROFILE.to_yaml())


TWO = {"model": "opt-125m", "processes": 2, "dtype": "fp32", "architecture": load_preset("opt-125m")["architecture"]}


def test_auto_takes_the_best_plan_for_this_machine_and_keeps_it(profiled, tmp_path, capsys, monkeypatch):
    config, run = RunConfig.model_validate(TWO), RunDirectory(tmp_path / "run")
    planned = with_auto_plan(config, run, measures=False)
    assert "searched" in (said := capsys.readouterr().out) and "without a plan" in said and "an iteration" in said
    request = Request.of(config, PROFILE.cluster)
    best = from_blocks(planned.rlhf.plan)
    chosen, as_set = (estimate(plan, request.graphs).iteration_seconds for plan in (best, request.as_set))
    assert chosen <= as_set and not request.outcome("", best).refused
    require_runnable(planned, 2, *(request.workload.models[role].shape for role in ("actor", "critic")), torch.float32)
    run.path.mkdir()
    kept = planned.rlhf.plan | {"critic_score": {**planned.rlhf.plan["critic_score"], "micro_batches": 2}}
    run.write_config(RunConfig.model_validate({**TWO, "rlhf": {"plan": kept}}), {})
    assert with_auto_plan(config, run, measures=False).rlhf.plan == kept  # the same command again goes on with it
    assert not capsys.readouterr().out
    monkeypatch.setattr(plan_module, "fastest", lambda *_, **__: [request.outcome("searched", best)])
    for before in (config, RunConfig.model_validate({**TWO, "processes": 3, "rlhf": {"plan": kept}})):
        run.write_config(before, {})
        assert with_auto_plan(config, run, measures=False).rlhf.plan == planned.rlhf.plan  # of so many processes


def test_training_that_must_be_fused_is_planned_so(profiled):
    config = RunConfig.model_validate({**TWO, "rlhf": {"fusion": {"training": "fused"}}})
    best, *others = fastest(Request.of(config, PROFILE.cluster), effort=0.05)
    actor, critic = (best.estimate.plan[f"{role}_train"].layout for role in ("actor", "critic"))
    assert best.runs and not others and actor.pipeline == critic.pipeline == 2 and actor.mesh == critic.mesh[::-1]
    assert best.seconds == pytest.approx(best.estimate.iteration_seconds - best.training.serial + best.training.fused)


@pytest.mark.parametrize(("multiplies", "precision"), [(True, "bf16"), (False, "fp32")])
def test_this_machine_is_planned_in_the_number_format_of_its_runs(profiled, monkeypatch, multiplies, precision):
    monkeypatch.setattr(Machine, "here", lambda: Machine(2, 8 * GIB))
    monkeypatch.setattr(loading, "multiplies_bf16", lambda: multiplies)
    request = make_request("opt-125m", None, 1, 2, THIS_MACHINE, 200, None, None, ["dtype=auto"])
    assert request.workload.precision == request.config.dtype == precision
    with pytest.raises(UserError, match="fp16 does not work on a CPU"):
        make_request("opt-125m", None, 1, 2, THIS_MACHINE, 200, None, None, ["dtype=fp16"])


@pytest.mark.parametrize("multiplies", [False, True])
def test_auto_counts_no_score_of_the_actor_where_training_equals_generation(
    profiled, tmp_path, monkeypatch, capsys, multiplies
):
    monkeypatch.setattr(Machine, "here", lambda: Machine(2, 8 * GIB))
    monkeypatch.setattr(step3_planned, "multiplies_bf16", lambda: multiplies)
    config = RunConfig.model_validate({**TWO, "dtype": "bf16"})
    planned = with_auto_plan(config, RunDirectory(tmp_path / "run"), measures=False)
    plan = from_blocks(planned.rlhf.plan)
    assert ("actor_score" in capsys.readouterr().out) != multiplies
    outlook = Outlook.of(planned, [PPO])  # as the run does, which finds out only as it starts
    assert ("actor_score" in outlook.plan.assignments) != multiplies and plan["actor_generate"].layout.tensor == 1


def test_auto_without_rates_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CHAT_CACHE", str(tmp_path))
    monkeypatch.setattr(Machine, "here", lambda: Machine(2, 8 * GIB))
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(UserError, match=r"measure it with rlhf-chat profile --processes 2 first"):
        with_auto_plan(RunConfig.model_validate(TWO), run, measures=False)


def test_a_machine_without_rates_is_profiled_first(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CHAT_CACHE", str(tmp_path))
    monkeypatch.setattr(Machine, "here", lambda: Machine(2, 8 * GIB))
    measured = []
    monkeypatch.setattr(plan_module, "FULL_EFFORT_RANKS", 100)
    monkeypatch.setattr("applications.plan.measure_to", lambda files, ranks: measured.append(ranks) or PROFILE)
    assert with_auto_plan(RunConfig.model_validate(TWO), RunDirectory(tmp_path / "run"), measures=True).rlhf.plan
    assert measured == [2]


def test_plan_and_run_refuse_the_same(profiled):
    """Plans drawn from all that can be costed, whatever the runtime makes of them."""
    draw, refused = random.Random(0), 0
    for advantage in ("gae", "grpo"):
        rlhf = {"advantage": advantage, "samples_per_prompt": 2}
        config = RunConfig.model_validate({**TWO, "rlhf": rlhf})
        request = Request.of(config, replace(PROFILE.cluster, devices_per_node=4))
        options = Options(request.graphs)
        shapes = [request.workload.models[role].shape for role in ("actor", "reward")]
        for _ in range(40):
            assignments = {}
            for call in request.graphs.graph.calls:
                mesh = draw.choice(list(meshes(request.cluster, options.space)))
                whole = [
                    one for one in options.candidates(call, mesh) if draw.random() < 0.2 or request.runs(call, one)
                ]
                assignments[call.name] = draw.choice(whole)
            plan = Plan(assignments)
            asked = RunConfig.model_validate({**TWO, "rlhf": {**rlhf, "plan": to_blocks(plan)}})
            try:
                require_runnable(asked, 4, *shapes, torch.float32)
                runs = True
            except UserError:
                runs = False
            assert runs == (not request.why_not_run(plan))
            refused += not runs
    assert 10 < refused < 70
