"""A secret in an address or in the environment: it is at none of the places where something is shown or kept."""

import base64
import json
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml

from applications.cli import main
from applications.report.page import render
from inference.errors import UserError
from tests.tiny_runs import make_tiny_run
from tests.training.test_reward_sources import PROMPTS, RESPONSES, ROWS, endpoint  # noqa: F401
from training.config_files import load_config
from training.error_report import leave_report
from training.metrics import Display, metrics_journal
from training.reward_sources import RewardEndpoint, RewardFailed
from training.run_directory import RunDirectory
from training.stage import quiet_libraries
from training.steps import SFT

LITERAL = "http://anna:geheimnis@host:80/score?token=geheimnis&k=1"
SHOWN = "http://***@host:80/score?token=***&k=1"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunDirectory:
    """Made when secrets were still written into settings."""
    run = make_tiny_run(tmp_path_factory.mktemp("secrets"), has_reward=False)
    values = yaml.safe_load(run.config_file.read_text())
    values["rlhf"]["reward_url"] = LITERAL
    run.config_file.write_text(yaml.safe_dump(values))
    run.step(SFT).metrics_file.write_text('{"number": 1, "loss": 1.0}\n')
    run.step(SFT).log_file.write_text(f"Warning: {LITERAL} is slow\n")
    return run


def test_a_report_has_none(run):
    page = render(run)
    assert "geheimnis" not in page and page.count(SHOWN.replace("&", "&amp;")) == 3  # changed, whole, warning


def test_a_dry_run_has_none(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rlhf-chat", "run", "--name", str(run.path), "--dry-run"])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().out
    assert "geheimnis" not in said and SHOWN in said


def test_a_tracker_gets_none(run, monkeypatch):
    begun = []
    wandb = SimpleNamespace(
        init=lambda **given: begun.append(given) or SimpleNamespace(define_metric=lambda *a, **k: 0)
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(**vars(wandb), __spec__=object()))
    config = run.read_config()
    config.logging.wandb = True
    metrics_journal(run, run.step(SFT), config).rewind(-1)
    assert begun[0]["config"]["rlhf"]["reward_url"] == SHOWN


def test_what_is_said_or_logged_has_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MY_KEY", "geheimnis")
    Display(log=tmp_path / "log.txt").say(f"Asking {LITERAL}, geheimnis")
    leave_report(tmp_path / "error.json", f"{LITERAL} fails", 2, "ValueError: geheimnis")
    names = ("DeepSpeed", "transformers", "py.warnings", "torch", "accelerate", "peft")
    before = {name: (logging.getLogger(name).handlers, logging.getLogger(name).propagate) for name in names}
    quiet_libraries(tmp_path / "log.txt", first=True)
    logging.getLogger("transformers").error("%s cannot be reached", LITERAL)
    for name, (handlers, propagates) in before.items():
        logging.getLogger(name).handlers, logging.getLogger(name).propagate = handlers, propagates
    logging.captureWarnings(False)
    kept = (tmp_path / "log.txt").read_text() + (tmp_path / "error.json").read_text() + capsys.readouterr().out
    assert "geheimnis" not in kept and kept.count(SHOWN) == 4


def test_the_traceback_of_a_process_has_none():
    program = (
        "import sys\nfrom inference.streams import guard_output\nguard_output()\n"
        f"print({LITERAL!r}, file=sys.stderr)\nraise ValueError({LITERAL!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and f"ValueError: {SHOWN}" in done.stderr
    assert "geheimnis" not in done.stderr and done.stderr.startswith(SHOWN)


def test_a_secret_is_not_taken_into_settings(tmp_path, monkeypatch, capsys):
    given = ["--set", f"rlhf.reward_url={LITERAL}"]
    monkeypatch.setattr(sys, "argv", ["rlhf-chat", "run", "--model", "tiny", "--name", str(tmp_path / "new"), *given])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and not (tmp_path / "new").exists()
    said = capsys.readouterr().err
    assert said.startswith(f"rlhf-chat: rlhf.reward_url={SHOWN} holds a secret") and "geheimnis" not in said


def test_the_environment_has_it_and_the_address_names_it(endpoint, monkeypatch):  # noqa: F811
    url = endpoint.url.replace("://", "://an%40na:${MY_KEY}@") + "?token=${MY_OTHER}&k=1"
    assert load_config([], ["model=m", f"rlhf.reward_url={url}"]).rlhf.reward_url == url
    monkeypatch.setenv("MY_KEY", "p@ss:w/ö rd")
    with pytest.raises(RewardFailed, match=r"names the environment variable MY_OTHER, which is not set: export it"):
        RewardEndpoint(url, 5, retries=0).scores(PROMPTS, RESPONSES, ROWS)
    monkeypatch.setenv("MY_OTHER", "a&b")
    endpoint.answers = [(200, {"scores": [1, 2]}), (403, {})]
    RewardEndpoint(url, 5, retries=0).scores(PROMPTS, RESPONSES, ROWS)
    assert endpoint.headers_of[0]["Authorization"] == f"Basic {base64.b64encode('an@na:p@ss:w/ö rd'.encode()).decode()}"
    assert endpoint.paths == ["/score?token=a%26b&k=1"]
    with pytest.raises(UserError) as refused:
        RewardEndpoint(url, 5, retries=0).scores(PROMPTS, RESPONSES, ROWS)
    assert "a%26b" not in json.dumps(str(refused.value)) and "p@ss" not in str(refused.value)
