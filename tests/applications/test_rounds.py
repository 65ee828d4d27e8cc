"""The table of rounds, from files made by hand."""

import json

import pytest
import yaml

from applications.evaluate import first_sft, over_first_file, rounds, rounds_table
from inference.preferences import Preference
from tests.applications.test_report_table import DPO_PAIR, RLHF, SFT, WIN
from training import steps
from training.run_directory import RunDirectory
from training.steps import DPO, PPO

BETTER = {**SFT, "kl": 1.25, "length": 11.0, "most_frequent_share": 0.01}


def make_run(path, step, evaluation, **settings):
    run = RunDirectory(path)
    run.step(step).model.mkdir(parents=True)
    run.step(step).result_file.write_text("{}")
    run.data.mkdir()
    (run.data / "counts.json").write_text(json.dumps({"rows": {"pairs_train": 1234}}))
    run.config_file.write_text(yaml.safe_dump({"model": "tiny", **settings}))
    run.comparison_of(step)[0].write_text(json.dumps({"prompts": 80, **evaluation}))
    return run


def preference(by, model, winner="a", time="2026-01-31T12:00:00.000Z"):
    models = (f"{model}/dpo", "first/rlhf") if model == "second" else ("first/rlhf", "first/rlhf")
    return Preference(
        "1", time, by, [{"role": "user", "content": by}], "yes", "no", winner, *models, 1, 2, 0.7, 16
    ).line


@pytest.fixture
def second(tmp_path):
    """Trained on what was collected for the first run; then people compared the two."""
    first = make_run(tmp_path / "first", PPO, {"sft": SFT, "rlhf": RLHF, "win_rate": WIN})
    first.step(steps.SFT).model.mkdir(parents=True)
    first.step(steps.SFT).result_file.write_text("{}")
    late = preference("eve", "first", time="2026-03-01T12:00:00.000Z")
    first.preferences.write_text("\n".join([*[preference("ann", "first")] * 3, preference("bob", "first"), late, ""]))
    evaluation = {"sft": SFT, "dpo": BETTER, "pair": DPO_PAIR, "win_rate": {**WIN, "judge": "reward of first"}}
    data = {"parent": str(first.path), "source": str(first.preferences)}
    second = make_run(tmp_path / "second", DPO, evaluation, data=data, sft_model=str(first.step(PPO).model))
    second.starts_file.write_text(
        json.dumps({"number": 1, "time": "2026-02-01T12:00:00+00:00", "what": "preparation"}) + "\n"
    )
    second.preferences.write_text(
        "\n".join([*(preference(f"p{i}", "second") for i in range(3)), preference("p", "second", "b")])
    )
    return second


def test_a_row_for_each_round(second, monkeypatch):
    over_first = over_first_file(second, DPO)
    over_first.parent.mkdir()
    far = {"win_rate": {**WIN, "rate": 0.8}, "pair": {"against": "first (SFT)", "dpo": "DPO"}, "dpo": {"kl": 4.5}}
    over_first.write_text(json.dumps(far))
    first, last = rounds(second)
    assert (
        first.name == "first (RLHF)"
        and first.over_before == first.over_first == "76.2% (70.3% to 82.2%), learned reward"
    )
    assert (
        (first.pairs, first.by_people) == ("1,234", "")
        and "KL" not in first.guard_rails
        and "Length" in first.guard_rails
    )
    assert (last.name, last.pairs) == ("second (DPO)", "1,234 (ann 3, bob 1)")  # who judged later is not in it
    assert last.over_before.endswith("reward of first") and last.over_first.startswith("80.0%")
    assert last.by_people.startswith("75.0% (") and last.by_people.endswith(", 4")
    assert (last.kl, last.length, last.guard_rails) == ("1.25 (4.50)", "11.0", "hold") and first.kl == "3.46"
    monkeypatch.setenv("COLUMNS", "200")
    table = rounds_table(second)
    assert all(cell in table for cell in (last.pairs, "second (DPO)", "over the first SFT model"))


def test_the_model_with_which_the_chain_began(second):
    first = RunDirectory(second.path.parent / "first")
    assert first_sft(second) == first.step(steps.SFT).model and first_sft(first) is None
    values = yaml.safe_load(second.config_file.read_text())
    second.config_file.write_text(yaml.safe_dump({**values, "sft_model": str(first.step(steps.SFT).model)}))
    assert first_sft(second) is None  # against which it is measured anyway
    assert rounds(first) == [] and rounds_table(first) == ""


def test_what_was_not_measured_is_empty(second):
    for file in (second.comparison_of(DPO)[0], second.preferences, second.data / "counts.json"):
        file.unlink()
    last = rounds(second)[-1]
    assert (last.over_before, last.over_first, last.by_people, last.kl, last.guard_rails) == ("",) * 5
