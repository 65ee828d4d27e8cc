import re
import resource
import subprocess
import sys
from importlib.metadata import version
from itertools import cycle
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from applications.cli import app, main
from applications.commands import parse_steps, require_earlier_steps, run_path
from inference.errors import UserError
from training.config import RunConfig
from training.run_directory import RunDirectory
from training.steps import DPO, PPO, REWARD, SFT


def test_help_is_quick_and_no_command_imports_anything_heavy_before_it_needs_it():
    program = (
        "import sys; sys.argv = ['rlhf-chat', '--help']\n"
        "from applications.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert 'training.config' not in sys.modules\n"
        "import applications.commands\n"
        "print(sorted({'torch', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "chat" in done.stdout and done.stdout.strip().endswith("[]")
    any_help = "import typer; app = typer.Typer(); app.command()(print); app(['--help'])"
    ours, of_any = [], []
    while not ours or (min(ours) >= 4 * min(of_any) and len(ours) < 10):
        ours.append(processor_seconds(Path(sys.executable).with_name("rlhf-chat"), "--help"))
        of_any.append(processor_seconds(sys.executable, "-c", any_help))
    assert min(ours) < 4 * min(of_any)


def processor_seconds(*command: str | Path) -> float:
    """That a command takes, whatever else the machine does."""
    begun = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime - begun.ru_utime - begun.ru_stime


@pytest.mark.parametrize(
    ("text", "method", "steps"),
    [
        ("1,2,3", "ppo", [SFT, REWARD, PPO]),
        ("3,1", "ppo", [SFT, PPO]),
        ("2,2", "ppo", [REWARD]),
        (None, "ppo", [SFT, REWARD, PPO]),
        (None, "dpo", [SFT, DPO]),
        ("2", "dpo", [DPO]),
        ("rlhf,sft", "ppo", [SFT, PPO]),
    ],
)
def test_steps(text, method, steps):
    assert parse_steps(text, RunConfig(model="tiny", method=method)) == steps


@pytest.mark.parametrize(
    ("text", "method"), [("", "ppo"), ("0", "ppo"), ("1,4", "ppo"), ("one", "ppo"), ("1,,2", "ppo"), ("3", "dpo")]
)
def test_bad_steps(text, method):
    with pytest.raises(UserError, match="--steps takes some of 1,2"):
        parse_steps(text, RunConfig(model="tiny", method=method))


def test_a_new_run_without_the_model_that_its_step_begins_with(tmp_path):
    run, config = RunDirectory(tmp_path / "run"), RunConfig(model="tiny", sft_model="mine")
    with pytest.raises(UserError, match=r"would be a new run.*step 2 \(reward model\).*with --reward-model MODEL"):
        require_earlier_steps(run, config, [PPO], is_new=True)
    with pytest.raises(UserError, match="run it first: rlhf-chat reward"):
        require_earlier_steps(run, config, [PPO], is_new=False)
    require_earlier_steps(run, config, [REWARD], is_new=True)


PAGES = [[], ["data"], *([name] for name in typer.main.get_command(app).commands), ["data", "show"], ["data", "lint"]]


def page_of(*arguments: str, width: int = 80) -> str:
    done = CliRunner().invoke(app, arguments, prog_name="rlhf-chat", env={"COLUMNS": str(width)})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("words", PAGES, ids=" ".join)
def test_help_pages_cut_no_word_and_tell_every_default(words):
    whole = page_of(*words, "--help", width=400).split()
    for width in (40, 80):
        page = page_of(*words, "-h", width=width)
        assert max(map(len, page.splitlines())) < width and page.split() == whole
    options = page_of(*words, "-h", width=80).partition("\nOptions:\n")[2].partition("\n\n")[0]
    for option in options.replace("\n   ", " ").splitlines():  # what is indented goes on from the line before
        assert len(option.split()) > 3, option
        takes_value = re.match(r" +--[\w-]+ [A-Z]", option)
        assert not takes_value or "efault" in option or "[required]" in option or "--set" in option, option


def test_the_version_is_told_beside_every_command(monkeypatch, capsys):
    for words, checkout in zip(PAGES, cycle([("", False), ("0ac077a812345", False), ("0ac077a812345", True)])):
        monkeypatch.setattr("training.opening.checkout", lambda directory, found=checkout: found)
        monkeypatch.setattr(sys, "argv", ["rlhf-chat", *words, "--version"])
        main()
        commit = ("+g0ac077a81234" if checkout[0] else "") + (".changed" if checkout[1] else "")
        assert capsys.readouterr().out == f"rlhf-chat {version('rlhf-chat')}{commit}\n"


def test_options_go_by_their_old_names_for_a_while(tmp_path):
    given = ["rlhf", "--actor", "/no/sft", f"--reward={tmp_path}/none", tmp_path / "run"]
    done = CliRunner().invoke(app, list(map(str, given)))
    assert "--actor is called --sft-model now" in done.stderr and "--reward is called --reward-model" in done.stderr
    assert str(done.exception).startswith("There is no directory")
    assert not {"--actor", "--reward "} & set(page_of("rlhf", "--help").split())


@pytest.mark.parametrize("name", [".", "..", "a\nb", "a\u202eb", "runs/a\x00b"])
def test_names_that_are_none(name):
    with pytest.raises(UserError, match="is no name for a run"):
        run_path(name, None)


def test_where_a_run_lies(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path / "models")
    places = [run_path(name, model) for name, model in (("a", None), ("b/c", None), (None, "org/m"), (None, "."))]
    assert list(map(str, places)) == ["runs/a", "b/c", "runs/m", "runs/models"]
    assert [str(run_path(None, model)) for model in ("..", "/", None)] == [
        f"runs/{tmp_path.name}",
        "runs/run",
        "runs/run",
    ]


def test_arguments_that_would_steer_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rlhf-chat", "chat", "runs/\x1b[2Jx"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "holds control characters" in said and "\x1b" not in said
