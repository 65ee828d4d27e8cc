"""Entries of a user's own: those of docs/estimators.md, and what is wrong with others."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inference.errors import UserError
from tests.training.step3_rlhf.test_experience import two_prompts
from tests.warm import ROOT
from training import uses
from training.config_files import load_config
from training.formulas.dpo_losses import DPO_LOSSES, Pairs
from training.formulas.estimators import ESTIMATORS
from training.formulas.own import loaded, try_own
from training.formulas.shapings import SHAPINGS, RunningStatistics
from training.inputs import inputs_of
from training.run_directory import RunDirectory
from training.step3_rlhf.experience import Targets


@pytest.fixture
def mine(tmp_path) -> Path:
    """A file with what the page has typed out."""
    page = (ROOT / "docs" / "estimators.md").read_text()
    file = tmp_path / "mine.py"
    file.write_text("\n".join(re.findall(r"```python\n(.*?)```", page, re.S)))
    return file


def config_of(*settings: str):
    return load_config([], ["model=tiny", "rlhf.samples_per_prompt=2", *settings])


def test_the_estimator_of_the_page_decides_everything_from_its_line(mine, monkeypatch):
    monkeypatch.chdir(mine.parent)
    config = config_of("rlhf.advantage=mine.py:by_median")
    assert config.rlhf.kl_in_loss and not config.rlhf.has_critic
    assert [call.name for call in config.rlhf.calls] == [
        "actor_generate",
        "reference_score",
        "reward_score",
        "actor_train",
    ]
    with pytest.raises(UserError, match=r"by_median\(.*needs samples_per_prompt of 2"):
        config_of("rlhf.advantage=mine.py:by_median", "rlhf.samples_per_prompt=1")
    targets = Targets.of(two_prompts(), config.rlhf, kl_coefficient=1.0)  # scores 2 and 1, -1 and 1
    found = [row[mask].tolist() for row, mask in zip(targets.advantages, targets.mask, strict=True)]
    assert found == [[1.0, 1.0], [0.0], [0.0] * 3, [2.0]]  # less the lower of two


def test_one_with_a_critic_in_the_rewards_and_whitened(mine):
    text = mine.read_text().replace('kl="loss", samples=2', "critic=True, whiten=True")
    mine.write_text(text.replace("(scored.by_prompt -", "(scored.values.sum(1).view(-1, scored.group) -"))
    rlhf = config_of(f"rlhf.advantage={mine}:by_median", "rlhf.samples_per_prompt=1").rlhf
    assert rlhf.has_critic and not rlhf.kl_in_loss and rlhf.calls[-1].name == "critic_train"
    assert ESTIMATORS.entry(rlhf.advantage).whiten


def test_what_a_run_keeps_is_read_again_without_the_file(mine):
    config = config_of(f"rlhf.advantage={mine}:by_median", f"dpo.loss={mine}:squared")
    mine.unlink()
    again = load_config([], [], config.model_dump(mode="json"))
    assert again == config and again.rlhf.kl_in_loss


def test_reading_settings_runs_nothing_and_imports_no_torch(mine):
    mine.write_text("raise SystemExit('it ran')\n" + mine.read_text())
    code = (
        "import sys, rlhf_chat; from training.config_files import load_config\n"
        f"config = load_config([], ['model=tiny', 'rlhf.samples_per_prompt=2', 'rlhf.advantage={mine}:by_median'])\n"
        "print(config.rlhf.kl_in_loss, 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True False\n"


def test_shaping_and_loss_of_the_page(mine):
    config = config_of(f"rlhf.reward_normalization={mine}:robust_scale", f"dpo.loss={mine}:squared")
    shaping = loaded(SHAPINGS, config.rlhf.reward_normalization)
    assert shaping.formula([3.0, 1.0, 9.0], RunningStatistics()) == (3.0, 4.0)
    loss = loaded(DPO_LOSSES, config.dpo.loss)
    assert loss.formula(Pairs(torch.tensor([0.5, 3.0]), torch.zeros(2), 0.1)).tolist() == [0.25, 0.0]
    with pytest.raises(UserError, match="reads no label_smoothing: leave it at 0, or use sigmoid or robust"):
        config_of(f"dpo.loss={mine}:squared", "dpo.label_smoothing=0.1")
    try_own(config)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("", "must have a line `by_median = Estimator(formula, ...)`"),
        ("by_median = Estimator(less_median, samples=1 + 1)", "as they are, not compute them"),
        ("by_median = Estimator(less_median, sample=2)", "says sample=2; what it may say is critic (bool), kl (str)"),
        ("by_median = Estimator(less_median, critic='yes')", "says critic='yes'"),
        ("by_median = Estimator(less_median, kl='rewards')", "has kl='reward' or kl='loss'"),
        ("by_median = Estimator(less_median, samples=0)", "samples of 1 or more"),
        ("def (", "is no Python that can be read"),
    ],
)
def test_what_is_wrong_with_an_entry_is_one_sentence(mine, line, sentence):
    mine.write_text(re.sub("by_median =.*", line, mine.read_text()))
    with pytest.raises(UserError) as error:
        config_of(f"rlhf.advantage={mine}:by_median")
    assert sentence in str(error.value) and "rlhf.advantage" in str(error.value)
    for wrong in ("gea", "mine.py", "gone.py:x"):
        with pytest.raises(UserError, match=r"one of gae, rloo|cannot be read"):
            config_of(f"rlhf.advantage={wrong}")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("1 / 0", "failed (ZeroDivisionError: division by zero)"),
        ("scored.by_prompt", "must return a tensor of shape (4, 3) or (4,)"),
        ("scored.score / 0", "not finite"),
        ("None", "must return a tensor"),
    ],
)
def test_a_formula_is_tried_before_anything_trains_and_again_once_it_is_corrected(mine, body, sentence):
    right = mine.read_text()
    config = config_of(f"rlhf.advantage={mine}:by_median")
    mine.write_text(re.sub(r"return \(scored.*", f"return {body}", right))
    with pytest.raises(UserError) as error:
        try_own(config)
    assert sentence in str(error.value) and "mine.py:by_median" in str(error.value)
    mine.write_text(right)
    try_own(config)


def test_facts_that_have_changed_since_are_refused(mine):
    config = config_of(f"rlhf.advantage={mine}:by_median")
    mine.write_text(mine.read_text().replace('kl="loss"', 'kl="reward"'))
    with pytest.raises(UserError, match=r"was made with .*'loss'.* now says .*'reward'"):
        try_own(config)
    mine.unlink()
    with pytest.raises(UserError, match="there is no file"):
        try_own(config)


def test_the_file_is_an_input_and_needs_a_yes(mine, tmp_path):
    config = config_of(f"rlhf.advantage={mine}:by_median")
    assert list(inputs_of(config)["formulas"][str(mine)]) == ["mine.py"]
    asked = [use for use in uses.of_training(RunDirectory(tmp_path / "run"), config) if use.content]
    assert [(use.what, use.setting) for use in asked] == [(f"run {mine}", "rlhf.advantage")]
