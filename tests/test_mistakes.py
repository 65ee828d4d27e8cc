"""A user's mistakes: one sentence with the way out, exit code 2, no traceback, nothing lost."""

import json
import shutil

import pytest

from applications.cli import main
from inference.errors import UserError
from tests.conftest import rlhf_chat

GOOD = {"prompt": "How are you?", "chosen": "Very well, thank you!", "rejected": "Go away."}


def sentence(monkeypatch, capsys, cwd, *arguments) -> str:
    """Run the command in this process; returns what it printed on stderr after checking how it ended."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr("sys.argv", ["rlhf-chat", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    err = capsys.readouterr().err
    assert ended.value.code == 2, err
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "--model", "opt-14b"], "opt-13b"),
        (["run", "--model", "no/such/directory/"], "no/such/directory"),
        (["run", "--modle", "tiny"], "--modle"),
        (["run"], "Say what to train"),
        (["run", "--model", "tiny", "--set", "sft.epoch=3"], "did you mean 'sft.epochs'"),
        (["run", "--model", "tiny", "--set", "rlhf.clip=-1"], "rlhf.clip"),
        (["run", "--model", "tiny", "--steps", "4"], "--steps takes some of 1,2,3"),
        (["run", "--model", "tiny", "--config", "none.yaml"], "no configuration file none.yaml"),
        (["run", "--from", "runs/nowhere", "--model", "tiny"], "leave --model out (another one: --set model=tiny)"),
        (["run", "--from", "runs/nowhere"], "runs/nowhere is not a run directory"),
        (["sft", "nowhere"], "not a run directory"),
        (["chat", "nowhere"], "nowhere"),
        (["rlhf", "new", "--model", "tiny"], "--sft-model MODEL"),
        (["dpo", "new", "--model", "tiny"], "--sft-model MODEL"),
        (["run", "--model", "tiny", "--method", "dqo"], "method"),
        (["run", "--model", "tiny", "--method", "dpo", "--steps", "3"], "--steps takes some of 1,2"),
    ],
)
def test_command_line(monkeypatch, capsys, tmp_path, arguments, expected):
    said = sentence(monkeypatch, capsys, tmp_path, *arguments)
    assert expected in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "no data source"),
        ("", "gives no data"),
        ("{broken\n", "line 1"),
        (json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "chosen": ""}) + "\n", "line 2"),
        (json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "rejected": GOOD["chosen"]}) + "\n", "line 2"),
        (json.dumps({"text": "x"}) + "\n", "line 1"),
    ],
)
def test_bad_data_is_named_by_line(workplace, tmp_path, text, expected):
    file = tmp_path / "rows.jsonl"
    if text is not None:
        file.write_text(text)
    done = rlhf_chat("sft", tmp_path / "run", "--model", "tiny", "--data", file, cwd=workplace)
    assert done.code == 2 and expected in done.err and "Traceback" not in done.err + done.out, done.err
    assert len(done.err.strip().splitlines()) == 1


def test_another_models_run_directory(monkeypatch, capsys, tiny_run, workplace):
    said = sentence(monkeypatch, capsys, workplace, "run", "--model", "opt-125m", "--name", "demo")
    assert "was made with other settings" in said and "another name" in said
    said = sentence(monkeypatch, capsys, workplace, "run", "--model", "tiny", "--name", "demo", "--seed", 9)
    assert "seed: 1 there, 9 now" in said and "rlhf-chat run --from runs/demo --name NEW --set seed=9" in said


def test_a_run_goes_on_with_smaller_micro_batches_and_with_nothing_else(tiny_run, workplace):
    half = workplace / "runs" / "half"
    shutil.copytree(tiny_run, half)
    shutil.rmtree(half / "step1_sft")
    said = rlhf_chat("sft", half, "--set", "sft.batch_size=4", cwd=workplace)
    assert said.code == 2 and "sft.batch_size: 16 there, 4 now" in said.err
    assert rlhf_chat("sft", half, "--set", "sft.micro_batch_tokens=64", cwd=workplace).code == 0
    assert "micro_batch_tokens: 64" in (half / "config.yaml").read_text()


def test_damaged_checkpoint(tiny_run, workplace):
    broken = workplace / "runs" / "broken"
    shutil.copytree(tiny_run, broken)
    shutil.rmtree(broken / "step3_rlhf" / "model")
    checkpoint = max((broken / "step3_rlhf" / "checkpoints").iterdir(), key=lambda d: int(d.name))
    victim = max((f for f in checkpoint.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:100])
    done = rlhf_chat("rlhf", broken, cwd=workplace)
    assert done.code == 2 and "is damaged" in done.err and "Traceback" not in done.err
    shutil.rmtree(checkpoint)
    assert rlhf_chat("rlhf", broken, cwd=workplace).code == 0


def test_damaged_model(tiny_run, workplace):
    broken = workplace / "runs" / "cut"
    shutil.copytree(tiny_run, broken)
    shutil.rmtree(broken / "step3_rlhf")
    weights = broken / "step1_sft" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    done = rlhf_chat("rlhf", broken, cwd=workplace)
    assert done.code == 2 and "cannot be loaded" in done.err and "Traceback" not in done.err


def test_a_reward_model_with_another_tokenizer(workplace, tmp_path):
    from transformers import AutoTokenizer

    from inference.model_store import resolve_model

    other = tmp_path / "other"
    shutil.copytree(resolve_model("tiny", lambda line: None), other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<|another|>"])
    tokenizer.save_pretrained(other)
    done = rlhf_chat("reward", tmp_path / "run", "--model", "tiny", "--reward-model", other, cwd=workplace)
    assert done.code == 2 and "has another tokenizer than the actor" in done.err, done.err


def test_debug_shows_the_traceback(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["rlhf-chat", "sft", "nowhere", "--debug"])
    with pytest.raises(UserError):
        main()


def test_a_failed_start_leaves_the_name_free(workplace, tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    arguments = ("run", "--model", "tiny", "--name", tmp_path / "run", "--steps", "1")
    assert rlhf_chat(*arguments, "--data", tmp_path / "rows.jsonl", cwd=workplace).code == 2
    rows = [json.dumps({**GOOD, "prompt": f"How is number {number}?"}) for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    done = rlhf_chat(*arguments, "--data", tmp_path / "rows.jsonl", "--seed", 3, cwd=workplace)
    assert done.code == 0, done.err


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_diverges_says_where_and_keeps_its_checkpoint(workplace, tmp_path, processes):
    settings = ["--set", "sft.optimizer.learning_rate=1e30", "--set", "sft.checkpoint_every=1"]
    arguments = ("run", "--model", "tiny", "--name", tmp_path / "run", "--steps", "1", "--processes", processes)
    done = rlhf_chat(*arguments, *settings, cwd=workplace)
    assert done.code == 1 and "The loss is not a finite number at step1_sft" in done.err, done.err[-2000:]
    assert "the last good checkpoint is" in done.err and "Traceback" not in done.err
    kept = json.loads((tmp_path / "run" / "step1_sft" / "diverged.json").read_text())
    assert kept["number"] > 1 and kept["rows"]
