import re

import pytest

from inference.errors import UserError
from training.config import SFTSettings
from training.config_files import load_config, setting_keys
from training.merging import merge
from training.role_settings import OptimizerSettings
from training.run_directory import RunDirectory
from training.steps import PPO, REWARD, SFT


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            ["rlhf.scoring_tensor_parallel.reference=2", "rlhf.actor.lora.rank=4"],
            "the actor is the reference",
        ),
        (["rlhf.scoring_tensor_parallel.reward=2", "rlhf.reward.zero_stage=3"], "both divide its weights"),
        (["rlhf.scoring_tensor_parallel.critic=2", "rlhf.advantage=rloo", "rlhf.samples_per_prompt=2"], "has none"),
        (
            ["rlhf.scoring_tensor_parallel.reward=2", "rlhf.fusion.mode=inter"],
            "reward has scoring_tensor_parallel over 1",
        ),
    ],
)
def test_scoring_degrees_that_fit_no_role_are_refused(settings, expected):
    with pytest.raises(UserError, match=expected):
        load_config([], ["model=m", *settings])


def test_later_layers_win_and_groups_are_merged(tmp_path):
    (tmp_path / "low.yaml").write_text("model: a\nsft: {epochs: 2, batch_size: 8}\n")
    (tmp_path / "high.yaml").write_text("extends: low\nsft: {epochs: 3}\n")
    config = load_config([tmp_path / "high.yaml"], ["sft.optimizer.learning_rate=1e-3", "rlhf.kl.target=4"])
    assert (config.model, config.sft.epochs, config.sft.batch_size) == ("a", 3, 8)
    assert (config.sft.optimizer.learning_rate, config.rlhf.kl.target) == (1e-3, 4.0)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("sft.epoch=2", "There is no setting 'sft.epoch': did you mean 'sft.epochs'?"),
        ("sft.learning_rate=1", "'sft.learning_rate': did you mean 'sft.optimizer.learning_rate'.$"),
        ("sft.lr=1", "did you mean 'sft.optimizer.learning_rate'.$"),
        ("rlhf.learning_rate=1", "did you mean 'rlhf.actor.learning_rate' or 'rlhf.critic.learning_rate'.$"),
        ("rlhf.critic.optimizer.lora.rank=1", "did you mean 'rlhf.critic.lora.rank'.$"),
        ("epochs=2", "did you mean 'sft.epochs', 'reward.epochs' or 'dpo.epochs'.$"),
        ("kl.coefficient=0.1", "There is no setting 'kl.coefficient': did you mean 'rlhf.kl.coefficient'.$"),
        ("rlhf.kl_coef=0.1", "did you mean 'rlhf.kl.coefficient'.$"),
        ("modle=a", "did you mean 'model'.$"),
        ("output_dir=a", "There is no setting 'output_dir': docs/configuration.md lists all settings.$"),
        ("sft.epochs=many", r"Setting sft.epochs: must be a whole number \(got 'many'\)"),
        ("sft.epochs", "--set takes key=value, not 'sft.epochs'"),
        (
            "rlhf.mini_batches=65",
            "is more than the 64 samples of an iteration; use 64 or fewer, or raise prompts_per_iteration to 65",
        ),
        (
            "processes=65",
            "leaves some of processes=65 idle; use 64 or fewer, or .*prompts_per_iteration to 65",
        ),
        ("processes=33", "sft.batch_size=32 .* idle; use 32 or fewer, or raise sft.batch_size to 33"),
        ("sft.optimizer.lora.targets=[]", "is empty; give names of modules, or all-linear"),
        ("sft.optimizer.offload=optimizer", "offload=optimizer needs zero_stage 1, 2 or 3"),
        ("rlhf.advantage=rloo", "advantage=rloo compares the samples of a prompt and needs samples_per_prompt of 2"),
        ("rlhf.advantage=grpo", "advantage=grpo compares the samples of a prompt"),
        ("rlhf.reward_function=mine", "mine must be path/to/file.py:function, or one of length, regex, json, math"),
        ("rlhf.reward_function=lenght:20", r"must be .* \(did you mean 'length'\?\)\.$"),
        ("rlhf.reward_function=length", r"must be length:20, length:\.\.20, "),
        ("rlhf.reward_function=length:20..10", "the smaller number comes first"),
        ("rlhf.reward_function=regex", "must be regex:PATTERN"),
        ("rlhf.reward_function=regex:(", r"regex:\( must be a pattern that Python's re reads \(missing \)"),
        ("rlhf.reward_function='json:a,,b'", "must be json, or json:KEY,KEY"),
        ("rlhf.reward_function=reasoning:chain_sum", "must be reasoning alone: the data name the task"),
        ("rlhf.reward_function=length:20=0", "the weight of length:20 is 0: leave it out"),
        ("rlhf.reward_function=[length:20, '']", "one of them is empty"),
        ("rlhf.reward_function=regex:a: b", r"Setting rlhf\.reward_function: must be a valid string"),
        ('rlhf.reward_function=[length:20, "regex:\\?"]', "in a list, signs that YAML reads stand in single quotes"),
        ("rlhf.reward_function=[length:20, mine]", "mine must be path/to/file.py:function"),
        ("rlhf.reward_url=localhost:80", "must begin with http:// or https://"),
        ("rlhf.reward_weights.model=0", "leaves nothing that rewards; give reward_function or reward_url"),
    ],
)
def test_mistakes_get_one_sentence(override, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        load_config([], [override], {"model": "tiny"})
    assert "\n" not in str(caught.value)


def test_files_that_are_no_settings(tmp_path):
    with pytest.raises(UserError, match="There is no configuration file"):
        load_config([tmp_path / "none.yaml"], [])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match="holds no settings"):
        load_config([tmp_path / "list.yaml"], [])
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(UserError, match="is not valid YAML"):
        load_config([tmp_path / "broken.yaml"], [])


