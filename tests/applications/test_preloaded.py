"""Scripts that fork from a process which has the libraries loaded."""

import os
import signal
import subprocess

import pytest

from applications.launch import ForkedScript, can_fork

pytestmark = pytest.mark.skipif(not can_fork(), reason="scripts are forked on Linux without a GPU")


def forked(tmp_path, text, **environment):
    script, log = tmp_path / "script.py", tmp_path / "log.txt"
    script.write_text(text)
    with open(log, "a", encoding="utf-8") as handle, open(tmp_path / "out.txt", "w", encoding="utf-8") as shown:
        return ForkedScript([str(script), "a", "b"], {**os.environ, **environment}, shown, handle)


def test_a_script_has_its_arguments_environment_and_streams_and_the_libraries_already(tmp_path, monkeypatch):
    place = tmp_path / "elsewhere"
    (place / "training").mkdir(parents=True)
    (place / "training" / "__init__.py").write_text("raise ImportError('the wrong package')")
    monkeypatch.chdir(place)
    text = (
        "import atexit, os, sys\n"
        "atexit.register(print, 'at the end')\n"
        "print(__name__, sys.argv[1:], os.environ['SAID'], os.getcwd(), 'deepspeed' in sys.modules)\n"
        "print('a warning', file=sys.stderr)\n"
        "sys.exit(2)\n"
    )
    assert forked(tmp_path, text, SAID="hello").wait(timeout=120) == 2
    shown = (tmp_path / "out.txt").read_text()
    assert shown == f"__main__ ['a', 'b'] hello {place} True\nat the end\n"
    assert (tmp_path / "log.txt").read_text() == "a warning\n"


def test_how_a_script_ends(tmp_path):
    assert forked(tmp_path, "raise ValueError('no')").wait(timeout=120) == 1
    assert "ValueError: no" in (tmp_path / "log.txt").read_text()
    waits = forked(tmp_path, "import time; time.sleep(600)")
    with pytest.raises(subprocess.TimeoutExpired):
        waits.wait(timeout=0.1)
    waits.kill()
    assert waits.wait(timeout=120) == -signal.SIGKILL
    assert forked(tmp_path, "pass").wait(timeout=120) == 0


def test_nothing_is_forked_beside_an_accelerator(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert not can_fork()
