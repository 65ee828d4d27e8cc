"""Options of steps 1 and 2 seen at work: dropout, the adapters' learning rate, families that are not packed."""

import json

import pytest
import torch

from tests.ranks import run_ranks
from tests.training.step2_dpo.test_dpo import make_rows

DROPOUT = {"without": [], "with": ["sft.dropout=0.3", "reward.dropout=0.3"]}
HEAD_RATE, ADAPTER_RATE = 1e-3, 1e-2
FAMILIES = {
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
}


def train(ranks, directory):
    from inference.chat_format import ChatFormat
    from inference.families import build_tiny_model

    tiny = directory / "tiny"
    build_tiny_model(tiny)
    return {
        "dropout": {name: losses_of_steps(ranks, directory / name, tiny, extra) for name, extra in DROPOUT.items()},
        "moved": {stage: largest_moves(ranks, tiny, ChatFormat.load(tiny), stage) for stage in range(4)},
        "families": {name: losses_of_family(ranks, name) for name in FAMILIES},
    }


def losses_of_steps(ranks, directory, tiny, extra) -> dict[str, dict[str, float]]:
    """Held-out loss before training and loss of the first update, by step."""
    from training.config_files import load_config
    from training.run_directory import RunDirectory
    from training.stage import make_stage
    from training.step1_sft import sft
    from training.step2_reward import reward
    from training.steps import REWARD, SFT

    run = RunDirectory(directory)
    run.data.mkdir(parents=True)
    pairs = make_rows(8, 1)
    rows = {"pairs": pairs, "sft": [{"prompt": row["prompt"], "response": row["chosen"]} for row in pairs]}
    for kind, some in rows.items():
        for name in ("train", "eval"):
            (run.data / f"{kind}_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (run.data / "counts.json").write_text("{}")
    limits = [f"{step}.{name}=1" for step in ("sft", "reward") for name in ("max_steps", "checkpoint_every")]
    config = load_config([], [f"model={tiny}", "dtype=fp32", *limits, *extra])
    found = {}
    for step, module in ((SFT, sft), (REWARD, reward)):
        run.step(step).path.mkdir()
        module.train(make_stage(run, step, config, ranks))
        lines = [json.loads(line) for line in run.step(step).metrics_file.read_text().splitlines()]
        found[step.folder] = {"held out": lines[0]["eval/loss"], "training": lines[1]["loss"]}
    return found


def one_update(engine, batch) -> float:
    from training.data.batching import MicroBatch

    losses = []

    def loss(_) -> torch.Tensor:
        output = engine(batch)
        total = -output[0].mean() if isinstance(output, tuple) else output.square().mean() + output.mean()
        losses.append(float(total))
        return total

    engine.update([MicroBatch([0])], loss)
    return losses[0]


def token_batch(ranks):
    from training.data.batching import TokenBatch

    generator = torch.Generator().manual_seed(1)
    lengths = [(5, 4), (3, 7), (9, 2)]
    rows = [tuple(torch.randint(5, 90, (length,), generator=generator) for length in pair) for pair in lengths]
    return TokenBatch.of(rows, ranks.device)


def largest_moves(ranks, tiny, chat_format, zero_stage: int) -> dict[str, float]:
    """AdamW's first update moves a weight by its learning rate, whatever the gradient."""
    from training.hybrid_engine.zero_engine import ZeroEngine
    from training.models.loading import load_scorer
    from training.models.policy import Scorer
    from training.role_settings import LoRASettings, OptimizerSettings

    torch.manual_seed(0)
    lora = LoRASettings(rank=4, learning_rate=ADAPTER_RATE)
    settings = OptimizerSettings(learning_rate=HEAD_RATE, warmup=0, zero_stage=zero_stage, lora=lora)
    scorer = Scorer(load_scorer(tiny, chat_format, torch.float32), lora)
    before = {name: p.detach().clone() for name, p in scorer.model.named_parameters() if p.requires_grad}
    engine = ZeroEngine(scorer, settings, torch.float32, 10, ranks)
    one_update(engine, token_batch(ranks))
    moved = {name: float((w - before[name]).abs().max()) for name, w in engine.trained_weights().items()}
    return {kind: max(m for name, m in moved.items() if kind in name) for kind in ("score", "lora_B")}


def losses_of_family(ranks, family: str) -> list[float]:
    """Adapters under ZeRO 3 with recomputed activations, as the presets of large models train."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from training.hybrid_engine.zero_engine import ZeroEngine
    from training.models.policy import Policy
    from training.role_settings import LoRASettings, OptimizerSettings

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=96, **FAMILIES[family]))
    lora = LoRASettings(rank=4)
    settings = OptimizerSettings(learning_rate=1e-2, warmup=0, zero_stage=3, gradient_checkpointing=True, lora=lora)
    engine = ZeroEngine(Policy(model, lora), settings, torch.bfloat16, 10, ranks)
    return [one_update(engine, token_batch(ranks)) for _ in range(5)]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(__file__, "train", 1, tmp_path_factory.mktemp("options"))[0]


@pytest.mark.parametrize("step", ["step1_sft", "step2_reward"])
def test_dropout_acts_in_updates_and_not_in_evaluation(found, step):
    without, dropped = (found["dropout"][name][step] for name in DROPOUT)
    assert without["training"] == pytest.approx(without["held out"], rel=1e-5)  # the same rows
    assert dropped["held out"] == without["held out"]
    assert abs(dropped["training"] - without["training"]) > 1e-3


@pytest.mark.parametrize("zero_stage", "0123")
def test_adapters_and_score_head_have_rates_of_their_own(found, zero_stage):
    moved = found["moved"][zero_stage]
    assert moved["score"] == pytest.approx(HEAD_RATE, rel=0.01)
    assert moved["lora_B"] == pytest.approx(ADAPTER_RATE, rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_are_not_packed_learn_under_zero_3(found, family):
    losses = found["families"][family]
    assert losses[-1] < losses[0] - 0.02 and all(map(float, losses))