def test_a_model_must_be_named():
    with pytest.raises(UserError, match="The setting 'model' is missing"):
        load_config([], [])


def test_merge_changes_neither_side():
    below, above = {"a": {"b": 1}}, {"a": {"c": 2}}
    assert merge(below, above) == {"a": {"b": 1, "c": 2}}
    assert (below, above) == ({"a": {"b": 1}}, {"a": {"c": 2}})


def test_offload_of_parameters_needs_stage_3():
    with pytest.raises(ValueError, match="needs zero_stage 3"):
        SFTSettings(optimizer=OptimizerSettings(zero_stage=2, offload="optimizer+parameters"))


def test_the_optimizer_block_is_for_every_trained_role_and_each_may_differ(tmp_path):
    (tmp_path / "base.yaml").write_text("optimizer: {warmup: 0.3, lora.rank: 4}\nrlhf.critic.lora.rank: 2\n")
    (tmp_path / "mine.yaml").write_text("extends: base\ndpo.optimizer.learning_rate: 0.5\nrlhf.actor.warmup: 0.1\n")
    given = ["model=m", "sft.optimizer.zero_stage=1", "optimizer.zero_stage=2", "optimizer.learning_rate=1e-3"]
    config = load_config([tmp_path / "mine.yaml"], given)
    roles = {key: (role.zero_stage, role.warmup, role.lora.rank) for key, role in config.trained_roles.items()}
    assert roles == {
        "sft.optimizer": (1, 0.3, 4),  # the command line says another one of this role
        "reward.optimizer": (2, 0.3, 4),
        "dpo.optimizer": (2, 0.3, 4),
        "rlhf.actor": (2, 0.1, 4),
        "rlhf.critic": (2, 0.3, 2),
    }
    assert {role.learning_rate for role in config.trained_roles.values()} == {1e-3}  # later than the files
    assert config.rlhf.actor.epsilon == 1e-5 and config.sft.optimizer.epsilon == 1e-8  # nobody has said another one
    run = RunDirectory(tmp_path / "run")
    run.write_config(config, {})
    assert run.read_config() == config and "\noptimizer:" not in run.config_file.read_text()
    with pytest.raises(UserError, match=r"setting 'optimizer\.warmpu': did you mean 'optimizer\.warmup'"):
        load_config([], ["model=m", "optimizer.warmpu=0.1"])
    with pytest.raises(UserError, match=r"Setting optimizer\.warmup: must be less than"):
        load_config([], ["model=m", "optimizer.warmup=2"])


def test_setting_keys_are_dotted():
    assert {"model", "sft", "sft.optimizer.lora.rank", "rlhf.kl.target"} <= set(setting_keys())


def test_fp16_needs_master_weights():
    with pytest.raises(UserError, match="fp16 cannot train without fp32 weights"):
        load_config([], ["model=m", "dtype=fp16", "rlhf.actor.master_weights=false"])
    assert not load_config([], ["model=m", "dtype=bf16", "rlhf.actor.master_weights=false"]).rlhf.actor.master_weights


