"""The gate before PPO: the reward model's accuracy on held-out pairs, whoever trained it."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from inference.tensor_parallel.shard import TensorParallel
from training.config_files import load_config
from training.data.token_cache import TokenPair
from training.distributed import Ranks
from training.hybrid_engine.layout import Layout
from training.plan import Assignment
from training.run_directory import RunDirectory, StepDirectory
from training.step3_rlhf.positions import CallPosition
from training.step3_rlhf.watch import look_at_reward_model
from training.steps import REWARD

ONE = Ranks(0, 1, torch.device("cpu"))


class Likes:
    """A reward model that likes the last token, and counts how often it is asked."""

    def __init__(self, sign: float = 1.0):
        self.sign, self.asked = sign, 0

    def scoring(self):
        return nullcontext()

    def present(self, calls):
        return nullcontext()

    def score(self, role, batches) -> list[torch.Tensor]:
        self.asked += len(batches)
        return [self.sign * batch.ids[..., batch.last].flatten().float() for batch in batches]


def look(tmp_path, roles: Likes, pairs: list[tuple[int, int]], *overrides: str, ranks: Ranks = ONE) -> list[str]:
    """What is said of `roles`, where chosen and rejected answers end with these tokens."""
    said: list[str] = []
    data = tmp_path / "data"
    data.mkdir(exist_ok=True)
    rows = [{"prompt": [], "chosen": str(good), "rejected": str(bad)} for good, bad in pairs]
    (data / "pairs_eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def token_pairs(rows: list[dict], chat_format) -> list[TokenPair]:
        return [
            TokenPair(torch.tensor([3]), *(torch.tensor([4, int(row[k])]) for k in ("chosen", "rejected")))
            for row in rows
        ]

    (tmp_path / "step3_rlhf").mkdir(exist_ok=True)
    everywhere = Assignment(Layout.over(ranks.size), micro_batch_limit=4096)
    roles.positions = {"reward_score": CallPosition(everywhere, ranks, TensorParallel(), ranks.rank, ranks)}
    stage = SimpleNamespace(
        config=load_config([], ["model=m", "rlhf.micro_batch_tokens=16", *overrides]),
        ranks=ranks,
        run=RunDirectory(tmp_path),
        directory=StepDirectory(tmp_path / "step3_rlhf", 3),
        display=SimpleNamespace(say=said.append),
        token_pairs=token_pairs,
    )
    look_at_reward_model(stage, roles, None)
    return said


PAIRS = [(9, 5), (5, 9), (9, 5), (8, 5), (9, 6), (7, 7), (9, 5)]
"""Five of seven: a tie is not ranked right."""


def test_the_accuracy_is_said_and_kept_for_later_starts(tmp_path):
    roles = Likes()
    said = look(tmp_path, roles, PAIRS)
    assert said == ["Reward model: 71.4% of 7 held-out pairs ranked right"] and roles.asked > 1
    kept = json.loads((tmp_path / "step3_rlhf" / "reward_accuracy.json").read_text())
    assert kept == {"accuracy": pytest.approx(5 / 7), "pairs": 7}
    roles.asked = 0
    assert look(tmp_path, roles, PAIRS) == said and roles.asked == 0


def test_a_model_that_ranks_upside_down_is_warned_of_and_told_what_to_do(tmp_path):
    (said,) = look(tmp_path, Likes(-1), PAIRS)
    ways = (
        "14.3% of 7",
        "RUN --reward-model MODEL",
        "reward.epochs",
        "more pairs",
        "a larger --reward-model",
        "in a new run",
    )
    assert said.startswith("Warning: ") and all(way in said for way in ways)


@pytest.mark.parametrize(("right", "warned"), [(11, False), (10, True)])  # of 20: 55 % is enough
def test_the_gate_is_at_55_percent(tmp_path, right, warned):
    (said,) = look(tmp_path, Likes(), [(9, 5)] * right + [(5, 9)] * (20 - right))
    assert said.startswith("Warning") == warned


@pytest.mark.parametrize(("own", "asked"), [(True, False), (False, True)])
def test_what_step_2_found_of_its_model_is_not_measured_anew(tmp_path, own, asked):
    """Of a model from elsewhere it knows nothing."""
    step, roles = RunDirectory(tmp_path).step(REWARD), Likes()
    step.model.mkdir(parents=True)
    step.result_file.write_text(json.dumps({"reward_accuracy": {"all": {"rate": 0.625, "pairs": 40}}}))
    given = [] if own else ["trained_reward_model=elsewhere"]
    (said,) = look(tmp_path, roles, PAIRS, *given)
    assert said == f"Reward model: {'62.5% of 40' if own else '71.4% of 7'} held-out pairs ranked right"
    assert bool(roles.asked) == asked


def test_without_pairs_that_is_said(tmp_path):
    (said,) = look(tmp_path, Likes(), [])
    assert "hold out no pairs" in said and said.startswith("Warning: ")


def test_only_as_many_pairs_are_read_as_step_2_evaluates_on(tmp_path):
    assert "100.0% of 1 held-out" in look(tmp_path, Likes(), PAIRS, "reward.eval_rows=1")[0]


def test_without_a_reward_model_nothing_is_measured(tmp_path):
    settings = ["rlhf.reward_weights.model=0", "rlhf.reward_function=a.py:f"]
    assert look(tmp_path, Likes(), PAIRS, *settings) == []


def test_ranks_share_the_pairs_out(tmp_path):
    class Two(SimpleNamespace):
        """Rank 0 or 1 of two; sums are made by the test."""

        size, device = 2, torch.device("cpu")
        is_first = True

        def tell(self, value, phase):
            return value

        def see(self, *places):
            pass

        def sum(self, values):
            counted.append(float(values[0]))
            return values

    counted: list[float] = []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        look(tmp_path / str(rank), Likes(), PAIRS, ranks=Two(rank=rank))
    assert sum(counted) == 5 and max(counted) < 5
