"""A run says which of its inputs changed since, as was missed in hiyouga/LlamaFactory #7085."""

import json
import os
from contextlib import ExitStack

import pytest

from applications import pipeline
from training import inputs
from training import stage_script as stage
from training.config_files import load_config
from training.inputs import changed_inputs, code_of, inputs_of
from training.preparation.prepare import prepare
from training.run_directory import RunDirectory, write_json
from training.steps import SFT


@pytest.fixture
def given(tmp_path):
    """One input of each kind; a test changes one."""
    (tmp_path / "rows").mkdir()
    (tmp_path / "m").mkdir()
    for name in ("a.jsonl", "rows/b.jsonl", "m/config.json", "m/model.safetensors", "mine.py"):
        (tmp_path / name).write_text(f"{name} as it was")
    source = f"data.source=[{tmp_path / 'a.jsonl'}=2, {tmp_path / 'rows'}, Dahoas/rm-static]"
    reward = f"rlhf.reward_function={tmp_path / 'mine.py'}:score"
    config = load_config([], [f"model={tmp_path / 'm'}", "reward_model=tiny", source, reward])
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    write_json(run.inputs_file, inputs_of(config))
    return run, config


@pytest.mark.parametrize(
    ("file", "changed", "means"),
    [
        ("a.jsonl", "a.jsonl", "the run keeps its rows"),
        ("rows/b.jsonl", "rows", "the run keeps its rows"),
        ("rows/new.jsonl", "rows", "the run keeps its rows"),
        ("m/model.safetensors", "m", "steps that are done"),
        ("mine.py", "mine.py", "rewarded by the new one"),
    ],
)
def test_what_changed_is_named_with_what_that_means(given, tmp_path, file, changed, means):
    assert changed_inputs(*given) == []
    (tmp_path / file).write_text("something else")
    (sentence,) = changed_inputs(*given)
    assert sentence.startswith(f"{tmp_path / changed} has changed since the run was prepared; ") and means in sentence


def test_other_text_of_the_same_length_is_a_change_and_a_touch_is_none(given, tmp_path):
    file = tmp_path / "a.jsonl"
    os.utime(file, ns=(1, 1))
    assert changed_inputs(*given) == []
    file.write_text("a.jsonl as it is!")
    assert len(changed_inputs(*given)) == 1


def test_what_a_reward_function_imports_from_beside_it_belongs_to_it(given, tmp_path):
    run, config = given
    (tmp_path / "tools").mkdir()
    for name, text in (
        ("mine.py", "import json\nfrom tools import words"),
        ("tools/__init__.py", ""),
        ("tools/words.py", "x = 1"),
        ("other.py", "x = 1"),
    ):
        (tmp_path / name).write_text(text)
    write_json(run.inputs_file, inputs_of(config))
    assert sorted(code_of(config, "reward_function")) == ["mine.py", "tools/__init__.py", "tools/words.py"]
    (tmp_path / "other.py").write_text("x = 2")
    assert changed_inputs(run, config) == []
    before = code_of(config, "reward_function")
    (tmp_path / "tools/words.py").write_text("x = 2")
    assert len(changed_inputs(run, config)) == 1
    assert [name for name, content in code_of(config, "reward_function").items() if content != before[name]] == [
        "tools/words.py"
    ]


def test_of_a_run_from_before_only_the_file_itself_is_known(given, tmp_path):
    (tmp_path / "helper.py").write_text("x = 1")
    (tmp_path / "mine.py").write_text("import helper")
    run, config = given
    prints = inputs_of(config)
    del prints["reward_function"][str(tmp_path / "mine.py")]["helper.py"]
    write_json(run.inputs_file, prints)
    assert changed_inputs(run, config) == []


def test_of_a_large_file_size_and_time_stand_for_its_content(given, tmp_path, monkeypatch):
    run, config = given
    monkeypatch.setattr(inputs, "LARGE", 1)
    write_json(run.inputs_file, inputs_of(config))
    assert not json.loads(run.inputs_file.read_text())["data"][str(tmp_path / "a.jsonl")]["a.jsonl"]["content"]
    assert changed_inputs(run, config) == []
    os.utime(tmp_path / "a.jsonl", ns=(1, 1))
    assert len(changed_inputs(run, config)) == 1


def test_what_is_gone_and_runs_from_before_are_no_news(given, tmp_path):
    run, config = given
    (tmp_path / "a.jsonl").unlink()
    assert changed_inputs(run, config) == []
    run.inputs_file.unlink()
    (tmp_path / "mine.py").write_text("something else")
    assert changed_inputs(run, config) == []


def test_a_command_that_has_nothing_left_to_do_says_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "applications.report.page.write_report", lambda run: "no report of a step that was never trained"
    )
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"q{i}", "response": "r"}) + "\n" for i in range(20)))
    config = load_config([], ["model=tiny", f"data.source={source}"])
    run = RunDirectory(tmp_path / "run")
    run.write_config(config, {})
    prepare(config, run, 1, lambda line: None)
    step = run.step(SFT)
    step.model.mkdir(parents=True)
    write_json(step.result_file, {})
    pipeline.run_pipeline(run, config, [SFT])
    assert "has changed" not in capsys.readouterr().out
    source.write_text('{"prompt": "new", "response": "new"}\n')
    pipeline.run_pipeline(run, config, [SFT])
    said = capsys.readouterr().out
    assert said.count(f"{source} has changed since the run was prepared; the run keeps its rows (a new run trains") == 1
    assert "done already" in said and "new round" not in said
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first-round2").mkdir(parents=True)
    config.data.parent, config.sft_model = str(tmp_path / "first"), "of the first"
    pipeline.run_pipeline(run, config, [SFT])
    said = "".join(capsys.readouterr().out.split())
    assert f"isthere now: rlhf-chat run --from {tmp_path}/first --go-on --name first-round3".replace(" ", "") in said


def test_a_stage_script_says_it_too(given, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stage, "prepare", lambda *_: None)
    (tmp_path / "a.jsonl").write_text("something else")
    run, config = given
    run.write_config(config, {})
    monkeypatch.setattr("sys.argv", ["main.py", str(run.path), "--trust"])
    with ExitStack() as held:
        stage.enter(run, run.step(SFT), stage.parse_arguments(), 1, held)
    said = f"Warning: {tmp_path / 'a.jsonl'} has changed since"
    assert said in capsys.readouterr().out and said in run.log_file.read_text()