def test_critic_free_estimators_have_no_critic_to_warm_up_or_to_divide():
    given = ["model=m", "rlhf.advantage=reinforce++", "rlhf.critic.zero_stage=3"]
    with pytest.raises(UserError, match="critic_warmup=2 needs a critic, and reinforce"):
        load_config([], [*given, "rlhf.critic_warmup=2"])
    assert load_config([], given).rlhf.divided_scorer == ""
    assert load_config([], ["model=m", "rlhf.critic.zero_stage=3"]).rlhf.divided_scorer == "critic"


def test_without_a_reward_model_there_is_no_step_2_and_none_that_scores():
    given = ["model=m", "rlhf.reward.zero_stage=3", "rlhf.reward_function=a.py:f"]
    both, alone = load_config([], given), load_config([], [*given, "rlhf.reward_weights.model=0"])
    assert (both.steps, both.rlhf.divided_scorer) == ([SFT, REWARD, PPO], "reward")
    assert (alone.steps, alone.rlhf.divided_scorer) == ([SFT, PPO], "")


@pytest.mark.parametrize(
    ("kl", "has_reference"),
    [
        ("{}", True),
        ("{coefficient: 0}", False),
        ("{coefficient: 0, centering: 1, place: loss}", False),
        ("{coefficient: 0, target: 4}", True),
        ("{coefficient: 0, stop: 4}", True),
        ("{coefficient: 0, measure: true}", True),
    ],
)
def test_what_needs_a_reference(kl, has_reference):
    divided = ["model=m", f"rlhf.kl={kl}", "rlhf.reference.zero_stage=3", "rlhf.critic.zero_stage=1"]
    config = load_config([], divided)
    assert config.rlhf.has_reference == has_reference
    assert config.rlhf.divided_scorer == ("reference" if has_reference else "")
    assert ("reference" in {call.role for call in config.rlhf.calls}) == has_reference
    with_lora = load_config([], ["model=m", f"rlhf.kl={kl}", "rlhf.actor={zero_stage: 3, lora: {rank: 4}}"])
    assert with_lora.rlhf.divided_scorer == ("actor" if has_reference else "")


def test_a_reference_of_ones_own_lies_beside_an_actor_with_adapters():
    given = ["model=m", "reference_model=other/m", "rlhf.actor={zero_stage: 3, lora: {rank: 4}}"]
    assert load_config([], given).rlhf.divided_scorer == ""
    assert load_config([], [*given, "rlhf.reference.zero_stage=3"]).rlhf.divided_scorer == "reference"
    assert load_config([], [*given, "rlhf.scoring_tensor_parallel.reference=2"]).rlhf.divided_scorer == "reference"
    with pytest.raises(UserError, match=r"reference_model=other/m would never be asked.*rlhf\.kl\.measure=true"):
        load_config([], [*given, "rlhf.kl.coefficient=0"])


def test_where_the_kl_penalty_acts():
    assert not load_config([], ["model=m", "rlhf.kl={place: loss, coefficient: 0}"]).rlhf.kl_in_loss
    grpo = ["model=m", "rlhf.samples_per_prompt=2", "rlhf.advantage=grpo"]
    assert load_config([], grpo).rlhf.kl_in_loss
    assert not load_config([], [*grpo, "rlhf.kl.place=reward"]).rlhf.kl_in_loss
    assert not load_config([], ["model=m"]).rlhf.kl_in_loss
    assert load_config([], ["model=m", "rlhf.kl.place=loss"]).rlhf.kl_in_loss


def test_ranks_that_a_mini_batch_leaves_idle_are_said():
    config = load_config([], ["model=m", "rlhf.prompts_per_iteration=128", "rlhf.mini_batches=4"])
    sentence = "a mini-batch of 32 samples leaves 32 of 64 ranks idle .* rlhf.mini_batches=2, or .*_per_iteration=256"
    assert re.search(sentence, config.idle_warning(64))
    assert config.idle_warning(32) == ""
    config.rlhf.samples_per_prompt, config.rlhf.prompts_per_iteration = 2, 65  # 130 samples: mini-batches of 32 and 33
    assert "leaves 1 of 33 ranks idle" in config.idle_warning(33)
    assert "mini_batches=3, or rlhf.prompts_per_iteration=66" in config.idle_warning(33)  # 130 // 3 = 43, 132 // 4 = 33
    config.method = "dpo"
    assert config.idle_warning(64) == ""
