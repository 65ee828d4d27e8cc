"""Entries of a user's own: those of docs/estimators.md, and what is wrong with others."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inference.errors import UserError
from tests.training.step3_rlhf.test_experience import two_prompts
from tests.warm import ROOT
from training import trust
from training.config_files import load_config
from training.distributed import Ranks
from training.formulas.estimators import ESTIMATORS, SHAPINGS, RunningStatistics
from training.formulas.losses import DPO_LOSSES, Pairs
from training.formulas.own import loaded, try_own
from training.inputs import inputs_of
from training.rewards import Rewards
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
        ("by_median = Estimator(less_median, True)", "must name its facts one by one"),
        ("by_median = Estimator(less_median, **{'samples': 2})", "must name its facts one by one"),
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
        ("scored.score.numpy()", "must return a tensor"),
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


def test_advantages_of_another_kind_of_numbers_are_float32(mine):
    config = config_of(f"rlhf.advantage={mine}:by_median")
    right = Targets.of(two_prompts(), config.rlhf, kl_coefficient=1.0).advantages
    for kind in ("sign().long()", "double()"):
        mine.write_text(re.sub(r"\.flatten\(\).*", f".flatten().{kind}", mine.read_text()))
        loaded.cache_clear()
        found = Targets.of(two_prompts(), config.rlhf, kl_coefficient=1.0).advantages
        assert found.dtype == torch.float32 and found.sign().equal(right.sign())


def test_what_a_formula_gets_is_its_to_change(mine):
    mine.write_text(
        mine.read_text().replace("return (scored.by_prompt", "return scored.score.mul_(0) + (scored.by_prompt")
        + "def grown(scores, so_far):\n    scores.clear(), so_far.update([1e9])\n    return torch.tensor(1), '2'\n"
        "grown = Shaping(grown)\n"
        "squared = DPOLoss(lambda pairs: (1 - pairs.chosen.sub_(pairs.rejected)).square())\n"
    )
    mine.write_text("import torch\n" + mine.read_text())
    config = config_of(f"rlhf.advantage={mine}:by_median", f"rlhf.reward_normalization={mine}:grown")
    assert Targets.of(two_prompts(), config.rlhf, kl_coefficient=1.0).total_score.tolist() == [2.0, 1.0, -1.0, 1.0]
    rewards = Rewards(config.rlhf, Ranks(0, 1, torch.device("cpu")), model_is_normalized=False)
    found = rewards.reward([3.0, 5.0], [[], []], ["", ""], [{}, {}], 1)
    assert found.scores == [1.0, 2.0] and {type(score) for score in found.scores} == {float}
    assert rewards.state()["model"]["mean"] == 4.0 and json.dumps(found.scale_of_model) == "[1.0, 2.0]"
    rewards_of_pairs = torch.tensor([[0.5, 3.0], [0.0, 1.0]], requires_grad=True) * 1
    loss = loaded(DPO_LOSSES, config_of(f"dpo.loss={mine}:squared").dpo.loss).formula(Pairs(*rewards_of_pairs, 0.1))
    assert loss.tolist() == [0.25, 1.0] and loss.requires_grad and rewards_of_pairs.tolist() == [[0.5, 3.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("pairs.margin.detach()", "cannot be differentiated"),
        ("pairs.margin > 0", "cannot be differentiated"),
        ("pairs.margin.detach().numpy()", "must return a tensor of shape (2,)"),
        ("pairs.margin.sum()", "must return a tensor of shape (2,)"),
        ("pairs.margin / 0", "not finite"),
    ],
)
def test_a_loss_that_teaches_nothing_is_refused(mine, body, sentence):
    mine.write_text(re.sub(r"return \(1 - pairs.*", f"return {body}", mine.read_text()))
    with pytest.raises(UserError) as error:
        try_own(config_of(f"dpo.loss={mine}:squared"))
    assert sentence in str(error.value) and "mine.py:squared" in str(error.value)


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
    asked = [use for use in trust.of_training(RunDirectory(tmp_path / "run"), config) if use.content]
    assert [(use.what, use.setting) for use in asked] == [(f"run {mine}", "rlhf.advantage")]
