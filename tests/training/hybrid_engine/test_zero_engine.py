"""One engine for ZeRO 0-3, fp32 and bf16, whole weights and adapters, one and two ranks: the same training."""

import itertools

import pytest
import torch

from tests.ranks import run_ranks

STAGES, RANKS_OF_LORA, BUDGETS = (0, 1, 2, 3), (0, 4), (10_000, 60)
UPDATES = 3


def make_rows(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def tokens(longest: int) -> torch.Tensor:
        length = int(torch.randint(2, longest, (1,), generator=generator))
        return torch.randint(5, 200, (length,), generator=generator)

    return [(tokens(20), tokens(20)) for _ in range(count)]


def train_everywhere(ranks, directory):
    """The matrix inside one process group: {case: {losses, grad_norms, weights}}."""
    from inference.chat_format import ChatFormat
    from inference.families import build_tiny_model
    from training.data.batching import TokenBatch, plan_micro_batches
    from training.hybrid_engine.zero_engine import ZeroEngine
    from training.models.loading import load_causal_lm
    from training.models.policy import Policy
    from training.role_settings import LoRASettings, OptimizerSettings

    model = directory / f"tiny{ranks.size}"
    if ranks.is_first:
        build_tiny_model(model)
    ranks.barrier()
    chat_format = ChatFormat.load(model)
    rows = make_rows(11)  # odd: two ranks get unequal numbers, and one of them a micro-batch of weight 0
    lengths = [len(prompt) + len(response) for prompt, response in rows]
    tokens = sum(len(response) for _, response in rows)
    results = {}
    for dtype, stage, rank, budget in itertools.product(("fp32", "bf16"), STAGES, RANKS_OF_LORA, BUDGETS):
        torch.manual_seed(0)
        lora = LoRASettings(rank=rank)
        settings = OptimizerSettings(
            learning_rate=1e-2, warmup=0, zero_stage=stage, lora=lora, gradient_clipping=0.5, epsilon=1e-5
        )
        policy = Policy(load_causal_lm(model, chat_format, torch.float32), lora)
        kind = torch.float32 if dtype == "fp32" else torch.bfloat16
        engine = ZeroEngine(policy, settings, kind, 10, ranks)
        losses, norms = [], []
        for _ in range(UPDATES):
            seen = []

            def loss(micro_batch, engine=engine, seen=seen):
                batch = TokenBatch.of([rows[i] for i in micro_batch.rows], ranks.device)
                share = -engine(batch)[0].sum() / tokens
                seen.append(float(share) * micro_batch.weight)
                return share

            update = engine.update(plan_micro_batches(lengths, budget, ranks.size)[ranks.rank], loss)
            losses.append(ranks.sum_values({"loss": sum(seen)})["loss"])
            norms.append(update["grad_norm"])
        weights = {name: float(w.double().norm()) for name, w in engine.trained_weights().items()}
        results[f"{dtype} zero{stage} lora{rank} budget{budget}"] = {"losses": losses, "norms": norms, "w": weights}
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("engine")
    one = run_ranks(__file__, "train_everywhere", 1, directory)[0]
    two = run_ranks(__file__, "train_everywhere", 2, directory)
    return {1: one, 2: two[0], "second": two[1]}


def test_fp32_training_does_not_depend_on_stage_micro_batches_or_ranks(results):
    for rank in RANKS_OF_LORA:
        base = results[1][f"fp32 zero0 lora{rank} budget10000"]
        for size, stage, budget in itertools.product((1, 2), STAGES, BUDGETS):
            other = results[size][f"fp32 zero{stage} lora{rank} budget{budget}"]
            assert other["losses"] == pytest.approx(base["losses"], rel=1e-5)
            assert other["norms"] == pytest.approx(base["norms"], rel=1e-5)
            assert other["w"] == pytest.approx(base["w"], rel=1e-5, abs=1e-6)


def test_bf16_training_follows_fp32(results):
    for size, stage, rank, budget in itertools.product((1, 2), STAGES, RANKS_OF_LORA, BUDGETS):
        exact = results[1][f"fp32 zero0 lora{rank} budget10000"]
        rounded = results[size][f"bf16 zero{stage} lora{rank} budget{budget}"]
        assert rounded["losses"] == pytest.approx(exact["losses"], rel=5e-3)


def test_training_learns_and_both_ranks_agree(results):
    for name, result in results[2].items():
        assert result["losses"][-1] < result["losses"][0] - 0.1, name
        assert result["losses"] == results["second"][name]["losses"]
        assert not results["second"][name]["w"]  # the first rank alone holds whole weights


def test_adapters_alone_are_trained(results):
    names = results[1]["fp32 zero0 lora4 budget10000"]["w"]
    assert names and all("lora_" in name for name in names)
