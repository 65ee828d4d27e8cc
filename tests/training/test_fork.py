"""A fork: which steps of another run it takes over, what it trains and because of what."""

import json
import shutil
from dataclasses import dataclass, field

import pytest

from applications.from_run import settings_of_fork
from inference.errors import UserError
from training import fork as module
from training.changes import journal_of, not_planned_so
from training.config_files import load_config
from training.fork import Fork
from training.inputs import inputs_of, link_or_copy
from training.opening import begun_at, read_starts
from training.run_directory import RunDirectory, write_json
from training.steps import DPO, METHODS, PPO, REWARD, SFT, STEPS

TIME = "2026-01-31T12:00:00+00:00"
ROWS = ("sft_train", "sft_eval", "pairs_train", "pairs_eval", "prompts_train", "prompts_eval", "panel")


@pytest.fixture(autouse=True)
def every_file_is_large(monkeypatch):
    monkeypatch.setattr(module, "SMALL", 0)


@pytest.fixture
def parent(tmp_path) -> RunDirectory:
    """A run of which every step is finished, of both methods, with names instead of weights."""
    (tmp_path / "base").mkdir()
    for name in ("rows.jsonl", "base/model.safetensors", "mine.py"):
        (tmp_path / name).write_text(name)
    run = RunDirectory(tmp_path / "a")
    given = "seed=3", f"data.source={tmp_path / 'rows.jsonl'}", f"rlhf.reward_function={tmp_path / 'mine.py'}:score"
    config = load_config([], [f"model={tmp_path / 'base'}", "evaluation.prompts=7", *given])
    run.write_config(config, {})
    run.data.mkdir()
    run.tokens.mkdir()
    for name in (*(f"{name}.jsonl" for name in ROWS), "counts.json"):
        (run.data / name).write_text(f'{{"in": "{name}"}}')
    (run.tokens / "0.safetensors").write_text("tokens")
    write_json(run.inputs_file, inputs_of(config))
    for step in STEPS:
        for name in ("model/config.json", "model/model.safetensors", "checkpoints/7/state.json", "metrics.jsonl"):
            (run.step(step).path / name).parent.mkdir(parents=True, exist_ok=True)
            (run.step(step).path / name).write_text(f"{name} of {step.folder}")
        write_json(run.step(step).result_file, {"seconds": 1})
    return run


@dataclass
class Made:
    run: RunDirectory
    fork: Fork
    said: list[str] = field(default_factory=list)

    def take(self) -> "Made":
        """As the preparation does, for all steps."""
        self.fork.take_rows()
        self.fork.take_steps(METHODS[self.fork.config.method], self.said.append)
        return self

    @property
    def trained(self) -> str:
        """Numbers of the steps that are, by what is expected before the rows are there."""
        return "".join(str(step.number) for step, why in self.fork.steps.items() if why)


@pytest.fixture
def made(parent):
    def make(*overrides: str, **given) -> Made:
        run = RunDirectory(parent.path.parent / "b")
        run.path.mkdir(exist_ok=True)
        config = settings_of_fork(parent.path, parent.read_config(), [], list(overrides), given)
        fork = Fork.of(run, config)
        assert fork is not None
        return Made(run, fork)

    return make


def write_starts(run: RunDirectory, *names: str, **values) -> None:
    starts = [{"number": number, "time": TIME, "what": name} | values for number, name in enumerate(names, 1)]
    run.starts_file.write_text("".join(json.dumps(start) + "\n" for start in starts))


@pytest.mark.parametrize(
    ("overrides", "trained"),
    [
        ((), ""),
        (("rlhf.kl.coefficient=0.2",), "3"),
        (("rlhf.seed=2",), "3"),
        (("reference_model=tiny",), "3"),
        (("rlhf.seed=3",), ""),  # that of the run
        (("sft.seed=2",), "13"),
        (("seed=2",), "123"),
        (("reward.epochs=2",), "23"),
        (("sft.epochs=2",), "13"),  # the reward model begins with its base
        (("dpo.beta=0.2",), ""),
        (("dpo.beta=0.2", "method=dpo"), "2"),
        (("evaluation.prompts=3", "processes=2", "rlhf.micro_batch_tokens=99", "logging.tensorboard=true"), ""),
        (("rlhf.rollouts_every=1",), "3"),  # which the parent has not written
        (("rlhf.samples_every=1",), "3"),
        (("rlhf.kl.measure=true",), "3"),
        (("sft.eval_every=5",), "13"),
        (("sft.eval_every=0", "rlhf.checkpoint_every=1"), ""),  # less than the parent has
        (("save_dtype=bf16",), "123"),
        (("reward_model=tiny",), "23"),
        (("sft_model=tiny",), "23"),  # whose tokens the reward model has
        (("trained_reward_model=tiny",), "3"),
        (("rlhf.reward_weights.model=0",), "3"),
        (("rlhf.reward_url=http://127.0.0.1:9",), "3"),
        (("data.max_response_tokens=20",), "123"),
        (("data.limit=5",), "123"),
    ],
)
def test_a_step_is_trained_where_it_reads_something_else(made, overrides, trained):
    assert made(*overrides).trained == trained


