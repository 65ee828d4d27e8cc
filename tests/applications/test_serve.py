"""`rlhf-chat serve`: from the command to an answer and to Ctrl-C, and what it refuses."""

import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import ANY

import httpx
import openai
import pytest

from applications.cli import main
from applications.serve import choose_token, find_collecting
from inference.errors import UserError
from inference.families import build_tiny_model
from inference.preferences import Answer, BlindPair, PreferenceFile
from inference.serving.judging import ServedModel
from inference.serving.service import find_served_models
from training.run_directory import RunDirectory

CONFIG = '{"architectures": ["OPTForCausalLM"]}'


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run, as far as serving looks; step 1 has a real model."""
    run = tmp_path_factory.mktemp("runs") / "demo"
    build_tiny_model(run / "step1_sft" / "model")
    finish(run, "step1_sft")
    (run / "config.yaml").write_text("model: tiny\n")
    return run


def finish(run: Path, step: str) -> None:
    (run / step / "model").mkdir(parents=True, exist_ok=True)
    config = run / step / "model" / "config.json"
    if not config.exists():
        config.write_text(CONFIG)
    (run / step / "result.json").write_text("{}")


def test_names_of_models(run, tmp_path, capsys):
    assert find_served_models(run) == {"sft": run / "step1_sft" / "model"}
    assert "so this is the SFT model" in capsys.readouterr().err
    both = tmp_path / "both"
    (both / "step3_rlhf").mkdir(parents=True)
    (both / "config.yaml").write_text("")
    finish(both, "step1_sft")
    finish(both, "step3_rlhf")
    assert list(find_served_models(both)) == ["sft", "rlhf"]
    assert find_served_models(both / "step3_rlhf") == {"rlhf": both / "step3_rlhf" / "model"}
    assert list(find_served_models(both / "step1_sft" / "model")) == ["sft"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text(CONFIG)
    assert find_served_models(mine) == {"mine": mine}
    with pytest.raises(UserError, match="does not exist"):
        find_served_models(tmp_path / "nothing")


def test_whose_answers_are_judged_and_where_preferences_go(tmp_path, capsys):
    run, mine = RunDirectory(tmp_path / "demo"), tmp_path / "mine"
    for place in (run.data, mine):
        place.mkdir(parents=True)
    run.config_file.write_text("model: tiny\nrlhf: {temperature: 0.6}\ndata: {max_response_tokens: 20}\n")
    finish(run.path, "step1_sft")
    finish(run.path, "step3_rlhf")
    prompts = [[{"role": "user", "content": text}] for text in ("One", "Two", "Three")]
    (run.data / "prompts_train.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    pair = BlindPair(prompts[0], Answer("demo/rlhf", "x", 1), Answer("demo/rlhf", "y", 2), 0.6, 20)
    PreferenceFile(run.preferences).add(pair.judged("a", "ada"))
    newest, first = ServedModel("rlhf", "demo/rlhf"), ServedModel("sft", "demo/sft")
    for target in (run.path, run.path / "step3_rlhf", run.path / "step3_rlhf" / "model"):
        found, others = collecting_of(target)
        assert (found.models, found.temperature, found.max_tokens) == ((newest, newest), 0.6, 20) and not others
        assert found.file.path == run.preferences and found.prompts == prompts[1:]  # the first has been judged
    assert collecting_of(run.path, "sft")[0].models == (newest, first)
    assert collecting_of(run.path / "step3_rlhf", "sft")[1] == {"demo-sft": run.path / "step1_sft" / "model"}
    (mine / "config.json").write_text(CONFIG)
    assert collecting_of(run.path, str(mine)) == (ANY, {"mine": mine})
    for same in ("rlhf", str(run.path), str(run.path / "step3_rlhf" / "model")):
        with pytest.raises(UserError, match=r"are both demo/rlhf: give another one with --against"):
            collecting_of(run.path, same)
    with pytest.raises(UserError, match=r"step2_dpo .* is not finished"):
        collecting_of(run.path, "dpo")
    run.preferences.write_text("{}\n")
    assert collecting_of(run.path)[0].prompts == prompts  # a damaged file keeps nobody from the chat
    assert "is no file of preferences (line 1: " in capsys.readouterr().err
    with pytest.raises(UserError, match=r"config\.yaml is no file of preferences"):
        collecting_of(run.path, preferences=run.config_file)
    assert collecting_of(mine) == (None, {})
    with pytest.raises(UserError, match="lies in no run: say where preferences go, with --preferences FILE"):
        collecting_of(mine, "sft")
    elsewhere, others = collecting_of(mine, str(run.path), tmp_path / "preferences.jsonl")
    assert elsewhere.models == (ServedModel("mine", "mine"), ServedModel("demo-rlhf", "demo/rlhf"))
    assert elsewhere.file.path == tmp_path / "preferences.jsonl" and list(others) == ["demo-rlhf"]


def collecting_of(target: Path, against: str = "", preferences: Path | None = None) -> tuple:
    return find_collecting(target, find_served_models(target), against, preferences, trusts=True)


def test_a_token_is_made_where_others_can_come_in():
    assert choose_token(None, "127.0.0.1") is None
    assert choose_token("mine", "127.0.0.1") == choose_token("mine", "0.0.0.0") == "mine"
    made = choose_token(None, "0.0.0.0")
    assert made is not None and len(made) >= 32 and made != choose_token(None, "0.0.0.0")
    for bad in ("", " x", "ü"):
        with pytest.raises(UserError, match="token"):
            choose_token(bad, "127.0.0.1")


def refusal(monkeypatch, capsys, *arguments: object) -> str:
    monkeypatch.setattr("sys.argv", ["rlhf-chat", "serve", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    err = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in err
    return err


def test_what_cannot_be_served(monkeypatch, capsys, run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"Port {port} is in use" in refusal(monkeypatch, capsys, run, "--port", port)
    assert "nowhere does not exist" in refusal(monkeypatch, capsys, "nowhere")
    much = ("--port", 0, "--slots", 10**6, "--context", 512)
    assert "give fewer --slots" in refusal(monkeypatch, capsys, run, *much)


def test_from_start_to_ctrl_c(run):
    program = Path(sys.executable).with_name("rlhf-chat")
    command = [program, "serve", run, "--port", "0", "--slots", "2", "--token", "secret"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.readline()
        found = re.search(r"Serving sft of .*; the chat page is (http://127\.0\.0\.1:\d+)/#token=secret", first)
        assert found, first + process.stderr.read()
        line = process.stdout.readline()
        preferences = f"preferences go to {run / 'preferences.jsonl'}"
        assert line == f"To judge answers of demo/sft: {found[1]}/prefer#token=secret; {preferences}\n"
        headers = {"authorization": "Bearer secret"}
        mine = httpx.get(f"{found[1]}/v1/preferences", params={"by": "ada"}, headers=headers, timeout=60)
        assert mine.json() == {"count": 0, "others": 0, "suggests": False}
        client = openai.OpenAI(base_url=f"{found[1]}/v1", api_key="secret")
        messages = [{"role": "user", "content": "How are you?"}]
        answer = client.chat.completions.create(model="sft", messages=messages, max_tokens=5, seed=1)
        assert answer.usage.completion_tokens <= 5
        with client.chat.completions.create(
            model="sft", messages=messages, max_tokens=100, stream=True, temperature=2
        ) as stream:
            next(iter(stream))
            process.send_signal(signal.SIGINT)
            assert list(stream)[-1].choices[0].finish_reason in ("stop", "length")  # it may end
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out.rstrip().endswith("Stopped.") and "Traceback" not in err, err
    with pytest.raises(httpx.ConnectError):
        httpx.get(found[1])
