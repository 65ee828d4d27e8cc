"""check_first_update lets a correct setup pass and stops one with a mistake in it, each mistake put in by hand."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from inference.generation.attention import Sequences
from inference.generation.engine import GenerationEngine
from inference.generation.kv_cache import CachePositions
from inference.generation.sampler import SamplingKey, SamplingSettings
from inference.tensor_parallel.shard import TensorParallel
from training.data.batching import TokenBatch
from training.distributed import Ranks
from training.hybrid_engine.layout import Layout
from training.metrics import Display
from training.models.policy import Policy, call_on_tokens
from training.plan import Assignment
from training.rlhf_settings import RLHFSettings
from training.stage import Diverged
from training.step3_rlhf.experience import Experience, token_batch
from training.step3_rlhf.positions import CallPosition
from training.step3_rlhf.watch import check_first_update

CPU = torch.device("cpu")
PAD, END, TEMPERATURE = 1, 2, 0.7
SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "opt": OPTConfig(**SMALL, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.1),
    "llama": LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2, max_position_embeddings=64),
}


class DirectRoles:
    """Roles without DeepSpeed: the policy is called as it is."""

    def __init__(self, policy: Policy, temperature: float = TEMPERATURE):
        self.policy, self.temperature = policy, temperature
        assignment = Assignment(Layout((0,)), micro_batch_limit=64)
        self.positions = {
            "actor_train": CallPosition(assignment, Ranks(0, 1, CPU), TensorParallel(), 0, Ranks(0, 1, CPU))
        }

    @torch.no_grad()
    def logprobs(self, batches: list[TokenBatch]) -> list[torch.Tensor]:
        return [self.policy(batch, self.temperature)[0] for batch in batches]


def make_policy(family: str = "opt", dtype: torch.dtype = torch.float32) -> Policy:
    torch.manual_seed(0)
    config = copy.deepcopy(FAMILIES[family])  # models keep it, and change it
    config.pad_token_id, config.bos_token_id, config.eos_token_id = PAD, 0, END
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # the default initialisation makes every logit nearly equal
        torch.nn.init.normal_(parameter, std=0.2)
    return Policy(model.to(dtype).eval())


def make_ppo(directory, roles, dtype: torch.dtype = torch.float32, **settings: int) -> SimpleNamespace:
    """What the check uses of a stage and its roles."""
    rlhf = RLHFSettings(temperature=TEMPERATURE, micro_batch_tokens=64, **settings)
    stage = SimpleNamespace(
        config=SimpleNamespace(rlhf=rlhf),
        ranks=Ranks(0, 1, CPU),
        dtype=dtype,
        directory=SimpleNamespace(path=directory),
        display=Display(quiet=True),
    )
    return SimpleNamespace(stage=stage, roles=roles)


def check(ppo: SimpleNamespace, experience: list[Experience]) -> None:
    check_first_update(ppo.stage, ppo.roles, experience)


def generate(policy: Policy, min_tokens: int = 0) -> list[Experience]:
    """Prompts of different lengths in one batch, so that all but the longest are padded on the left."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(5, 96, (length,), generator=generator) for length in (9, 2, 5, 3, 7, 4)]
    engine = GenerationEngine(policy.model, END, PAD, slots=len(prompts))
    sampling = SamplingSettings(max_tokens=8, temperature=TEMPERATURE, min_tokens=min_tokens)
    samples = sorted(engine.generate(prompts, sampling, SamplingKey(5)), key=lambda sample: sample.index)
    return [Experience.of(sample) for sample in samples]


