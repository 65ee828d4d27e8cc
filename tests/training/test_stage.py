"""What the stage scripts share: pairs that teach nothing, memory that runs out, ranks that cannot begin."""

import json
import math
import os
import socket
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from applications.settings import resolve_settings
from inference.errors import EXIT_USER_ERROR, UserError
from training import distributed
from training import stage_script as stage
from training.config_files import load_config
from training.data.batching import MicroBatch
from training.data_settings import DataSettings
from training.distributed import Ranks, require_gpus, require_loopback, start_ranks
from training.launchers import PARENT_VARIABLE
from training.opening import open_run
from training.run_directory import RunDirectory
from training.stage import Diverged, Stage
from training.stage_script import end_in_sentences, given_settings
from training.step3_rlhf.ppo_math import Loss
from training.step3_rlhf.update import Statistics, Updates
from training.steps import PPO, SFT


def test_pairs_that_differ_only_beyond_the_longest_response_are_left_out_and_counted():
    texts = [("p", "ab", "cd"), ("p", "xy", "xy"), ("p", "xy", "xz")]
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in texts]
    said: list[str] = []
    stage: Any = SimpleNamespace(
        tokens=lambda rows, kind, form: [[torch.tensor(list(row[p].encode())) for p in kind.parts] for row in rows],
        display=SimpleNamespace(say=said.append),
        config=SimpleNamespace(data=DataSettings(max_response_tokens=2)),
    )
    kept = Stage.token_pairs(stage, rows, None)
    assert [bytes(pair.rejected.tolist()) for pair in kept] == [b"cd", b"xz"]
    assert said == [
        "1 of 3 pairs are left out: chosen and rejected are the same in their first 2 tokens (data.max_response_tokens)"
    ]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[..] DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."), "64 bytes"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), "2.50 GiB"),
        (MemoryError(), "Memory ran out: go on with a smaller micro_batch_tokens"),
    ],
)
def test_memory_that_runs_out_is_a_sentence(tmp_path, monkeypatch, error, expected):
    monkeypatch.setenv(PARENT_VARIABLE, str(os.getpid()))

    def body() -> None:
        raise error

    assert end_in_sentences(body, tmp_path / "error.json") == EXIT_USER_ERROR
    said = json.loads((tmp_path / "error.json").read_text())
    assert said["code"] == EXIT_USER_ERROR and expected in said["sentence"] and "micro_batch_tokens" in said["sentence"]


def test_other_errors_keep_their_traceback(tmp_path):
    def body() -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        end_in_sentences(body, tmp_path / "error.json")
    assert not (tmp_path / "error.json").exists()


def test_a_loss_of_step_3_that_is_not_finite_names_iteration_rows_and_way_out(tmp_path):
    stage: Any = SimpleNamespace(
        directory=RunDirectory(tmp_path).step(PPO), checkpoints=SimpleNamespace(numbers=lambda: [2, 4])
    )
    stage.directory.path.mkdir()
    stage.diverged = partial(Stage.diverged, stage)
    updates: Any = SimpleNamespace(stage=stage)
    batch: Any = SimpleNamespace(number=5, prompt_rows=[7, 9, 9, 4])
    updates.diverged = partial(Updates.diverged, updates)

    def look(*values: float) -> None:
        statistics = Statistics()
        for rows, value in zip(([0, 2], [1, 3]), values, strict=True):
            statistics.note("The policy loss", Loss(torch.tensor(value), {}), MicroBatch(rows), rows)
        Updates.require_finite(updates, statistics, batch)

    look(0.5, 1.0)
    for value in (math.nan, math.inf):
        with pytest.raises(Diverged, match=r"policy loss is not a finite number at step3_rlhf 5; .*/4; .* lower"):
            look(0.5, value)
    kept = json.loads((tmp_path / "step3_rlhf" / "diverged.json").read_text())
    assert kept["rows"] == [4, 9] and kept["file"] == "data/prompts_train.jsonl"  # those of the prompts of samples 1, 3


def test_pairs_know_their_rows_where_some_are_left_out():
    same, other = torch.tensor([1]), torch.tensor([2])
    config = SimpleNamespace(data=SimpleNamespace(max_response_tokens=1))
    stage: Any = SimpleNamespace(config=config, display=SimpleNamespace(say=print))
    stage.tokens = lambda rows, parts, chat_format: [(same, same, same), (same, same, other), (same, other, same)]
    assert [pair.file_index for pair in Stage.token_pairs(stage, [{"chosen": "same"}] * 3, None)] == [1, 2]


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(distributed.torch.cuda, "device_count", lambda: 2)
    require_gpus(2)
    with pytest.raises(UserError, match="3 processes need 3 GPUs, and this machine shows 2: use --processes 2, or let"):
        require_gpus(3)
    monkeypatch.setattr(distributed.torch.cuda, "device_count", lambda: 0)
    require_gpus(3)  # on the CPU processes share


def test_without_a_loopback_interface(monkeypatch):
    def unreachable(address, timeout):
        raise OSError(101, "Network is unreachable")

    require_loopback()
    monkeypatch.setattr(distributed.socket, "create_connection", unreachable)
    with pytest.raises(UserError, match=r"no loopback interface \(127\.0\.0\.1: Network is unreachable\), .* lo up"):
        require_loopback()


def test_a_port_that_is_taken_where_the_processes_meet(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=rf"cannot meet at 127\.0\.0\.1:{port} .*: set MASTER_PORT"):
            start_ranks(threads=torch.get_num_threads())


