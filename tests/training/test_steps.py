"""A step is one row: what else a row stands for has to be there."""

from dataclasses import fields
from pathlib import Path

import pytest

import training
from applications.cli import app
from applications.commands import left_out, needed_steps
from training.calls import DataflowGraph
from training.config import RunConfig, StepSettings
from training.data.rows import RowSets
from training.steps import DPO, METHODS, PPO, REWARD, SFT, STEPS, WRITING, step_of

CONFIG = RunConfig(model="tiny")


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.command)
def test_a_row_has_its_script_settings_rows_command_and_calls(step):
    assert (Path(training.__file__).parent / step.folder / "main.py").is_file()
    assert step.draws_samples or isinstance(CONFIG.supervised(step), StepSettings)
    assert {f"{step.rows.name}_train", f"{step.rows.name}_eval"} <= {each.name for each in fields(RowSets)}
    assert CONFIG.given_model(step) == ""
    assert step.command in {command.name or command.callback.__name__ for command in app.registered_commands}
    assert step.draws_samples or DataflowGraph.of(step.command).trained_roles
    assert step_of(step.command) is step


def test_the_table_gives_names_labels_and_files():
    assert [step.folder for step in STEPS] == ["step1_sft", "step2_reward", "step3_rlhf", "step2_dpo"]
    assert [step.label for step in STEPS] == ["1", "2", "3", "2 (DPO)"]
    assert [step.method for step in STEPS] == [None, None, "ppo", "dpo"]
    assert WRITING == (SFT, PPO, DPO)
    assert PPO.comparison_files == ("evaluation.json", "comparison.jsonl")
    assert DPO.comparison_files == ("evaluation_dpo.json", "comparison_dpo.jsonl")


def test_a_step_needs_the_models_that_nobody_gives():
    def needed(step, **settings):
        return RunConfig(model="tiny", **settings).earlier_steps(step)

    assert needed(PPO) == [SFT, REWARD] and needed(DPO) == [SFT] and needed(SFT) == needed(REWARD) == []
    assert needed(PPO, sft_model="mine") == [REWARD] and needed(PPO, trained_reward_model="mine") == [SFT]
    assert needed(PPO, rlhf={"reward_weights": {"model": 0}, "reward_function": "r.py:f"}) == [SFT]
    assert needed(REWARD, reward={"initialize_from": "sft"}) == [SFT]
    assert needed(REWARD, reward={"initialize_from": "sft"}, sft_model="mine") == []
    assert RunConfig(model="tiny", method="dpo").steps == list(METHODS["dpo"])


def test_a_step_whose_model_is_given_or_not_used_is_left_out_unless_it_was_asked_for_alone():
    every = list(METHODS["ppo"])
    given = RunConfig(model="tiny", sft_model="mine")
    assert needed_steps(given, every) == [REWARD, PPO] and needed_steps(given, [SFT]) == [SFT]
    assert left_out(given, SFT) == "mine is used instead" and left_out(given, PPO) == ""
    trained = RunConfig(model="tiny", trained_reward_model="mine")
    assert needed_steps(trained, every) == [SFT, PPO]
    function = RunConfig(model="tiny", rlhf={"reward_weights": {"model": 0}, "reward_function": "r.py:f"})
    assert needed_steps(function, every) == [SFT, PPO] and needed_steps(function, [REWARD]) == [REWARD]
    assert needed_steps(RunConfig(model="tiny"), every) == every
