"""Policies and scorers of every family against plain transformers; padding, adapters, vocabulary, saving."""

import copy
from unittest.mock import patch

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BloomConfig,
    CodeGenConfig,
    Cohere2Config,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
)

from inference.chat_format import PAD_TOKEN, ChatFormat
from inference.errors import UserError
from inference.families import build_tiny_model
from tests.inference.templates import CHATML, Family, bytes_tokenizer
from training.data.batching import TokenBatch
from training.models import policy
from training.models.loading import (
    fit_vocabulary,
    load_causal_lm,
    load_scorer,
    require_scorer_family,
    resolve_dtype,
    save_model,
)
from training.models.policy import Policy, Scorer, SelectedLogprobs, add_lora, at_last_token
from training.role_settings import LoRASettings

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OPT = {**SMALL, "ffn_dim": 64, "max_position_embeddings": 64, "dropout": 0.1, "word_embed_proj_dim": 32}
FAMILIES = {
    "opt": OPTConfig(**OPT),
    "opt-350m": OPTConfig(**{**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=64, max_position_embeddings=64),
    "bloom": BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
    "gptj": GPTJConfig(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
    "gpt_neo": GPTNeoConfig(
        vocab_size=96,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=4,  # shorter than the rows
        max_position_embeddings=64,
    ),
    "codegen": CodeGenConfig(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
    "llama": LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2, max_position_embeddings=64),
    "gemma2": Gemma2Config(
        **SMALL,
        intermediate_size=64,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        final_logit_softcapping=3.0,  # far below the logits
    ),
    "cohere2": Cohere2Config(
        **SMALL, intermediate_size=64, num_key_value_heads=2, sliding_window=6, logit_scale=0.25, eos_token_id=2
    ),
    "qwen2": Qwen2Config(**SMALL, intermediate_size=64, num_key_value_heads=2, max_position_embeddings=64),
}
SCORERS = [family for family in FAMILIES if family not in ("codegen", "cohere2")]
"""The others have no score head in transformers."""
CPU = torch.device("cpu")


def tokens(length: int, seed: int) -> torch.Tensor:
    return torch.randint(5, 96, (length,), generator=torch.Generator().manual_seed(seed))


ROWS = [
    (tokens(7, 1), tokens(5, 2)),
    (tokens(3, 3), tokens(2, 4)),
    (tokens(12, 5), tokens(9, 6)),
    (tokens(7, 1), torch.cat([tokens(5, 2)[:3], tokens(4, 7)])),  # begins as the first one does
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    build_tiny_model(directory)
    return directory


def make(family: str, head=AutoModelForCausalLM):
    config = copy.deepcopy(FAMILIES[family])  # models keep it, and change it
    config.pad_token_id, config.num_labels = 1, 1
    torch.manual_seed(0)
    model = head.from_config(config).eval()
    for parameter in model.parameters():  # the default initialisation makes every logit nearly equal
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_policy_equals_the_plain_model_on_rows_of_its_own(family, temperature):
    logprobs, entropy = Policy(make(family))(TokenBatch.of(ROWS, CPU), temperature)
    model = make(family)
    expected, spread = [], []
    for prompt, response in ROWS:  # one at a time: no padding, all logits, the softmax written out
        logits = model(torch.cat([prompt, response])[None]).logits[0] / temperature
        for place, token in enumerate(response.tolist()):
            row = logits[len(prompt) + place - 1].double()
            probabilities = row.exp() / row.exp().sum()
            expected.append(probabilities[token].log())
            spread.append(-(probabilities * probabilities.log()).sum())
    assert torch.allclose(logprobs.double(), torch.stack(expected), atol=1e-5)
    assert torch.allclose(entropy.double(), torch.stack(spread), atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("at_once", [100, 4])
def test_gradients_of_logprobs_are_those_of_autograd(temperature, at_once, monkeypatch):
    monkeypatch.setattr(policy, "rows_at_once", lambda logits: at_once)
    torch.manual_seed(2)
    logits = torch.randn(6, 11, dtype=torch.float32, requires_grad=True)
    chosen, weights = torch.tensor([0, 10, 3, 3, 7, 5]), torch.randn(6)
    (SelectedLogprobs.apply(logits, chosen, temperature)[0] * weights).sum().backward()
    ours, logits.grad = logits.grad, None
    ((logits / temperature).log_softmax(-1).gather(1, chosen[:, None])[:, 0] * weights).sum().backward()
    assert torch.allclose(ours, logits.grad, atol=1e-6)


def test_the_loss_of_bf16_logits_is_computed_in_fp32():
    logits = (4 * torch.randn(50, 300, generator=torch.Generator().manual_seed(1))).bfloat16()
    chosen = torch.randint(0, 300, (50,), generator=torch.Generator().manual_seed(2))
    ours, _ = SelectedLogprobs.apply(logits.requires_grad_(), chosen, 1.0)
    exact = logits.detach().double().log_softmax(-1).gather(1, chosen[:, None])[:, 0]
    assert ours.dtype == torch.float32
    assert torch.allclose(ours.double(), exact, atol=1e-5)
    in_bf16 = logits.detach().log_softmax(-1).gather(1, chosen[:, None])[:, 0]
    assert (in_bf16.double() - exact).abs().max() > 1e-3  # what would be lost


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_plain_model(family):
    ours, plain = Policy(make(family)), make(family)
    ours(TokenBatch.of(ROWS, CPU))[0].sum().backward()
    for prompt, response in ROWS:
        logits = plain(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        logits.log_softmax(-1).gather(1, response[:, None]).sum().backward()
    for (name, parameter), reference in zip(ours.model.named_parameters(), plain.parameters(), strict=True):
        tolerance = max(1e-4 * float(reference.grad.abs().max()), 1e-7)  # the key bias has no gradient but rounding
        assert torch.allclose(parameter.grad, reference.grad, atol=tolerance), name


@pytest.mark.parametrize("family", SCORERS)
def test_scores_do_not_depend_on_the_other_rows(family):
    scorer = Scorer(make(family, AutoModelForSequenceClassification))
    batch = TokenBatch.of(ROWS, CPU)
    together = at_last_token(scorer(batch), batch)
    for row, score in zip(ROWS, together, strict=True):
        alone = TokenBatch.of([row], CPU)
        assert torch.allclose(at_last_token(scorer(alone), alone)[0], score, atol=1e-5)


def test_a_family_without_a_score_head_is_refused():
    for config in (FAMILIES["codegen"], BertConfig()):  # BERT's is a classifier of whole texts
        with pytest.raises(UserError, match=rf"type '{config.model_type}' cannot be reward models .*method=dpo"):
            require_scorer_family(config)
    require_scorer_family(FAMILIES["gptj"])


@pytest.mark.parametrize("family", ["gptj", "gpt_neo", "codegen"])
def test_adapters_go_into_every_linear_layer_and_learn(family):
    policy = Policy(make(family), LoRASettings(rank=4))
    linear = {name for name, module in make(family).named_modules() if isinstance(module, torch.nn.Linear)}
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    assert {name.partition(".lora_")[0] for name in trained} == linear - {"lm_head"}
    batch, optimizer = TokenBatch.of(ROWS, CPU), torch.optim.Adam(trained.values(), 1e-2)
    losses = []
    for _ in range(4):
        loss = -policy(batch)[0].mean()
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[3] < losses[0] - 0.1


def test_score_shift_and_scale_come_from_the_configuration():
    model = make("llama", AutoModelForSequenceClassification)
    batch = TokenBatch.of(ROWS, CPU)
    raw = Scorer(model)(batch)
    model.config.score_shift, model.config.score_scale = 0.5, 2.0
    assert torch.allclose(Scorer(model)(batch), (raw - 0.5) / 2)


def test_the_reward_is_read_where_transformers_reads_it(tiny):
    """The directory opens in any tool: its own sequence classification gives our score."""
    scorer = load_scorer(tiny, ChatFormat.load(tiny), torch.float32).eval()
    rows = [(prompt + 100, response + 100) for prompt, response in ROWS]
    batch = TokenBatch.of(rows, CPU)
    ids, mask, _ = batch.padded()
    ids = ids.masked_fill(mask == 0, scorer.config.pad_token_id)
    theirs = scorer(input_ids=ids, attention_mask=mask).logits[:, 0]
    assert torch.allclose(at_last_token(Scorer(scorer)(batch), batch), theirs, atol=1e-5)


def test_a_fresh_score_head_has_the_prescribed_spread(tiny):
    torch.manual_seed(0)
    heads = [load_scorer(tiny, ChatFormat.load(tiny), torch.float32).score.weight for _ in range(20)]
    assert torch.cat(heads).std().item() == pytest.approx(65**-0.5, rel=0.05)  # hidden size 64


def test_a_scorer_of_the_first_layers_only(tiny):
    chat_format = ChatFormat.load(tiny)
    whole, cut = (load_scorer(tiny, chat_format, torch.float32, layers).eval() for layers in (0, 1))
    assert (whole.config.num_hidden_layers, cut.config.num_hidden_layers) == (2, 1)
    ids = tokens(9, 1)[None] + 100
    first = whole.model(ids, output_hidden_states=True).hidden_states[1]
    assert torch.allclose(cut.model.decoder.final_layer_norm(first), cut.model(ids).last_hidden_state, atol=1e-5)


def test_dropout_is_off_everywhere(tiny):
    model = load_causal_lm(tiny, ChatFormat.load(tiny), torch.float32).train()
    ids = tokens(20, 1)[None] + 100
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert all(getattr(model.config, name, 0) == 0 for name in ("dropout", "attention_dropout"))


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "gpt_neox", "bloom", "gptj", "gpt_neo", "codegen"])
def test_dropout_is_in_training_mode_alone_and_as_asked(family, tiny, tmp_path):
    """Also where attention weights are all that the family can drop (Llama)."""
    chat_format = ChatFormat.load(tiny)
    make(family).save_pretrained(tmp_path)
    with patch("training.models.loading.fit_vocabulary"):  # the tokenizer is another family's
        policy = Policy(load_causal_lm(tmp_path, chat_format, torch.float32, 0.3))
    batch = TokenBatch.of(ROWS, CPU)
    assert torch.allclose(policy.eval()(batch)[0], Policy(make(family)).eval()(batch)[0], atol=1e-5)
    first, second = policy.train()(batch)[0], policy(batch)[0]
    assert not torch.allclose(first, second, atol=1e-3)


def test_without_adapter_the_policy_is_its_reference(tiny):
    chat_format = ChatFormat.load(tiny)
    plain = load_causal_lm(tiny, chat_format, torch.float32)
    batch = TokenBatch.of(ROWS, CPU)
    before = Policy(plain)(batch)[0]
    policy = Policy(load_causal_lm(tiny, chat_format, torch.float32), LoRASettings(rank=4))
    assert torch.allclose(policy(batch)[0], before, atol=1e-6)  # a fresh adapter changes nothing
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    assert not torch.allclose(policy(batch)[0], before, atol=1e-2)
    with policy.without_adapter():
        assert torch.allclose(policy(batch)[0], before, atol=1e-6)


def test_adapter_names_that_match_nothing_are_refused(tiny):
    model = load_causal_lm(tiny, ChatFormat.load(tiny), torch.float32)
    with pytest.raises(UserError, match=r"lora\.targets=\['no_such_proj'\] does not fit this model"):
        add_lora(model, LoRASettings(rank=4, targets=["no_such_proj"]))


@pytest.mark.parametrize("scorer", [False, True])
def test_the_saved_model_computes_what_the_trained_one_did(tiny, tmp_path, scorer):
    chat_format, lora = ChatFormat.load(tiny), LoRASettings(rank=4)
    batch = TokenBatch.of(ROWS, CPU)
    torch.manual_seed(1)
    load, kind = (load_scorer, Scorer) if scorer else (load_causal_lm, Policy)
    trained = kind(load(tiny, chat_format, torch.float32), lora)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    weights = {name: p.detach().clone() for name, p in trained.model.named_parameters() if p.requires_grad}
    fresh = load(tiny, chat_format, torch.float32)
    save_model(tmp_path / "m", fresh, chat_format, weights, lora, torch.float32, None, tmp_path / "adapter")
    reloaded = kind(load(tmp_path / "m", chat_format, torch.float32))
    ours, theirs = (x if scorer else x[0] for x in (trained(batch), reloaded(batch)))
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert ChatFormat.load(tmp_path / "m").end_of_turn_id == chat_format.end_of_turn_id


def test_a_saved_model_keeps_all_that_ends_an_answer(tmp_path):
    """Of a template whose end of turn is not the tokenizer's end of text: plain transformers stops at both."""
    family = Family(CHATML, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>")
    bytes_tokenizer(family).save_pretrained(tmp_path / "base")
    chat_format = ChatFormat.load(tmp_path / "base")
    model = AutoModelForCausalLM.from_config(OPTConfig(**{**OPT, "vocab_size": 259}))
    save_model(tmp_path / "m", model, chat_format, {}, LoRASettings(), torch.float32)
    assert GenerationConfig.from_pretrained(tmp_path / "m").eos_token_id == [258, 256]
    assert ChatFormat.load(tmp_path / "m").end_ids == chat_format.end_ids == (258, 256)


def test_ids_with_gaps_fit_and_load_again(tmp_path):
    """Letters below 256, two tokens at 300 and 301, and a pad token that is new."""
    family = Family(CHATML, ("<|im_end|>", "<|im_start|>"), "<|im_end|>")
    bytes_tokenizer(family, {"<|im_start|>": 300, "<|im_end|>": 301}).save_pretrained(tmp_path / "base")
    chat_format = ChatFormat.load(tmp_path / "base")
    assert (len(chat_format.tokenizer), chat_format.pad_id, chat_format.vocabulary_size) == (259, 302, 303)
    model = AutoModelForCausalLM.from_config(OPTConfig(**{**OPT, "vocab_size": 302}))
    model.save_pretrained(tmp_path / "base")
    fitted = load_causal_lm(tmp_path / "base", chat_format, torch.float32)
    assert fitted.get_input_embeddings().num_embeddings == 303
    save_model(tmp_path / "m", fitted, chat_format, {}, LoRASettings(), torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    ids = torch.tensor([[0, 301, chat_format.pad_id]])
    assert torch.equal(again(ids).logits, fitted.eval()(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_pad_token_grows_the_embeddings_and_changes_no_logit(tiny, tied):
    chat_format = ChatFormat.load(tiny)
    model = AutoModelForCausalLM.from_config(OPTConfig(**{**OPT, "vocab_size": 512}, tie_word_embeddings=tied)).eval()
    ids = tokens(9, 1)[None]
    before = model(ids).logits
    chat_format.tokenizer.add_special_tokens({"additional_special_tokens": [PAD_TOKEN]})
    fit_vocabulary(model, chat_format)
    assert model.get_input_embeddings().num_embeddings == len(chat_format.tokenizer) == 513
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert torch.allclose(model(ids).logits[..., :512], before, atol=1e-6)
    assert torch.allclose(model.get_input_embeddings().weight[512], model.get_input_embeddings().weight[:512].mean(0))


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(UserError, match="fp16 does not work on a CPU"):
        resolve_dtype("fp16", CPU)
