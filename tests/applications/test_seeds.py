"""A seed that is taken works everywhere; others are refused in a sentence."""

import pytest
import torch

from applications.cli import main
from inference.generation.sampler import SamplingKey, uniform
from training.config_files import load_config

LARGEST = 2**63 - 1


def test_the_largest_seed_draws_like_any_other():
    seed = load_config([], ["model=m", f"seed={LARGEST}"]).seed
    torch.manual_seed(seed)
    places = torch.arange(4)
    drawn = uniform(SamplingKey(seed, 1), places, places)
    assert ((drawn >= 0) & (drawn < 1)).all() and len(set(drawn.tolist())) == 4


@pytest.mark.parametrize("seed", [LARGEST + 1, -LARGEST - 2, 99999999999999999999])
def test_chat_refuses_what_no_generator_takes(seed, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["rlhf-chat", "chat", "no/such/run", "--seed", str(seed)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "--seed takes a whole number of 64 bits" in capsys.readouterr().err
