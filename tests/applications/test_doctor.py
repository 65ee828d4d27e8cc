"""`rlhf-chat doctor`: the verdict on a model, and the report on the machine."""

import json
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch

from applications import doctor, machine_report
from applications.cli import main
from applications.machine_report import Check
from inference.errors import UserError
from tests.conftest import rlhf_chat
from training.termination import StageFailed


def run(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """The command in this process: its exit code and what it printed."""
    monkeypatch.setattr("sys.argv", ["rlhf-chat", "doctor", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return int(ended.value.code or 0), printed.out, printed.err


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    from inference.families import build_tiny_model

    directory = tmp_path_factory.mktemp("doctor") / "tiny"
    build_tiny_model(directory)
    return directory


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_model_directory(monkeypatch, capsys, tiny, dtype):
    code, out, _ = run(monkeypatch, capsys, "--model", tiny, "--dtype", dtype)
    assert code == 0, out
    assert f"opt, 132,736 parameters, {dtype}" in out  # 512 x 64 + 514 x 64 + 2 layers of 33,472 + 128
    assert "packed attention" in out and "training's log-probabilities" in out
    (line,) = (line for line in out.splitlines() if "training = generation: " in line)
    assert line.endswith("to the bit")
    assert last_line(out).startswith("Verdict: equal: the largest ")


def test_two_ranks(tiny, workplace):
    done = rlhf_chat("doctor", "--model", tiny, "--tp", 2, "--dtype", "fp32", cwd=workplace)
    assert done.code == 0, done.out + done.err
    assert "tensor-parallel degree 2" in done.out and "132,736 parameters" in done.out
    assert last_line(done.out).startswith("Verdict: equal: ") and done.err == ""


def test_a_model_that_is_not_equal(monkeypatch, capsys, tiny):
    """The training forward is another function: exit code 1, and the sentence says which and where."""
    forward = doctor.training_forward

    def wrong(model, exact=None):
        right = forward(model)
        return lambda rows: right(rows) - 0.5

    monkeypatch.setattr(doctor, "training_forward", wrong)
    code, out, _ = run(monkeypatch, capsys, "--model", tiny, "--dtype", "fp32")
    assert code == 1
    assert last_line(out).startswith("Verdict: NOT equal: the largest deviation is 0.5 (training's log-probabilities")
    assert out.count("TOO LARGE") == 1
    assert "with rlhf.exact=true within 5.0e-01 nats a token" in out


def test_a_run_directory_stands_for_its_newest_model(tiny, tmp_path):
    step = tmp_path / "run" / "step1_sft"
    shutil.copytree(tiny, step / "model")
    (tmp_path / "run" / "config.yaml").write_text("model: tiny\n")
    (step / "result.json").write_text("{}")
    assert doctor.find_model(str(tmp_path / "run")) == step / "model"
    assert doctor.find_model(str(tiny)) == tiny


def test_a_preset(monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_CHAT_CACHE", str(tmp_path))
    assert doctor.find_model("tiny").parent == tmp_path


def test_the_training_forward_leaves_the_model_as_it_was(tiny):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    before = model.config._attn_implementation
    logprobs = doctor.training_forward(model)([(torch.tensor([5, 6]), torch.tensor([7])), (torch.tensor([8]),) * 2])
    with torch.no_grad():
        expected = [model(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in ([5, 6], [8])]
    assert logprobs.tolist() == pytest.approx([float(expected[0][7]), float(expected[1][8])], abs=1e-5)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "TINY", "--tp", 3], "degrees that fit it: 1, 2, 4"),
        (["--model", "TINY", "--dtype", "fp8"], "There is no dtype 'fp8'"),
        (["--model", "no/such/directory"], "no/such/directory"),
        (["--model", "smollm"], "did you mean"),
        (["--model", "EMPTY"], "neither a run directory"),
        (["--tp", 2], "give it with --model"),
        (["--model", "TINY", "--hub"], "leave --model out"),
    ],
)
def test_mistakes_are_one_sentence(monkeypatch, capsys, tiny, tmp_path, arguments, expected):
    places = {"TINY": tiny, "EMPTY": tmp_path}
    code, out, err = run(monkeypatch, capsys, *(places.get(argument, argument) for argument in arguments))
    assert code == 2 and expected in err and len(err.strip().splitlines()) == 1
    assert "Verdict" not in out


def test_a_reward_model_is_refused(tiny, tmp_path):
    copied = tmp_path / "reward"
    shutil.copytree(tiny, copied)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "architectures": ["OPTForSequenceClassification"]}))
    with pytest.raises(UserError, match="is a reward model"):
        doctor.find_model(str(copied))


