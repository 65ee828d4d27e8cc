"""`rlhf-chat plan`: tables, data, pictures and plan files, without a search of full length."""

import json
import xml.etree.ElementTree
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from applications.cli import app
from applications.expected_time import _ppo
from applications.fit import Outlook, find_shape
from applications.plan_request import make_request
from inference.errors import UserError
from tests.training.planner.test_machine import PROFILE
from training.distributed import Ranks
from training.planner.footprint import DTYPES
from training.rlhf_settings import RLHFSettings
from training.step3_rlhf import old_logprobs, roles
from training.step3_rlhf.old_logprobs import iteration_calls
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
        "searched", "as set", "one mesh", "DeepSpeed-Chat", "Megatron-style", "not yet runnable",
    ]  # fmt: skip
    searched, *others = data["plans"]
    others, beyond = others[:-1], others[-1]
    assert searched["runs"] and all(
        searched["seconds_per_iteration"] <= plan["seconds_per_iteration"] for plan in others if plan["runs"]
    )
    assert beyond["seconds_per_iteration"] <= searched["seconds_per_iteration"]
    for plan in data["plans"]:
        cut = any(
            call["pipeline"] > 1 or (name.endswith("train") and call["tensor"] > 1)
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
    assert others[-1]["host_peak_bytes"] == 2 * 4 * actor.parameters  # both ranks of the node read it in fp32


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
    assert sum("s an iteration" in (text or "") for text in texts) == 6
    assert sum(element.tag.endswith("title") for element in picture.iter()) >= 36  # six calls of six plans


def test_a_faster_network_never_hurts(planned):
    _, directory = planned
    seconds = []
    for gbit in (10, 1600):
        check = ["--check", directory / "plan.yaml", "--network", gbit, "--json"]
        done = run(*check, "--nodes", 2, "--gpus-per-node", 1)
        seconds.append(json.loads(done.stdout)["plans"][0]["seconds_per_iteration"])
    assert seconds[0] > seconds[1]


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
    planned = request.graphs.graph.calls
    for loads in ("_train", "_freeze"):
        monkeypatch.setattr(roles.Roles, loads, lambda *_: None)
    monkeypatch.setattr(old_logprobs, "multiplies_bf16", lambda: multiplies)
    monkeypatch.setattr(roles, "settle_exactness", lambda stage, _: (multiplies and dtype == "bf16") or None)
    stage = SimpleNamespace(config=request.config, dtype=DTYPES[dtype], ranks=Ranks(0, 1, torch.device("cpu")))
    ran = roles.Roles(stage, None, tmp_path, None, (1, 1)).calls
    assert planned == ran or multiplies  # `plan` plans for a GPU
    monkeypatch.setattr(Outlook, "dtype", DTYPES[dtype])  # fp16 needs a GPU
    costed, plan = _ppo(Outlook.of(request.config, [PPO], 1), request.cluster)
    assert costed.graph.calls == ran and list(plan.assignments) == [call.name for call in ran]
    assert ("actor_score" in plan.assignments) == (
        setting != "generation" and not (setting == "auto" and (dtype == "fp32" or (dtype == "bf16" and multiplies)))
    )