def test_what_began_otherwise_takes_what_follows_with_it(parent, made):
    config = parent.read_config()
    config.reward.initialize_from = "sft"
    parent.write_config(config, {})
    assert made("sft.epochs=2").trained == "123" and made("reward_model=tiny").trained == ""
    shutil.rmtree(parent.step(REWARD).model)
    fork = made().fork
    assert made().trained == "23" and fork.steps[REWARD] == "a has not finished it" and fork.steps[PPO] == "step 2 is"


@pytest.mark.parametrize(
    ("file", "trained", "why"),
    [
        ("mine.py", "3", "mine.py has changed"),
        ("base/model.safetensors", "123", "base has changed"),
        ("rows.jsonl", "123", "its rows are others"),
    ],
)
def test_a_file_that_has_changed_since_is_another_one(parent, made, tmp_path, file, trained, why):
    files = inputs_of(parent.read_config())["reward_function"]
    code = {name: each["content"] for path in files.values() for name, each in path.items()}
    write_starts(parent, PPO.folder, reward_function=code)
    assert made().trained == ""
    (tmp_path / file).write_text("something else")
    assert made().trained == trained and why in " ".join(made().fork.steps.values())
    (tmp_path / file).unlink()  # what is gone is as it was
    assert made().trained == ("" if file != "mine.py" else "3")


def test_rows_that_are_made_anew_are_compared_by_content(parent, made):
    new = made("data.limit=5")
    shutil.copytree(parent.data, new.run.data)
    (new.run.data / "pairs_eval.jsonl").write_text("another pair")
    fork = new.fork
    assert [step for step, why in fork.steps.items() if why] == [REWARD, PPO]
    assert fork.steps[REWARD] == "its rows are others (data.limit is 5, and 0 in a)"


def test_what_is_unchanged_is_taken_over_whole_and_lives_without_the_parent(parent, made):
    write_starts(parent, "preparation", SFT.folder, REWARD.folder, "evaluation")
    journal_of(parent.step(SFT)).write(7, {"lengths": {"sft.epochs": [1, 2]}, "earlier": "earlier_1"})
    (parent.step(SFT).path / "error.json").write_text("{}")
    base = {"base_model_name_or_path": str(parent.step(SFT).model)}
    adapters = [f"{SFT.folder}/adapter", f"{REWARD.folder}/adapter", f"{REWARD.folder}/checkpoints/7/adapter"]
    for name in adapters:
        (place := parent.path / name).mkdir()
        (place / "adapter_config.json").write_text(json.dumps(base))
    taken = made("rlhf.kl.coefficient=0.2").take()
    assert taken.said == [
        "Step 1 (supervised fine-tuning): that of a, unchanged",
        "Step 2 (reward model): that of a, unchanged",
        "Step 3 (PPO): trained, as rlhf.kl.coefficient is 0.2, and 0.05 in a",
    ]
    run = taken.run
    assert [run.step(step).is_finished for step in (SFT, REWARD, PPO)] == [True, True, False]
    assert not run.step(PPO).path.exists() and not run.step(DPO).path.exists()
    names = ("tokens/0.safetensors", "step1_sft/model/model.safetensors", "step2_reward/checkpoints/7/state.json")
    for name in names:
        assert (run.path / name).samefile(parent.path / name)
    for name in ("data/sft_train.jsonl", "step1_sft/metrics.jsonl"):  # in which people write
        assert not (run.path / name).samefile(parent.path / name)
    run.starts_file.unlink()  # as if the command had been killed before
    made("rlhf.kl.coefficient=0.2").take()
    starts = [(start["number"], start["what"], start["of"]) for start in read_starts(run)]
    assert starts == [(1, SFT.folder, str(parent.path)), (2, REWARD.folder, str(parent.path))]
    assert begun_at(run) == "" and "earlier_1" not in not_planned_so(run.step(SFT))
    assert "(sft.epochs 1, then 2)" in not_planned_so(run.step(SFT))
    assert not (run.step(SFT).path / "error.json").exists()
    for name in adapters:
        values = json.loads((run.path / name / "adapter_config.json").read_text())
        assert values["base_model_name_or_path"] == str(run.step(SFT).model)
    assert json.loads((parent.step(SFT).path / "adapter" / "adapter_config.json").read_text()) == base
    shutil.rmtree(parent.path)
    assert Fork.of(run, taken.fork.config) is None and run.step(SFT).is_finished


def test_what_the_fork_has_begun_or_ended_itself_stays_its_own(made):
    taken = made().take()
    taken.run.step(PPO).metrics_file.write_text("mine")
    taken.run.step(PPO).result_file.unlink()
    again = made().take()
    assert again.run.step(PPO).metrics_file.read_text() == "mine" and again.said == []


