"""How a stage's error reaches the command."""

import sys
import traceback

import pytest

from applications import launch
from inference.errors import UserError
from training.run_directory import RunDirectory

FAILS = """
import json, sys
json.dump({"sentence": "Your function failed.", "code": 2, "traceback": "line 7, in score"}, open(sys.argv[1], "w"))
sys.exit(1)
"""


def test_a_traceback_of_the_users_own_code_is_kept_beside_the_sentence(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    error_file = run.step(3).error_file
    monkeypatch.setattr(launch, "stage_command", lambda *_: [sys.executable, "-c", FAILS, str(error_file)])
    with pytest.raises(UserError) as raised:
        launch.run_stage_script("step3_rlhf", run, 1)
    assert str(raised.value) == "Your function failed."
    assert "line 7, in score" in "".join(traceback.format_exception(raised.value))  # what --debug shows
