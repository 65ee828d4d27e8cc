"""Every causal family of transformers is refused, or trained and generated as transformers does.

The models are real, two narrow layers each; the expected numbers are those of plain transformers, a row at a time.
"""

import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Llama4ForConditionalGeneration

from inference.errors import UserError
from inference.families import meta_model, require_supported_family, set_dropout, text_config
from inference.generation.engine import GenerationEngine
from inference.generation.sampler import SamplingKey, SamplingSettings
from inference.tensor_parallel.shard import TensorParallel, cuts_of, empty_shard
from inference.weights import read_weights
from tests.families import FAMILIES, UNBUILDABLE, VOCABULARY, WINDOW, build, narrow_config
from tests.training.pipelines.test_stage_model import require_equal
from training.data.batching import TokenBatch
from training.models.policy import Policy
from training.pipelines.stage_model import require_stages

PAD, NO_END = 1, -1
PAGE = (Path(__file__).parents[3] / "docs" / "families.md").read_text()
UNSTAGED = set(
    re.findall(r"[\w-]+", PAGE.partition("**Pipeline stages.**")[2].partition("\n\n")[2].partition("\n\n")[0])
)
"""Families that cannot be cut into pipeline stages."""
CPU = torch.device("cpu")


def tokens(length: int, seed: int) -> Tensor:
    return torch.randint(5, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


ROWS = [(tokens(5, 1), tokens(7, 2)), (tokens(9, 3), tokens(3, 4)), (tokens(2, 5), tokens(4, 6))]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several are slower for models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(request) -> Any:
    """Of a family that is supported, two layers."""
    family = request.param
    if family in UNBUILDABLE:
        pytest.skip(UNBUILDABLE[family])
    config = narrow_config(family)
    try:
        require_supported_family(config)
    except UserError as refused:
        pytest.skip(str(refused))
    set_dropout(config, 0.0)
    return build(config)


@torch.no_grad()
def plain_logprobs(model: Any, prompt: Tensor, response: Tensor) -> Tensor:
    ids = torch.cat([prompt, response])
    logprobs = model(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
    return logprobs[len(prompt) - 1 : -1].gather(1, response[:, None])[:, 0]


@pytest.mark.parametrize("model", FAMILIES, indirect=True)
class TestFamily:
    def test_a_token_does_not_see_those_after_it(self, model):
        prompt, response = ROWS[0]
        two = torch.stack([torch.cat([prompt, response]), torch.cat([prompt, tokens(len(response), 9)])])
        with torch.no_grad():
            same, other = model(input_ids=two, use_cache=False).logits[:, : len(prompt)]
        assert torch.allclose(same, other, atol=1e-4)

    def test_generated_as_by_transformers(self, model):
        prompts = [prompt for prompt, _ in ROWS]
        for sample in GenerationEngine(model, NO_END, PAD).generate(prompts, SamplingSettings(WINDOW), SamplingKey(1)):
            plain = plain_logprobs(model, sample.prompt_ids, torch.tensor(sample.response_ids))
            assert torch.allclose(torch.tensor(sample.logprobs), plain, atol=1e-4)

    def test_cut_over_two_ranks_or_refused(self, model):
        try:
            require_cut(model)
        except UserError as refused:
            assert "cannot be cut" in str(refused)
            return
        ids = torch.stack([tokens(12, 1), tokens(12, 2)])
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits
        for found in outputs_of_parts(model, ids, 2):
            assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))

    def test_trained_as_by_transformers(self, model):
        expected = torch.cat([plain_logprobs(model, *row) for row in ROWS])
        before = model.config._attn_implementation
        logprobs, _ = Policy(model.train())(TokenBatch.of(ROWS, CPU))  # no dropout is left
        logprobs.sum().backward()
        begun = [ROWS[0], (ROWS[0][0], ROWS[1][1])]
        shared, _ = Policy(model.eval())(TokenBatch.of(begun, CPU))  # computed once as far as they are the same
        model.config._attn_implementation = before
        assert torch.allclose(logprobs, expected, atol=1e-4)
        assert torch.allclose(shared, torch.cat([plain_logprobs(model, *row) for row in begun]), atol=1e-4)
        assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())

    def test_cut_into_stages_or_refused(self, model):
        layers = (1,) * text_config(model.config).num_hidden_layers
        before = model.config._attn_implementation
        try:
            require_stages(model, len(layers))
            model.zero_grad()
            require_equal(Policy(model), layers, [*ROWS, (ROWS[0][0], ROWS[1][1])])
            assert model.config.model_type not in UNSTAGED
        except UserError as refused:
            assert "cannot be cut" in str(refused) and model.config.model_type in UNSTAGED
        finally:
            model.config._attn_implementation = before

    def test_with_more_tokens_saved_as_it_is_opened(self, model):
        model.resize_token_embeddings(VOCABULARY + 12, mean_resizing=False)
        opened = meta_model(AutoConfig.for_model(**model.config.to_dict()))
        shapes = [{name: weight.shape for name, weight in one.state_dict().items()} for one in (model, opened)]
        assert shapes[0] == shapes[1]