def test_a_step_that_the_fork_trained_itself_is_never_the_parents(parent, made):
    for step in (REWARD, PPO):
        parent.step(step).result_file.rename(parent.step(step).path / "later")
    mine = made().take().run.step(REWARD)
    mine.model.mkdir(parents=True)
    write_json(mine.result_file, {"seconds": 2})
    for step in (REWARD, PPO):
        (parent.step(step).path / "later").rename(parent.step(step).result_file)
    again = made().take()
    assert again.fork.steps == {SFT: "", REWARD: "b has begun it", PPO: "step 2 is"}
    assert not again.run.step(PPO).path.exists()
    write_json(parent.step(SFT).result_file, {"seconds": 3})  # trained on since
    assert made().fork.steps[SFT] == "b has begun it"


@pytest.mark.parametrize("gone", ["result.json", "checkpoints/7/state.json"])
def test_a_step_that_the_parent_changes_meanwhile_is_not_taken_in_part(parent, made, monkeypatch, gone):
    file = parent.step(PPO).path / gone

    def copy(source, place):
        if source.is_relative_to(parent.step(PPO).path):
            file.unlink(missing_ok=True)
        link_or_copy(source, place)

    monkeypatch.setattr(module, "link_or_copy", copy)
    taken = made().take()
    is_trained = gone == "result.json"
    assert taken.run.step(PPO).path.exists() != is_trained and not (taken.run.step(PPO).path / gone).exists()
    assert taken.said[-1].endswith("trained, as a has not finished it" if is_trained else "that of a, unchanged")


def test_tokens_come_with_rows_that_a_kill_kept_back(made, monkeypatch):
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        places = []

        def second(fork, theirs, ours, *given, **named):
            places.append(ours)
            if places[1:]:
                raise KeyboardInterrupt
            take(fork, theirs, ours, *given, **named)

        take = Fork._take
        killed.setattr(Fork, "_take", second)
        made().take()
    run = made().take().run
    assert (run.tokens / "0.safetensors").exists() and (run.data / "counts.json").exists()


def test_a_step_whose_beginning_would_be_trained_is_refused_alone(made):
    fork = made("sft.epochs=2").fork
    sentence = r"Step 3 begins with the model of step 1, .* as sft.epochs is 2, and 1 in a: train step 1 too"
    with pytest.raises(UserError, match=sentence):
        fork.take_steps([PPO], print)
    assert fork.take_steps([SFT, PPO], print) == [SFT, PPO]


@pytest.mark.parametrize(
    ("overrides", "taken"),
    [
        (("rlhf.kl.coefficient=0.2",), True),
        (("sft.epochs=2",), True),  # neither the reward model nor the pairs
        (("trained_reward_model=tiny",), False),
        (("dtype=fp32",), False),
        (("reward.eval_rows=3", "rlhf.kl.coefficient=0.2"), False),
    ],
)
def test_the_accuracy_of_a_given_reward_model_is_the_parents(parent, made, overrides, taken):
    config = parent.read_config()
    config.trained_reward_model = config.model
    parent.write_config(config, {})
    parent.step(PPO).reward_accuracy_file.write_text("measured")
    file = made(*overrides).take().run.step(PPO).reward_accuracy_file
    assert file.exists() == taken and (not taken or file.read_text() == "measured")


def test_the_reference_of_dpo_is_the_parents_where_it_saw_the_same_pairs(parent, made):
    parent.step(DPO).reference_file.write_text("said")
    for overrides, taken in (
        (["dpo.beta=0.2"], True),
        (["dpo.epochs=2"], True),  # what is missing is asked for
        (["dtype=fp32"], False),
        (["dpo.beta=0.2", "sft.epochs=2"], False),
    ):
        fork = made("method=dpo", *overrides).take()
        assert fork.run.step(DPO).reference_file.exists() == taken, overrides
        shutil.rmtree(fork.run.path)


def test_an_unpaired_loss_takes_no_reference_and_rows_anew_only_where_answers_had_labels(parent, made):
    parent.step(DPO).reference_file.write_text("said of pairs")
    fork = made("method=dpo", "dpo.loss=kto")
    assert fork.trained == "2" and not fork.take().run.step(DPO).reference_file.exists()
    assert (fork.run.data / "counts.json").exists()
    shutil.rmtree(fork.run.path)
    (parent.data / "counts.json").write_text('{"sources": ["rows.jsonl: 9 pairs (unpaired preference, text)"]}')
    assert made("method=dpo").fork.other_data == ""
    shutil.rmtree(fork.run.path)
    assert made("method=dpo", "dpo.loss=kto").fork.other_data == "answers keep their labels"


def test_demonstrations_of_another_file_are_not_taken_over(parent, made, tmp_path):
    (parent.data / "demonstrations.jsonl").write_text("kept")
    assert (made().take().run.data / "demonstrations.jsonl").exists()
    shutil.rmtree(tmp_path / "b")
    (tmp_path / "other.jsonl").write_text("")
    new = made("rlhf.ptx.coefficient=1", f"rlhf.ptx.source={tmp_path / 'other.jsonl'}").take()
    assert not (new.run.data / "demonstrations.jsonl").exists() and (new.run.data / "counts.json").exists()