def test_a_run_keeps_its_plan_until_another_is_given_and_needs_the_file_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run, file = RunDirectory(tmp_path / "run"), tmp_path / "plan.yaml"
    run.path.mkdir()
    file.write_text("actor_generate: {mesh: 0-1, data: 2}")
    with run.locked():
        config = open_run(run, load_config([], ["model=m", "rlhf.plan=~/plan.yaml"]))
        assert config.rlhf.plan["actor_generate"]["micro_batches"] == 1
        file.unlink()
        assert run.read_config().rlhf.plan == config.rlhf.plan
        for plan in ({"actor_generate": {"mesh": 0}}, {"actor_train": {"mesh": 0}}, {}):
            open_run(run, load_config([], [], {"model": "m", "rlhf": {"plan": plan}}))
            assert run.read_config().rlhf.plan.keys() == plan.keys()


def test_kl_may_be_measured_and_memory_spared_in_a_run_that_has_begun(tmp_path):
    run = RunDirectory(tmp_path)
    with run.locked():
        open_run(run, load_config([], ["model=m", "rlhf.kl.coefficient=0"]))
        measured = load_config([], ["model=m", "rlhf.kl={coefficient: 0, measure: true}"])
        assert open_run(run, measured) == measured == run.read_config()
        frugal = load_config([], ["model=m", "rlhf.kl={coefficient: 0}", "rlhf.release_generation=true"])
        assert open_run(run, frugal) == frugal
        with pytest.raises(UserError, match=r"rlhf\.kl\.coefficient: 0\.0 there, 0\.1 now"):
            open_run(run, load_config([], ["model=m", "rlhf.kl.coefficient=0.1"]))


def test_a_run_goes_on_by_other_ranks_in_another_place(tmp_path):
    run = RunDirectory(tmp_path)
    elsewhere = {
        "model": "m",
        "processes": 3,
        "threads": 2,
        "sft": {"optimizer": {"zero_stage": 3, "offload": "optimizer+parameters"}},
        "reward": {"optimizer": {"zero_stage": 1}},
        "dpo": {"optimizer": {"zero_stage": 2, "offload": "optimizer"}},
        "rlhf": {
            "actor": {"zero_stage": 2},
            "reward": {"zero_stage": 3, "offload": "parameters"},
            "generation_tensor_parallel": 3,
            "scoring_tensor_parallel": {"reference": 3},
        },
    }
    with run.locked():
        open_run(run, load_config([], ["model=m"]))
        assert open_run(run, load_config([], [], elsewhere)).processes == 3 == run.read_config().processes
        for learned in ("master_weights=false", "deepspeed={zero_optimization: {round_robin_gradients: true}}"):
            with pytest.raises(UserError, match=r"sft\.optimizer\.\w+.*: .* there, .* now"):
                open_run(run, load_config([], ["model=m", f"sft.optimizer.{learned}"]))


def test_a_data_file_that_is_not_there_is_no_other_setting(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    run = RunDirectory(tmp_path / "run")
    with run.locked():
        open_run(run, load_config([], ["model=m"]))
        with pytest.raises(UserError, match=f"There is no data source {tmp_path}/typo.jsonl"):
            open_run(run, load_config([], ["model=m", f"data.source={tmp_path}/typo.jsonl"]))
        for other in (f"{tmp_path}/rows.jsonl", "owner/name", "chitchat"):
            with pytest.raises(UserError, match="made with other settings"):
                open_run(run, load_config([], ["model=m", f"data.source={other}", "seed=3"]))


def test_a_stage_script_keeps_absolute_paths_as_the_command_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "rows.jsonl").write_text("")
    run = RunDirectory(tmp_path / "run")
    given = SimpleNamespace(
        model=None, config=[], plan=None, set=["model=m", "data.source=rows.jsonl", "sft_model=./m"]
    )
    with run.locked():
        open_run(run, given_settings(run, given))
    stored = run.config_file.read_text()
    here = tmp_path.resolve()
    assert f"\nmodel: {here}/m\n" in f"\n{stored}" and f"sft_model: {here}/m\n" in stored
    assert f"source: {here}/rows.jsonl\n" in stored


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        ("opt-1.3b", ["sft.epochs=2"]),
        ("smollm2-135m", ["data.source=rows.jsonl"]),  # the rule of the embedded dialogues does not hold
        ("m", []),
        ("owner/name", []),
        (None, ["sft.micro_batch_tokens=64"]),  # over those of the run
    ],
)
def test_a_stage_script_has_the_settings_of_the_command(tmp_path, monkeypatch, model, overrides):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "rows.jsonl").write_text("")
    run = RunDirectory(tmp_path / "run")
    if model is None:
        run.write_config(load_config([], ["model=tiny", "sft.epochs=5"]), {})
    found = given_settings(run, SimpleNamespace(model=model, config=[], plan=None, set=overrides))
    expected = resolve_settings(model, [], overrides, {}, run)
    assert found is not None and expected is not None
    shapes = {"architecture"}  # what the dry run knows of models that are not here
    assert found.model_dump(exclude=shapes) == expected.model_dump(exclude=shapes)


def test_a_stage_script_searches_no_plan(tmp_path):
    """It may be one of several machines."""
    with pytest.raises(UserError, match="--plan auto is for the processes of one machine"):
        given_settings(RunDirectory(tmp_path), SimpleNamespace(model="tiny", config=[], plan="auto", set=[]))


def test_a_stage_script_with_a_mistyped_name(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(PARENT_VARIABLE, raising=False)
    monkeypatch.setattr(stage, "start_ranks", lambda: Ranks(0, 1, torch.device("cpu")))
    for arguments, expected in (([], "is not a run directory"), (["--model", "opt-1.4b"], "'opt-1.4b' is no preset")):
        monkeypatch.setattr("sys.argv", ["main.py", str(tmp_path / "runs" / "typo"), *arguments])
        assert stage.run_stage(SFT, lambda stage: None) == EXIT_USER_ERROR
        assert expected in capsys.readouterr().err and not list(tmp_path.iterdir())
