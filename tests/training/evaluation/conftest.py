import pytest
import torch

from tests.tiny_runs import make_tiny_run
from training.distributed import Ranks
from training.run_directory import RunDirectory
from training.stage import Stage, make_stage
from training.steps import PPO


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> RunDirectory:
    return make_tiny_run(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture
def stage(finished) -> Stage:
    stage = make_stage(finished, PPO, finished.read_config(), Ranks(0, 1, torch.device("cpu")))
    stage.display.quiet = True
    return stage
