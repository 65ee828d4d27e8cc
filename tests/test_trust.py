"""A run from elsewhere, with a trap in every field: no command springs one without a yes."""

import io
import json
import os
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from applications.cli import main
from applications.commands import print_dry_run
from applications.data import show_command
from inference.errors import UserError
from tests.tiny_runs import make_tiny_run
from training import trust
from training.config_files import load_config
from training.opening import open_run
from training.run_directory import RunDirectory
from training.stage_script import run_evaluation, run_preparation, run_stage
from training.steps import PPO, SFT
from training.trust import Use, made_here, of_evaluation, of_reading, of_training, remember, require_yes


@pytest.fixture(scope="module")
def called():
    """An address that is not the user's, and what asked for it."""
    asked: list[str] = []

    class Service(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(f"{self.command} {self.path}")
            self.send_error(500)

        do_POST = do_HEAD = do_GET

        def log_message(self, *given):
            pass

    server = HTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, called) -> RunDirectory:
    """The models can be loaded; each setting that names something has a trap."""
    place = tmp_path_factory.mktemp("theirs")
    run = make_tiny_run(place)
    (run.path / "helper.py").write_text("")
    (run.path / "trap.py").write_text(f"import helper, os\nos.mkdir({str(place / 'sprung')!r})\ndef score(p, r): ...\n")
    (place / "rows.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    run.step(SFT).metrics_file.write_text('{"number": 1, "loss": 1.0}\n')
    (run.path / "wandb").mkdir()
    (run.path / "wandb" / "settings").write_text(f"[default]\nbase_url = {called[0]}\n")
    values = yaml.safe_load(run.config_file.read_text())
    values |= {
        "model": "evil/base",
        "data": {**values["data"], "source": str(place / "rows.jsonl"), "eval_source": "evil/eval"},
    }
    values |= {"reward_model": "evil/reward", "logging": {"wandb": True}}
    values["rlhf"] |= {"reward_function": f"{run.path / 'trap.py'}:score", "reward_url": f"{called[0]}/score"}
    values["rlhf"] |= {"ptx": {"coefficient": 1.0, "source": "evil/rows"}}
    values["rlhf"] |= {
        "actor": {"deepspeed": {"flops_profiler": {"enabled": True, "output_file": str(place / "sprung")}}}
    }
    run.config_file.write_text(yaml.safe_dump(values))
    return run


TRAPS = (
    "run {run}/trap.py (rlhf.reward_function)",
    "run {run}/helper.py (rlhf.reward_function)",
    "send prompts and answers to {address}/score (rlhf.reward_url)",
    "fetch the model evil/base from the hub (model)",
    "fetch the model evil/reward from the hub (reward_model)",
    "read the data {place}/rows.jsonl (data.source)",
    "fetch from the hub the data evil/eval (data.eval_source)",
    "fetch from the hub the data evil/rows (rlhf.ptx.source)",
    "send settings and metrics to Weights & Biases, project rlhf-chat (logging.wandb)",
    "let {run}/wandb/settings say where they are sent",
    'give DeepSpeed {{"flops_profiler": {{"enabled": true, "output_file": "{place}/sprung"}}}} (rlhf.actor.deepspeed)',
)


OPENED = (
    ("run", "--name", "{run}", "--dry-run"),
    ("chat", "{run}", "--max-tokens", "2"),
    ("chat", "{run}/step1_sft/model", "--max-tokens", "2"),
    ("prefer", "{run}", "--as", "ann", "--max-tokens", "2"),
    ("report", "{run}"),
    ("export", "{run}", "--out", "{new}"),
)
REFUSED = (
    ("run", "--name", "{run}"),
    ("run", "--name", "{run}", "--set", "rlhf.reward_retries=0"),
    *((step, "{run}") for step in ("sft", "reward", "rlhf", "dpo")),
    ("eval", "{run}"),
    ("eval", "{run}", "--judge", "reward"),
    ("prefer", "{run}", "--as", "ann", "--against", "base"),
    ("data", "show", "{run}"),
    ("data", "lint", "{run}"),
    ("rlhf", "{new}", "--sft-model", "{run}/step1_sft/model", "--reward-model", "{run}/step2_reward/model"),
)
SCRIPTS = (
    lambda: run_stage(PPO, lambda stage: pytest.fail("it begins")),
    run_preparation,
    lambda: run_evaluation(RunDirectory(Path(sys.argv[1])), lambda stage: pytest.fail("it begins"), "reward", False),
)


@pytest.fixture
def begin(theirs, called, tmp_path, monkeypatch, capsys):
    """Do something with a command line; the exit code and what was said. No trap springs."""

    def do(work, *words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [word.format(run=theirs.path, new=tmp_path / "new") for word in words])
        monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
        try:
            code = work()
        except SystemExit as ended:
            code = ended.code or 0
        assert not called[1] and not (theirs.path.parent / "sprung").exists()
        return code, capsys.readouterr().err

    environment = dict(os.environ)  # a script says in it which rank it is
    yield do
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.parametrize("words", OPENED, ids=lambda words: " ".join(words))
def test_what_only_reads_opens_a_run_of_anybody(begin, words):
    assert begin(main, "rlhf-chat", *words)[0] == 0


@pytest.mark.parametrize("words", REFUSED, ids=lambda words: " ".join(words))
def test_what_would_do_more_is_refused(begin, words, tmp_path):
    code, said = begin(main, "rlhf-chat", *words)
    assert code == 2 and said.count("was not made here") == 1 and said.endswith("say so with --trust.\n")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("work", SCRIPTS, ids=("step", "preparation", "evaluation"))
def test_the_scripts_refuse_it_too(begin, work):
    code, said = begin(work, "main.py", "{run}")
    assert code == 2 and said.count("was not made here") == 1 and said.endswith("say so with --trust.\n")


def test_each_file_and_each_address_is_named_once(begin, theirs, called):
    _, said = begin(main, "rlhf-chat", "rlhf", "{run}")
    place = {"run": theirs.path, "place": theirs.path.parent, "address": called[0]}
    named = said.partition("this command would ")[2].removesuffix(". If you trust that, say so with --trust.\n")
    assert sorted(named.split("; ")) == sorted(trap.format(**place) for trap in TRAPS)


@pytest.mark.parametrize(
    ("words", "own"),
    [
        (("--go-on", "--data", "chitchat"), ("reward_model)", "data.source", "wandb/settings")),
        (("--fork",), ("wandb/settings",)),
    ],
)
def test_a_run_from_another_one_asks_for_what_it_takes_over(begin, theirs, called, words, own):
    """All but what is its `own`."""
    (theirs.path / "link").symlink_to(theirs.path.parent)
    code, said = begin(main, "rlhf-chat", "run", "--from", "{run}", "--name", "{new}", *words)
    (theirs.path / "link").unlink()
    place = {"run": theirs.path, "place": theirs.path.parent, "address": called[0]}
    expected = [trap.format(**place) for trap in TRAPS if not any(word in trap for word in own)]
    named = said.partition("this command would ")[2].removesuffix(". If you trust that, say so with --trust.\n")
    assert code == 2 and sorted(named.split("; ")) == sorted(
        [f"follow link, which leads to {place['place']}", *expected]
    )


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"parent": {"trained_reward_model": "evil/rm"}}, {"reward_model": "evil/rm"}),
        ({"parent": {}, "first": {"trained_reward_model": "evil/rm"}}, {"reward_model": "evil/rm"}),
        ({"parent": {"trained_reward_model": "evil/rm"}}, {"reward_model": "tiny"}),  # which judges all the same
        ({"parent": {"reward_model": "evil/rm"}}, {"trained_reward_model": "evil/rm"}),
        ({"origin": {"reward_model": "evil/rm"}}, {"model": "evil/rm"}),
    ],
)
def test_what_runs_before_name_is_asked_about_whichever_setting_it_becomes(run, tmp_path, theirs, ours):
    for name, values in theirs.items():
        (tmp_path / name).mkdir()
        before = round_after(tmp_path / "first") if name == "parent" and "first" in theirs else {}
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump({"model": "tiny", **values, **before}))
    begun = round_after(tmp_path / "parent") if "parent" in theirs else {}
    begun |= {"sft_model": str(tmp_path / "origin" / "step1_sft" / "model")} if "origin" in theirs else {}
    config = load_config([], [], {"model": "tiny"} | begun | ours)
    with pytest.raises(UserError, match=r"was not made here.* would fetch the model evil/rm from the hub"):
        open_run(run, config)
    assert not run.config_file.exists()
    open_run(run, config, trusts=True)
    open_run(run, None)


