"""The one door to training: what is refused there, and that the stage scripts go through it on all ranks."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from inference.chat_format import ChatFormat
from inference.errors import EXIT_USER_ERROR, UserError
from inference.families import build_tiny_model
from training import stage_script as stage
from training.config_files import load_config
from training.data.rows import read_rows
from training.distributed import Ranks
from training.launchers import PARENT_VARIABLE
from training.models.loading import load_scorer, require_same_format, save_model
from training.preparation.prepare import prepare
from training.role_settings import LoRASettings
from training.run_directory import RunDirectory
from training.stage_script import RefusedOnFirst, decided_by_first
from training.steps import REWARD, SFT

WITHOUT_MODEL = ("rlhf.reward_url=http://127.0.0.1:9", "rlhf.reward_weights.model=0")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    build_tiny_model(directory)
    return directory


def test_settings_are_checked_against_the_processes_that_were_started(tmp_path):
    config = load_config([], ["model=tiny", "sft.batch_size=1"])
    sentence = r"^2 processes were started, and sft\.batch_size=1 leaves some of processes=2 idle; .* to 2\.$"
    with pytest.raises(UserError, match=sentence):
        prepare(config, RunDirectory(tmp_path), 2, print)
    assert not list(tmp_path.iterdir())


def test_idle_ranks_are_said_before_anything_is_fetched(tmp_path):
    said: list[str] = []
    (tmp_path / "config.json").write_text("{}")
    config = load_config([], [f"model={tmp_path}", "sft.batch_size=64", "reward.batch_size=64"])
    with pytest.raises(UserError):
        prepare(config, RunDirectory(tmp_path), 64, said.append)
    assert "leaves 48 of 64 ranks idle" in said[0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["trained_reward_model=TINY"], "TINY is no trained reward model: its weights hold no score head"),
        (["trained_reward_model=TINY", *WITHOUT_MODEL], "TINY is no trained reward model"),  # where the critic starts
        (["reward.layers=3"], r"reward\.layers=3: the model has 2 layers"),
        (
            ["sft_model=LACKING"],
            r"weights in LACKING are not those .* missing \(model\.decoder\.final_layer",
        ),
        (["reward_model=LACKING"], "weights in LACKING are not those"),
        (["reference_model=LACKING"], "weights in LACKING are not those"),
    ],
)
def test_models_that_cannot_train_are_refused_before_anything_is_made(tiny, tmp_path, settings, expected):
    lacking = shutil.copytree(tiny, tmp_path / "lacking")
    weights = load_file(lacking / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "final_layer_norm.bias" not in name}
    save_file(kept, lacking / "model.safetensors", {"format": "pt"})
    given = [text.replace("TINY", str(tiny)).replace("LACKING", str(lacking)) for text in ("model=TINY", *settings)]
    expected = expected.replace("TINY", str(tiny)).replace("LACKING", str(lacking))
    with pytest.raises(UserError, match=expected):
        prepare(load_config([], given), RunDirectory(tmp_path / "run"), 1, print)
    assert not (tmp_path / "run").exists()


def test_a_reward_model_that_read_other_texts_is_refused(tiny, tmp_path):
    """The same tokenizer, another chat template: no matter which of the two has one."""
    finished = tmp_path / "reward"
    chat_format = ChatFormat.load(tiny)
    scorer = load_scorer(tiny, chat_format, torch.float32)
    chat_format.tokenizer.chat_template = chat_format.template.source.replace("Human: ", "User: ")
    save_model(finished, scorer, chat_format, {}, LoRASettings(), torch.float32)
    config = load_config([], [f"model={tiny}", f"trained_reward_model={finished}"])
    with pytest.raises(UserError, match="another chat template than the actor") as raised:
        prepare(config, RunDirectory(tmp_path / "run"), 1, print)
    assert "chat_template.jinja" in str(raised.value) and not (tmp_path / "run").exists()
    (finished / "chat_template.jinja").write_text(ChatFormat.load(tiny).template.source)
    require_same_format(ChatFormat.load(tiny), ChatFormat.load(finished), "actor", "reward model")


def test_every_rank_ends_with_what_the_first_one_refuses(tmp_path):
    config, run = load_config([], ["model=tiny", "sft.batch_size=1"]), RunDirectory(tmp_path)
    sent, meeting = [None, None], Barrier(2, timeout=60)

    def refused(rank: int) -> UserError:
        def tell(value, phase):
            sent[rank] = value
            meeting.wait()
            return sent[0]

        ranks: Any = SimpleNamespace(is_first=rank == 0, size=2, tell=tell, barrier=lambda phase: meeting.wait())
        with pytest.raises(UserError) as raised:
            decided_by_first(ranks, partial(prepare, config, run, 2, print), "preparing")
        return raised.value

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(refused, range(2))
    assert str(first) == str(second) and "2 processes were started" in str(first)
    assert not isinstance(first, RefusedOnFirst) and isinstance(second, RefusedOnFirst)  # one of them prints it


def test_a_stage_that_is_refused_leaves_the_name_free(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(PARENT_VARIABLE, raising=False)
    monkeypatch.setattr(stage, "start_ranks", lambda: Ranks(0, 1, torch.device("cpu")))
    arguments = ["--set", f"model={tiny}", "--set", f"trained_reward_model={tiny}"]
    monkeypatch.setattr("sys.argv", ["main.py", str(tmp_path / "run"), *arguments])
    assert stage.run_stage(SFT, lambda stage: None) == EXIT_USER_ERROR
    assert "is no trained reward model" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_data_without_a_row_for_the_step_leave_nothing(tiny, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    run = RunDirectory(tmp_path / "run")
    config = load_config([], [f"model={tiny}", f"data.source={tmp_path / 'rows.jsonl'}"])
    with pytest.raises(UserError, match=r"the data's 2 rows are prompts alone: .* rlhf RUN --sft-model MODEL"):
        prepare(config, run, 1, lambda line: None, [SFT])
    assert not run.data.exists()


def test_prompts_that_a_reward_by_name_cannot_judge_are_refused_at_once(tiny, tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "a", "answer": 1}\n{"prompt": "b"}\n{"prompt": "c", "answer": 2}\n'
    )
    given = [
        f"model={tiny}",
        f"sft_model={tiny}",
        f"data.source={tmp_path / 'rows.jsonl'}",
        "rlhf.reward_weights.model=0",
    ]
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(UserError, match=r"rlhf\.reward_function=math needs a number under 'answer' .* the first 'b'"):
        prepare(load_config([], [*given, "rlhf.reward_function=math"]), run, 1, lambda line: None)
    assert not run.data.exists()
    prepare(load_config([], [*given, "rlhf.reward_function=length:3"]), run, 1, lambda line: None)


def test_the_seed_of_the_split_alone_decides_the_rows_and_where_models_come_from_is_said(tiny, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"prompt": "Question {n}?", "response": "Answer {n}."}}\n' for n in range(40)))
    given = [f"model={tiny}", f"sft_model={tiny}", f"data.source={file}", "method=dpo", "data.split=[1,0,0]"]
    files, said = [], list[str]()
    for name, settings in enumerate((["seed=1"], ["seed=2", "data.split_seed=1"], ["seed=2"])):
        run = RunDirectory(tmp_path / str(name))
        prepare(load_config([], [*given, *settings]), run, 1, said.append)
        files.append((run.data / "sft_eval.jsonl").read_text())
    assert files[0] == files[1] != files[2]
    assert said.count(f"It is not known what {tiny} was trained on: rows that are held out here may be among it.") == 3


def test_a_reward_address_where_nobody_answers_is_refused_unless_the_advice_is_followed(tiny, tmp_path):
    from applications.commands import parse_steps

    data = Path(__file__).parents[2] / "data" / "pairs.jsonl"
    given = [f"model={tiny}", f"data.source={data}", "rlhf.reward_url=http://127.0.0.1:9/score"]
    config, run, said = load_config([], given), RunDirectory(tmp_path / "run"), []
    run.write_config(config, {})
    with pytest.raises(UserError, match=r"gives no scores .* train what comes before: --steps 1,2\.$") as refused:
        prepare(config, run, 1, said.append)
    advised = str(refused.value).rpartition("--steps ")[2].rstrip(".")
    prepare(config, run, 1, said.append, parse_steps(advised, config))
    assert said[-1].startswith("Warning: rlhf.reward_url=") and said[-1].endswith("It is needed in step 3.")


def test_margins_that_the_data_do_not_say_are_refused_before_anything_trains(tiny, tmp_path):
    """And the rows go, so that the name is free; one margin is enough, and no other step asks for them."""
    rows, run = tmp_path / "rows.jsonl", RunDirectory(tmp_path / "run")
    config = load_config([], [f"model={tiny}", f"data.source={rows}", "data.split=[0,1,1]", "reward.margin=1"])
    pairs = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no"} for i in range(4)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    with pytest.raises(UserError, match=r"reward\.margin needs pairs that say by how much .* none of the \d does"):
        prepare(config, run, 1, print, [REWARD])
    assert not run.data.exists()
    rows.write_text("".join(json.dumps({**row, "margin": 2}) + "\n" for row in pairs))
    prepare(config, run, 1, print, [REWARD])
    assert {row["margin"] for row in read_rows(run.data / "pairs_train.jsonl")} == {2}
