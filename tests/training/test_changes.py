import pytest

from inference.errors import UserError
from training.changes import KINDS, kind_of, teaches
from training.config_files import load_config
from training.config_reference import defaults, description, fields
from training.opening import open_run
from training.run_directory import RunDirectory


def test_every_setting_is_in_a_class_and_every_name_there_is_a_settings():
    for key in defaults():
        kind_of(key)  # raises
    unknown = [name for name in KINDS if not any(f".{name}." in f".{key}." for key in defaults())]
    assert not unknown


def test_a_name_that_means_several_things_has_been_looked_at():
    """A setting is in the class of its name: a new one of an old name would be in the class of that unseen."""
    meanings: dict[str, set[str]] = {}
    for key, info in fields():
        meanings.setdefault(key.rpartition(".")[2], set()).add(description(info))
    assert {name for name, said in meanings.items() if len(said) > 1} == {
        *("model", "source", "rows", "keep", "coefficient", "eval_every", "checkpoint_every", "seed", "centering"),
        *("learning_rate", "zero_stage", "offload"),
    }


@pytest.mark.parametrize(
    "free",
    [
        "threads=2",
        "logging={tensorboard: true, wandb_project: mine}",
        "evaluation={prompts: 3, rows: 2, true_score: upbeat}",
        "rlhf={samples_every: 1, sample_prompts: 2, eval_every: 2, eval_prompts: 3}",
        "sft={eval_every: 2, eval_rows: 3}",
        "dpo={eval_every: 0, eval_rows: 3}",
        "reward.eval_every=1",
    ],
)
def test_what_teaches_nothing_changes_in_a_run_that_is_there(tmp_path, free):
    run = RunDirectory(tmp_path)
    open_run(run, load_config([], ["model=m"]))
    changed = load_config([], ["model=m", free])
    assert open_run(run, changed) == changed == run.read_config()


@pytest.mark.parametrize(
    ("begun", "refused"),
    [
        (["sft.keep=best"], "sft.eval_every=7"),
        (["rlhf={keep: best, eval_every: 3}"], "rlhf.eval_prompts=7"),
        ([], "rlhf.reward_url=http://127.0.0.1:9"),
        ([], "reward.eval_rows=7"),  # the scale of the scores is measured on them
        ([], "rlhf.actor.deepspeed={zero_optimization: {overlap_comm: true}}"),
    ],
)
def test_evaluations_that_decide_stay(tmp_path, begun, refused):
    run = RunDirectory(tmp_path)
    open_run(run, load_config([], ["model=m", *begun]))
    with pytest.raises(UserError, match=refused.partition("=")[0].replace(".", r"\.")):
        open_run(run, load_config([], ["model=m", *begun, refused]))
    assert teaches(refused.partition("=")[0], run.read_config())


def test_a_seed_that_is_that_of_the_run_is_no_other(tmp_path):
    run = RunDirectory(tmp_path)
    open_run(run, load_config([], ["model=m", "seed=3"]))
    open_run(run, load_config([], ["model=m", "seed=3", "sft.seed=3", "rlhf.reward_url="]))
    with pytest.raises(UserError, match=r"sft\.seed: 3 there, 4 now"):
        open_run(run, load_config([], ["model=m", "seed=3", "sft.seed=4"]))


def test_a_run_keeps_having_a_reward_service(tmp_path):
    run, address = RunDirectory(tmp_path), "rlhf.reward_url=http://127.0.0.1:"
    for number in range(2):
        open_run(run, load_config([], ["model=m", f"{address}{number}"]))
    with pytest.raises(UserError, match=r"rlhf\.reward_url: 'http://127.0.0.1:1' there, '' now"):
        open_run(run, load_config([], ["model=m"]))
