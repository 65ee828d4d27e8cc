from pathlib import Path

import pytest
import torch

from inference.families import build_tiny_model


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model_directory(tmp_path_factory) -> Path:
    """A two-layer OPT with random weights and a byte-level BPE tokenizer. Tests copy it before they change it."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny_model(directory)
    return directory