def test_a_family_that_cannot_be_cut_is_refused_before_ranks_start(tmp_path):
    from transformers import AutoConfig

    AutoConfig.for_model("codegen", vocab_size=40, n_embd=32, n_layer=2, n_head=4).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'codegen' cannot be cut over ranks"):
        doctor.check_cut(tmp_path, 2)
    doctor.check_cut(tmp_path, 1)


@pytest.mark.parametrize(
    ("script", "error", "expected"),
    [
        (
            """for last; do :; done; echo '{"error": "The model is broken."}' > "$last" """,
            UserError,
            "The model is broken",
        ),
        ("echo 'torch.OutOfMemoryError: no room' >&2", StageFailed, r"2 processes broke off \(torch.Out.*no room"),
        ("true", StageFailed, "code 1"),
    ],
)
def test_ranks_that_fail_say_why(monkeypatch, tiny, tmp_path, script, error, expected):
    """In place of the launcher, a script that gets the same arguments; the last is the file for the result."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(error, match=expected):
        doctor.check_model(str(tiny), degree=2, dtype="fp32")


# The machine


def test_the_machine_report(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_CHAT_CACHE", str(tmp_path / "not" / "yet"))
    code, out, _ = run(monkeypatch, capsys)
    assert code == 0
    lines = out.strip().splitlines()
    assert [line[:18].strip() for line in lines[:-1]] == [
        *("system", "versions", "imports", "cpu", "memory", "gpus", "compiler", "cache", "working directory"),
        "loopback",
    ]
    assert f"torch {torch.__version__.partition('+')[0]}" in lines[1] and f"{os.cpu_count()} cores" in lines[3]
    assert lines[-1].startswith("Verdict: runs are possible")
    assert not (tmp_path / "not").exists()


def test_a_verdict_names_what_is_wrong():
    fine, warning, worse = Check("a", "ok", ""), Check("b", "warning", ""), Check("c", "impossible", "")
    assert machine_report.verdict([fine]) == "Verdict: runs are possible, nothing is missing."
    assert machine_report.verdict([fine, warning]) == "Verdict: runs are possible; mind the warning: b."
    assert machine_report.verdict([worse, warning, fine]) == "Verdict: runs are not possible here: see c."


def test_what_makes_runs_impossible_is_exit_code_1(monkeypatch, capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("RLHF_CHAT_CACHE", str(file))  # not a directory, so nothing can be kept in it
    code, out, _ = run(monkeypatch, capsys)
    assert code == 1 and "set RLHF_CHAT_CACHE elsewhere" in out
    assert last_line(out) == "Verdict: runs are not possible here: see cache."


def test_packages_that_do_not_fit(monkeypatch):
    monkeypatch.setattr(
        machine_report,
        "requires",
        lambda name: ["torch>=99", "no-such-package>=1", "typer", "pytest>=99; extra == 'dev'"],
    )
    torch_version = machine_report.versions()["torch"]
    expected = [f"torch {torch_version}, needed >=99", "no-such-package is not installed, needed >=1"]
    assert machine_report.wrong_packages() == expected
    assert machine_report.check_versions().state == "impossible"


def test_a_package_that_cannot_be_imported(monkeypatch):
    monkeypatch.setattr(machine_report, "HEAVY", ("no_such_package",))
    checks = list(machine_report.machine_checks(ask_hub=False))
    assert [check.name for check in checks if check.state == "impossible"] == ["imports"]
    assert not {"gpus", "memory"} & {check.name for check in checks}  # they would need it


def test_a_gpu_that_torch_cannot_use(monkeypatch, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("torch can use this machine's GPU")
    assert machine_report.check_gpus().state == "ok"
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100, 81559 MiB, 570.1'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = machine_report.check_gpus()
    assert found.state == "warning" and "NVIDIA H100, 81559 MiB, 570.1: torch" in found.text


def test_processes_that_cannot_meet(monkeypatch):
    assert machine_report.check_loopback().state == "ok"

    def refuse(*_):
        raise OSError("not permitted")

    monkeypatch.setattr(socket, "create_server", refuse)
    assert "not permitted" in machine_report.check_loopback().text
    assert machine_report.check_loopback().state == "warning"


def test_little_disk_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setattr(machine_report, "LITTLE_DISK", 10**18)
    assert machine_report.on_disk("disk", tmp_path / "new", "make room").text.endswith("GiB free: make room")


def test_the_hub_is_asked_only_when_wanted(monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    code, printed, _ = run(monkeypatch, capsys)
    assert code == 0 and "127.0.0.1:9" not in printed
    code, printed, _ = run(monkeypatch, capsys, "--hub")
    assert code == 0 and "http://127.0.0.1:9 cannot be reached" in printed
