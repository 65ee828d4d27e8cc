"""What held-out rows say against a training; and a file of settings that another version wrote."""

import pytest
import yaml

from inference.errors import UserError
from training.run_directory import RunDirectory
from training.steps import DPO, SFT
from training.supervised import nothing_learned


@pytest.mark.parametrize(
    ("step", "now", "is_end", "said"),
    [
        (SFT, {"eval/loss": 1.9}, False, ""),
        (SFT, {"eval/loss": 2.0}, False, "the held-out loss is 2.000, before training it was 2.000"),
        (SFT, {"eval/loss": float("nan")}, True, "the held-out loss is nan"),
        (DPO, {"eval/loss": 2.5, "eval/accuracy": 0.5}, False, ""),
        (DPO, {"eval/loss": 1.0, "eval/accuracy": 0.54}, True, "54.0% of the held-out pairs"),
        (DPO, {"eval/loss": 2.5, "eval/accuracy": 0.55}, True, ""),
    ],
)
def test_a_training_that_teaches_nothing_is_said(step, now, is_end, said):
    found = nothing_learned(step, {"eval/loss": 2.0}, now, is_end)
    assert found.startswith(said) and bool(found) == bool(said)
    assert not said or f"{step.command}.optimizer.learning_rate" in found


def test_a_setting_of_another_version_is_named_with_file_and_version(tmp_path):
    run = RunDirectory(tmp_path)
    run.config_file.write_text(yaml.safe_dump({"model": "m", "sft": {"wings": 2}, "versions": {"rlhf-chat": "9.9"}}))
    with pytest.raises(UserError) as refused:
        run.read_config()
    assert str(refused.value).startswith(f"{run.config_file}, written by rlhf-chat 9.9 (this is ")
    assert "There is no setting 'sft.wings'" in str(refused.value)
