"""`rlhf-chat samples`: which samples it shows, and what it says of them."""

import json

import pytest

from applications.chat import samples_command
from inference.errors import UserError
from tests.pages import root_command
from training.run_directory import RunDirectory, write_json
from training.steps import PPO


def make_run(path) -> RunDirectory:
    """Six samples of iterations 2 and 4, of rewards 0 1 2 0 1 2 and of 1 to 6 tokens."""
    run = RunDirectory(path / "run")
    run.step(PPO).path.mkdir(parents=True)
    run.config_file.write_text("model: tiny\n")
    rows = [
        {"number": number, "sample": n, "prompt": "<|user|>Hi<|end|>", "response": f"of {number} [b]{n}<|end|>"}
        | {"reward/model": n % 3 + 1.0, "reward/score": n % 3 + 0.5, "reward/missing_end": 0.0, "reward/kl": -0.5}
        | {"reward/total": float(n % 3), "kl": [0.25] * (n + 1), "response_ids": [7] * (n + 1), "truncated": n == 5}
        for number in (2, 4)
        for n in range(6)
    ]
    run.step(PPO).rollouts_file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"number": 5, "sa')
    return run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], (4, [0, 1, 2, 3, 4, 5])),
        (["--iteration", "2"], (2, [0, 1, 2, 3, 4, 5])),
        (["--worst", "2"], (4, [0, 3])),
        (["--best", "1", "--worst", "1"], (4, [0, 5])),
        (["--longest"], (4, [5, 4, 3, 2, 1])),
        (["--longest", "2", "--iteration", "2"], (2, [5, 4])),
    ],
)
def test_the_newest_iteration_and_the_ends_of_it(tmp_path, capsys, arguments, expected):
    run = make_run(tmp_path)
    command = root_command().commands["samples"]
    command.invoke(command.make_context("samples", [*arguments, str(run.path), "--json"]))
    found = json.loads(capsys.readouterr().out)
    assert ({row["number"] for row in found}, [row["sample"] for row in found]) == ({expected[0]}, expected[1])


def test_a_sample_is_shown_with_its_special_tokens_and_what_it_was_worth(tmp_path, capsys):
    samples_command(make_run(tmp_path).path, None, 0, 1, 0, as_json=False)
    shown = capsys.readouterr().out
    assert "Iteration 4: 1 of 6 samples" in shown and "<|user|>Hi<|end|>of 4 [b]5<|end|>" in shown
    assert "reward 2.00 (score 2.50, KL penalty -0.50) · given by model 3.00 · KL 1.50 nats" in shown
    assert "6 tokens, truncated" in shown


def test_what_was_not_written_is_a_sentence_with_the_way_out(tmp_path):
    run = make_run(tmp_path)
    with pytest.raises(UserError, match=r"No samples of iteration 3 .* there are those of 2, 4"):
        samples_command(run.path, 3, 0, 0, 0, as_json=False)
    run.step(PPO).rollouts_file.unlink()
    with pytest.raises(UserError, match=r"rlhf-chat rlhf .*run --set rlhf.rollouts_every=1"):
        samples_command(run.path, None, 0, 0, 0, as_json=False)
    write_json(run.step(PPO).result_file, {})
    run.step(PPO).model.mkdir()
    with pytest.raises(UserError, match=r"rlhf-chat run --from .*run --name NEW --set rlhf.rollouts_every=1"):
        samples_command(run.path, None, 0, 0, 0, as_json=False)