class Meeting:
    """Where the threads of a tensor-parallel group exchange tensors."""

    def __init__(self, size: int):
        self.barrier, self.parts = threading.Barrier(size), [torch.empty(0)] * size

    def exchange(self, rank: int, part: Tensor) -> list[Tensor]:
        self.parts[rank] = part.clone()
        self.barrier.wait(120)
        parts = list(self.parts)
        self.barrier.wait(120)
        return parts


@dataclass(frozen=True)
class Threads(TensorParallel):
    meeting: Meeting | None = None

    def sum(self, partial: Tensor) -> Tensor:
        assert self.meeting is not None
        return partial.copy_(torch.stack(self.meeting.exchange(self.rank, partial)).sum(0))

    def join_last(self, part: Tensor) -> Tensor:
        assert self.meeting is not None
        return torch.cat(self.meeting.exchange(self.rank, part), -1)

    def __deepcopy__(self, memo: dict) -> "Threads":
        return self


def require_cut(model: Any) -> None:
    """Raise UserError where the model cannot be cut in two."""
    cuts_of(model, TensorParallel(0, 2))


@torch.no_grad()
def outputs_of_parts(whole: Any, ids: Tensor, degree: int) -> list[Tensor]:
    """The logits that each part of a cut model gives, a thread each."""
    meeting, outputs = Meeting(degree), [torch.empty(0)] * degree

    def work(rank: int) -> None:
        shard, pieces = empty_shard(whole, Threads(rank, degree, None, meeting))
        weights = dict(whole.named_parameters())
        for piece in pieces:
            piece.local.data.copy_(weights[piece.name] if piece.cut is None else piece.cut(weights[piece.name].data))
        with torch.no_grad():  # of this thread
            outputs[rank] = shard(input_ids=ids, use_cache=False).logits

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(degree)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outputs


VARIANTS = {
    "gemma3n_text": {"num_hidden_layers": 10, "num_kv_shared_layers": 4},  # the last layers take keys of earlier ones
    "gemma4_text": {"num_hidden_layers": 12, "num_kv_shared_layers": 4},
    "phimoe": {"sliding_window": WINDOW},  # in a mask alone
}


@pytest.mark.parametrize("family", VARIANTS)
def test_variants_of_a_family_generate_as_in_transformers(family):
    TestFamily().test_generated_as_by_transformers(build(narrow_config(family, **VARIANTS[family])))


def test_the_language_model_of_a_directory_with_other_parts_is_opened(tmp_path):
    config = narrow_config(
        "llama4", vision_config={"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 128}
    )
    config.vision_config.num_attention_heads, config.vision_config.vision_output_dim = 4, 32
    config.vision_config.projector_input_dim = config.vision_config.projector_output_dim = 32
    whole = Llama4ForConditionalGeneration(config)
    whole.save_pretrained(tmp_path)
    opened, _ = read_weights(AutoModelForCausalLM, tmp_path)
    theirs = whole.language_model.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in opened.state_dict().items())
