"""What is refused before anything trains."""

import pytest
from transformers import CodeGenConfig, OPTConfig

from inference.errors import UserError
from training.config_files import load_config
from training.stage import require_layouts

SMALL = {"vocab_size": 96, "num_attention_heads": 4}
OPT = OPTConfig(**SMALL, hidden_size=32, num_hidden_layers=2, ffn_dim=64, word_embed_proj_dim=32)
CODEGEN = CodeGenConfig(vocab_size=96, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)


def check(directory, model, processes: int, tensor: int, setting: str = "generation_tensor_parallel") -> None:
    model.save_pretrained(directory)
    settings = ["model=any", f"processes={processes}", f"rlhf.{setting}={tensor}"]
    require_layouts(load_config([], settings), directory, directory)


def test_degrees_that_fit_pass(tmp_path):
    for processes, tensor in ((1, 1), (2, 2), (4, 2), (4, 4)):
        check(tmp_path, OPT, processes, tensor)


@pytest.mark.parametrize(
    ("model", "processes", "tensor", "expected"),
    [
        (OPT, 3, 2, "does not fill 3 ranks"),
        (OPT, 3, 3, "cannot be cut into 3"),
        (CODEGEN, 2, 2, "Models of type 'codegen' cannot be cut over ranks"),
    ],
)
def test_degrees_that_do_not_are_a_sentence(tmp_path, model, processes, tensor, expected):
    with pytest.raises(UserError, match=expected):
        check(tmp_path, model, processes, tensor)


@pytest.mark.parametrize("role", ["reference", "reward", "critic"])
def test_degrees_of_scoring_are_checked_too(tmp_path, role):
    check(tmp_path, OPT, 2, 2, f"scoring_tensor_parallel.{role}")
    with pytest.raises(UserError, match="cannot be cut into 3"):
        check(tmp_path, OPT, 3, 3, f"scoring_tensor_parallel.{role}")