def round_after(run: Path) -> dict:
    """Settings of a run that goes on from it."""
    return {"sft_model": "tiny", "data": {"parent": str(run)}}


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunDirectory:
    """With a record of its own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    (tmp_path / "mine.py").write_text("def score(p, r): ...")
    return run


def settings(run: RunDirectory, *given: str):
    return load_config([], ["model=tiny", f"rlhf.reward_function={run.path.parent / 'mine.py'}:score", *given])


def test_a_run_made_here_may_do_what_was_typed_and_nothing_else(run):
    config = settings(run, "rlhf.reward_url=http://127.0.0.1:8")
    open_run(run, config)
    assert open_run(run, None) == config
    (run.path.parent / "mine.py").write_text("def score(p, r): return 1")  # its user's own file
    open_run(run, None)
    again = settings(run, "rlhf.reward_url=http://127.0.0.1:9")  # typed now
    open_run(run, again)
    open_run(run, None)
    run.config_file.write_text(run.config_file.read_text().replace("127.0.0.1:9", "elsewhere"))
    with pytest.raises(UserError, match=r"would send prompts and answers to http://elsewhere \(rlhf.reward_url\). If"):
        open_run(run, None)


def test_neither_owner_nor_time_nor_name_makes_a_copy_ones_own(run, tmp_path):
    open_run(run, settings(run))
    copy = RunDirectory(shutil.copytree(run.path, tmp_path / "elsewhere" / "run"))
    with pytest.raises(UserError, match="was not made here, or has been changed or moved"):
        open_run(copy, None)
    open_run(copy, None, trusts=True)
    open_run(copy, None)  # a yes is remembered
    (tmp_path / "mine.py").write_text("def score(p, r): import os")  # for the file as it was
    with pytest.raises(UserError, match=r"mine\.py"):
        open_run(copy, None)


def test_code_that_lies_in_a_run_is_known_by_its_content(run):
    code = run.path / "theirs.py"
    code.write_text("from package import inner")
    (run.path / "package").mkdir()
    for name in ("__init__", "inner"):
        (run.path / "package" / f"{name}.py").write_text("")
    open_run(run, load_config([], ["model=tiny", f"rlhf.reward_function={code}:score"]))
    open_run(run, None)
    (run.path / "package" / "__init__.py").write_text("import os")
    with pytest.raises(UserError, match=r"would run \S*package/__init__.py \(rlhf.reward_function\)\. If"):
        open_run(run, None)


def test_a_run_of_somebody_else_does_not_reach_into_another_one(run, tmp_path):
    parent = RunDirectory(tmp_path / "mine")
    parent.write_config(load_config([], ["model=tiny"]), {})
    for setting in ("fork_of", "data.parent"):
        run.write_config(load_config([], ["model=tiny", f"{setting}={parent.path}"]), {})
        with pytest.raises(UserError, match=rf"take over what is in the run {parent.path} \({setting}\)"):
            open_run(run, None)
        if setting == "fork_of":
            with pytest.raises(UserError, match=r"\(fork_of\)"):
                print_dry_run(run.read_config(), [], run.path, trusts=False)
            print_dry_run(run.read_config(), [], run.path, trusts=True)
    open_run(run, None, trusts=True)
    (parent.path / "link").symlink_to("/etc")
    with pytest.raises(UserError, match=r"mine was not made here.* follow link, which leads to /etc"):
        open_run(run, None)
    with pytest.raises(UserError, match="would follow link, which leads to /etc"):
        print_dry_run(load_config([], ["model=tiny", f"fork_of={parent.path}"]), [], tmp_path / "new", trusts=False)


def test_a_terminal_is_asked_once(run, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    uses = [Use("run a.py"), Use("send to http://anna:secret@host")]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for answer, is_yes in (("\n", False), ("n\n", False), ("", False), ("y\n", True)):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        if is_yes:
            require_yes(run.path, uses, False)
        else:
            with pytest.raises(UserError, match="Nothing was done"):
                require_yes(run.path, uses, False)
    said = capsys.readouterr().err
    assert said.count("  run a.py\n  send to http://***@host\nDo you trust that?") == 4 and "secret" not in said
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    require_yes(run.path, uses, False)
    assert "secret" not in trust.record_file().read_text()


def test_a_record_that_cannot_be_written_is_said_and_asks_again(run, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    open_run(run, settings(run))
    assert "cannot be kept" in capsys.readouterr().err
    with pytest.raises(UserError, match="--trust"):
        open_run(run, None)
    open_run(run, None, trusts=True)


def test_a_damaged_line_of_the_record_says_nothing(run):
    made_here(run.path, [Use("run a.py")])
    with open(trust.record_file(), "a", encoding="utf-8") as record:
        record.write('\n{"run": 3}\n[]\n{"ru')
    made_here(run.path, [Use("run b.py")])
    require_yes(run.path, [Use("run a.py"), Use("run b.py")], False)
    assert trust.record_file().stat().st_mode & 0o077 == 0


def test_a_record_in_the_working_directory_does_not_count(run, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    assert trust.record_file().is_absolute()


def test_what_leads_out_of_a_run_is_named(run, tmp_path):
    (tmp_path / "private").mkdir()
    assert of_reading(run.path) == []  # it is no run yet: a model's directory may have links
    run.config_file.write_text("model: tiny")
    (run.path / "inside").symlink_to(run.config_file)
    (run.path / "checkpoints").symlink_to(tmp_path / "private")
    os.mkfifo(run.path / "log.txt")
    assert [use.text for use in of_reading(run.path)] == [
        f"follow checkpoints, which leads to {tmp_path / 'private'}",
        "open log.txt, which is no plain file",
    ]
    for open_it in (lambda: show_command(str(run.path), None, None, 1, None), lambda: open_run(run, None)):
        with pytest.raises(UserError, match="would follow checkpoints"):
            open_it()


def test_measuring_names_the_function_and_the_address_only_where_they_judge(run):
    config = settings(run, "rlhf.reward_url=http://127.0.0.1:9")
    assert of_evaluation(run, config, "") == of_evaluation(run, config, "learned") == []
    assert len(of_evaluation(run, config, "reward")) == 2
    weightless = settings(
        run, "rlhf.reward_url=http://h", "rlhf.reward_weights.function=0", "rlhf.reward_weights.url=0"
    )
    assert of_training(run, weightless) == []


def test_rewards_by_name_run_nothing_but_what_reasoning_gym_evaluates(run):
    by_name = "rlhf.reward_function=[length:3, 'regex:a', json, math, reasoning=0.5]"
    assert [use.text for use in of_evaluation(run, settings(run, by_name), "reward")] == [
        "let reasoning-gym evaluate answers, in some tasks as Python (rlhf.reward_function)"
    ]
    assert of_training(run, settings(run, "rlhf.reward_function=[length:3, 'regex:a', json, math]")) == []
    assert of_training(run, settings(run, by_name, "rlhf.reward_weights.function=0")) == []


def test_a_yes_holds_for_one_place(run, tmp_path):
    remember(run.path, [Use("run a.py")])
    with pytest.raises(UserError):
        require_yes(tmp_path / "other", [Use("run a.py")], False)
    (tmp_path / "link").symlink_to(run.path)
    require_yes(tmp_path / "link", [Use("run a.py")], False)


def test_the_record_holds_hashes(run):
    remember(run.path, [Use("run a.py")])
    assert json.loads(trust.record_file().read_text()) == {"run": str(run.path), "keys": [Use("run a.py").key]}