def recompute(ppo: SimpleNamespace, experience: list[Experience]) -> list[Experience]:
    """With old log-probabilities as scoring takes them, one sample at a time."""
    logprobs = ppo.roles.logprobs([token_batch([each], CPU) for each in experience])
    return [replace(each, logprobs=found) for each, found in zip(experience, logprobs, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_correct_setup_passes_and_says_what_was_found(tmp_path, family, recomputed):
    policy = make_policy(family)
    experience = generate(policy)
    ppo = make_ppo(tmp_path, DirectRoles(policy))
    if recomputed:
        experience = recompute(ppo, experience)
    check(ppo, experience)
    found = json.loads((tmp_path / "first_update.json").read_text())
    assert found["ratio_error"] < 1e-5 and found["generation_logprob_difference"] < 1e-5
    assert found["kl_old"] == pytest.approx(0, abs=1e-8)


def test_rounding_to_bf16_passes(tmp_path):
    experience = generate(make_policy("llama", torch.bfloat16))
    ppo = make_ppo(tmp_path, DirectRoles(make_policy("llama")), torch.bfloat16)
    check(ppo, recompute(ppo, experience))
    assert 1e-4 < json.loads((tmp_path / "first_update.json").read_text())["generation_logprob_difference"] < 0.15


def refused(directory, policy: Policy, experience: list[Experience], recomputed: bool = False, **changed) -> str:
    """Check a setup that must not pass; returns the sentence."""
    ppo = make_ppo(directory, DirectRoles(policy, **changed))
    if recomputed:  # then the ratio is 1 whatever is wrong: generation alone can tell
        experience = recompute(ppo, experience)
    with pytest.raises(Diverged) as raised:
        check(ppo, experience)
    assert not (directory / "first_update.json").exists()
    return str(raised.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recomputed", [False, True])
def test_another_temperature_is_found(tmp_path, family, recomputed):
    policy = make_policy(family)
    said = refused(tmp_path, policy, generate(policy), recomputed, temperature=1.0)
    assert "would teach nonsense" in said and "dtype=fp32" in said


@pytest.mark.parametrize("recomputed", [False, True])
def test_positions_shifted_by_one_are_found(tmp_path, monkeypatch, recomputed):
    """OPT's positions are absolute; Llama's are relative, and a shift of all of them is no mistake there."""
    positions = Sequences.positions
    for family in FAMILIES:
        policy = make_policy(family)
        experience = generate(policy)
        with monkeypatch.context() as changed:
            changed.setattr(Sequences, "positions", lambda self, device: positions(self, device) + 1)
            if family == "opt":
                refused(tmp_path, policy, experience, recomputed)
            else:
                check(make_ppo(tmp_path, DirectRoles(policy)), experience)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_that_count_the_other_rows_are_found(tmp_path, monkeypatch, family):
    policy = make_policy(family)
    experience = generate(policy)
    with monkeypatch.context() as changed:
        changed.setattr(Sequences, "positions", lambda self, device: torch.arange(sum(self.lengths))[None])
        if family == "opt":
            refused(tmp_path, policy, experience)
        else:  # relative positions survive it
            check(make_ppo(tmp_path, DirectRoles(policy)), experience)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_read_one_place_too_late_are_found(tmp_path, monkeypatch, family):
    """The logits at a token say what follows it, not how likely it was itself."""
    policy = make_policy(family)
    experience = generate(policy)

    def too_late(self, batch, temperature, received=None):
        logits = call_on_tokens(self.model, batch, logits_at=batch.predicting + 1) / temperature
        return logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0], None

    monkeypatch.setattr(Policy, "forward", too_late)
    refused(tmp_path, policy, experience)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recomputed", [False, True])
def test_attention_beyond_the_own_row_is_found(tmp_path, monkeypatch, family, recomputed):
    """What lies behind a row's end in the cache belongs to nobody, or to an older sample."""
    policy = make_policy(family)
    with monkeypatch.context() as changed:
        changed.setattr(CachePositions, "mask", lambda self, window, dtype: None)
        experience = generate(policy)
    refused(tmp_path, policy, experience, recomputed)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_to_the_rows_before_is_found(tmp_path, monkeypatch, family):
    """Rows packed into one sequence must not see each other."""
    policy = make_policy(family)
    experience = generate(policy)
    attend = Sequences.attend

    def as_one(self, *inputs):
        return attend(Sequences([sum(self.lengths)]), *inputs)

    with monkeypatch.context() as changed:
        changed.setattr(Sequences, "attend", as_one)
        refused(tmp_path, policy, experience)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recomputed", [False, True])
def test_weights_that_changed_after_generation_are_found(tmp_path, family, recomputed):
    policy = make_policy(family)
    experience = generate(policy)
    with torch.no_grad():
        policy.model.get_output_embeddings().weight[7] += 0.1  # one token of 96
    refused(tmp_path, policy, experience, recomputed)


@pytest.mark.parametrize("recomputed", [False, True])
def test_dropout_is_found(tmp_path, recomputed):
    policy = make_policy("opt")
    experience = generate(policy)
    policy.train()
    refused(tmp_path, policy, experience, recomputed)


def test_old_logprobs_of_other_weights_are_found_where_generation_cannot_tell(tmp_path):
    """With a least length, generation drew from a distribution without the end token: the ratio alone is checked."""
    policy = make_policy("opt")
    experience = generate(policy, min_tokens=4)
    ppo = make_ppo(tmp_path, DirectRoles(policy), min_response_tokens=4)
    experience = recompute(ppo, experience)
    check(ppo, experience)
    found = json.loads((tmp_path / "first_update.json").read_text())
    assert found["ratio_error"] < 1e-5 and "generation_logprob_difference" not in found
    with torch.no_grad():
        policy.model.get_output_embeddings().weight[7] += 0.1
    with pytest.raises(Diverged):
        check(ppo, experience)
