"""Step 3 by plans that run its calls on parts of the ranks, against every call on all ranks."""

import itertools
from typing import Any

import pytest
import torch

from benchmarks import work
from benchmarks.work import Lengths, Size
from tests.ranks import run_ranks

ITERATIONS = 2
HELD_OUT = [{"prompt": [{"role": "user", "content": f"{'very ' * n}short?"}]} for n in range(3)]
"""Fewer on a rank than in an iteration, of other lengths."""
ALL = {"mesh": "0-1", "data": 2}
ZERO_3 = ALL | {"zero_stage": 3}
FIRST, SECOND = {"mesh": 0}, {"mesh": 1}
TOGETHER = {"mesh": "0-1", "tensor": 2}
CALLS = ("actor_generate", "reference_score", "reward_score", "critic_score", "actor_train", "critic_train")


def plan(*assignments: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Those of CALLS, in their order."""
    return dict(zip(CALLS, assignments, strict=True))


LIMITS = {"micro_batch_limit": 4096}
PLANS: dict[str, dict[str, Any]] = {
    "none": {},
    "all on all": {"plan": plan(ALL | {"micro_batch_limit": 32}, *[ALL | LIMITS] * 5)},
    "side by side": {"plan": plan(ALL, ALL, ALL, ALL, FIRST, SECOND)},
    "generation apart": {
        "plan": plan(SECOND, FIRST, SECOND, SECOND, FIRST, ZERO_3) | {"actor_score": SECOND},
        "old_logprobs": "recompute",
        "ema": 0.5,
    },
    "in parts": {"plan": plan(TOGETHER, TOGETHER, FIRST, TOGETHER, ZERO_3, SECOND | {"micro_batches": 2})},
    "released and waiting": {
        "plan": plan(TOGETHER, ALL | {"offload": True}, ALL | {"offload": True}, ALL, ZERO_3, ALL),
        "release_generation": True,
    },
    "the other way round": {
        "plan": plan(FIRST, ZERO_3, ALL | {"micro_batches": 3}, ZERO_3, SECOND, FIRST),
        "ema": 0.5,
    },
}
ADAPTED: dict[str, dict[str, Any]] = {
    "none": {},
    "apart": {"plan": plan(SECOND, FIRST, FIRST, FIRST, SECOND, FIRST)},
    "the actor is the reference": {"plan": plan(FIRST, SECOND, SECOND, SECOND, SECOND, FIRST)},
}
GROUPED: dict[str, dict[str, Any]] = {
    "none": {},
    "apart": {"plan": {name: block for name, block in plan(SECOND, FIRST, SECOND, {}, FIRST, {}).items() if block}},
}


def make_ppo(ranks, directory, settings: dict[str, Any], dtype: str = "fp32"):
    from benchmarks import our_ppo
    from training.config import RunConfig
    from training.merging import merge

    lengths = Lengths(longest=5, spread=0.5)
    config = our_ppo.make_config("tiny", lengths, dtype, "fp32", iterations=ITERATIONS, threads=1)
    rlhf = {"prompts_per_iteration": 16, "mini_batches": 2, "eval_every": 1, **settings}
    config = RunConfig.model_validate(merge(config.model_dump(), {"processes": ranks.size, "rlhf": rlhf}))
    ppo = our_ppo.make_ppo(config, lengths, directory, ranks)
    ppo.rollouts.forced_lengths = None  # they forbid the end token, so that generation draws from something else
    return ppo


def trained(ppo, role: str) -> dict[str, list[float]]:
    """Flat weights of a role, on the rank that has them."""
    if not ppo.roles.trains(role):
        return {}
    return {name: weight.flatten().tolist() for name, weight in ppo.roles._engines[role].trained_weights().items()}


def follow(ppo, numbers: range, check: bool = False) -> list[Any]:
    """The responses of some iterations and what their updates gave."""
    responses, reward = [], ppo.reward

    def seen(experience, *others):
        responses.append([e.response.tolist() for e in experience])
        return reward(experience, *others)

    ppo.reward = seen
    rows = [ppo.iterate(number, check).mini_batches for number in numbers]
    ppo.reward = reward
    return [responses, rows]


def iterate_by_plans(ranks, directory):
    """By kind and plan: responses, metrics of updates, weights."""
    from inference.chat_format import ChatFormat
    from training.stage import Stage
    from training.step3_rlhf.watch import HeldOut

    work.VOCABULARY_SIZE = 512
    if ranks.is_first:
        work.build_models(directory / "models", Size(hidden=32, layers=2, heads=4, ffn=64))
    ranks.barrier()
    chat_format = ChatFormat.load(directory / "models" / "actor")
    Stage.chat_format = lambda *_: chat_format  # of all of them
    work.models = lambda size: work.Models(directory / "models" / "actor", directory / "models" / "reward")
    lora = {"lora": {"rank": 2}}
    critic_free = {"advantage": "rloo", "samples_per_prompt": 2}
    found, kept, waited, shared = {}, {}, [], []
    for kind, plans, common in (
        ("whole", PLANS, {}),
        ("adapted", ADAPTED, {"actor": lora, "critic": lora}),
        ("grouped", GROUPED, critic_free),
    ):
        for name, settings in plans.items():
            place = directory / f"{kind} {name}"
            ppo = make_ppo(ranks, place, {**common, **settings})
            present = wait(ppo.roles) if "waiting" in name else []
            filled = count_runs(ppo.roles.moves["actor_generate"]) if "actor_score" in ppo.roles.moves else []
            responses, rows = follow(ppo, range(1, ITERATIONS + 1), check=True)
            ema = {} if ppo.roles.ema is None else {n: w.flatten().tolist() for n, w in ppo.roles.ema.weights().items()}
            weights = {role: trained(ppo, role) for role in ("actor", "critic")} | {"ema": ema}
            held_out = HeldOut(ppo.stage, ppo.rollouts, ppo.rewards, chat_format, HELD_OUT).measure()
            del held_out["time/evaluate"]
            found[f"{kind} {name}"] = {"responses": responses, "rows": rows, "weights": weights, "held_out": held_out}
            kept[f"{kind} {name}"] = bytes_to_generate(ppo)
            waited += present
            shared += filled
    resumed = go_on(ranks, directory, RESUMED)
    return {"plans": found, "kept": kept, "present": waited, "shared": shared, "resumed": resumed}


def count_runs(move) -> list[int]:
    """One item, which grows as it goes on: how often weights are brought."""
    runs, run = [0], move.run

    def counted():
        runs[0] += 1
        return run()

    move.run = counted
    return runs


def bytes_to_generate(ppo) -> list[int]:
    """Of keys and values, and of a copy of the weights, while nothing generates."""
    move = ppo.roles.moves.get("actor_generate")
    copy = {} if move is None or move.stays else move.weights
    cache = 0 if ppo.rollouts.engine is None else ppo.rollouts.engine.cache.bytes
    return [cache, sum(weight.untyped_storage().nbytes() for weight in copy.values())]


def wait(roles) -> list[str]:
    """Let the frozen roles wait as on a GPU, whose memory is the host's here. Returns who came and went, as it goes on.

    Outside of its calls a role has no weights.
    """
    from contextlib import contextmanager

    from training.hybrid_engine.stored_weights import WaitingWeights

    events = []

    class Watched(WaitingWeights):
        def __init__(self, role):
            self.role = role
            super().__init__(roles._scoring[role], roles.stage.ranks.device)

        @contextmanager
        def present(self):
            events.append(f"{self.role} comes")
            with super().present():
                yield
            events.append(f"{self.role} goes")

        def _leave(self):
            for held, _ in self.waiting:
                held.data = torch.empty(0)

    roles._frozen_blocked = []
    roles._waiting = {role: Watched(role) for role in ("reference", "reward")}
    return events


RESUMED: dict[str, Any] = {
    **PLANS["the other way round"],
    "kl": {"coefficient": 0.05, "stop": 1e9},
    "ppo_kl_stop": 1e9,
}
"""The actor is on the second rank alone; all ranks meet after each mini-batch, and the model before is kept."""


def go_on(ranks, directory, settings: dict[str, Any]):
    """Iteration 2 of a run, and of one that goes on from a checkpoint after iteration 1; the model that is left."""
    from training.models.loading import load_causal_lm
    from training.step3_rlhf.ppo import save_actor
    from training.steps import SFT

    first = make_ppo(ranks, directory / "resumed", settings)
    follow(first, range(1, 2))
    first.save(1, stopped=False)
    states = []
    second = make_ppo(ranks, directory / "resumed", settings)
    number, stopped = second.resume()
    for ppo in (first, second):
        found = follow(ppo, range(2, 3))
        kept = [tensor.tolist() for tensors in ppo.inside.stored.values() for tensor in tensors]
        ema = {} if ppo.roles.ema is None else {n: w.tolist() for n, w in ppo.roles.ema.weights().items()}
        states.append([found, trained(ppo, "actor"), trained(ppo, "critic"), ema, kept])
    save_actor(second.stage, second.roles, second.stage.earlier_model(SFT), second.chat_format)
    left = {
        name: {
            key: weight.flatten().tolist()
            for key, weight in load_causal_lm(place, second.chat_format, torch.float32).named_parameters()
        }
        for name, place in (("actor", second.stage.directory.model), ("ema", second.stage.directory.ema_model))
    }
    return {"number": number, "stopped": stopped, "states": states, "left": left}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return run_ranks(__file__, "iterate_by_plans", 2, tmp_path_factory.mktemp("plans"))


@pytest.fixture(scope="module")
def outcome(ran):
    return [rank["plans"] for rank in ran]


def weights_of(outcome, name: str, role: str) -> dict[str, torch.Tensor]:
    """On whichever rank they are."""
    found = [rank[name]["weights"][role] for rank in outcome]
    return {key: torch.tensor(value) for key, value in max(found, key=len).items()}


def test_a_plan_with_one_mesh_is_what_runs_without_one_bit_for_bit(outcome):
    for rank in outcome:
        assert rank["whole all on all"] == rank["whole none"]


@pytest.mark.parametrize(
    "name",
    [f"{kind} {n}" for kind, plans in (("whole", PLANS), ("adapted", ADAPTED), ("grouped", GROUPED)) for n in plans],
)
def test_other_plans_learn_the_same(outcome, name):
    first, second = outcome
    kind = name.partition(" ")[0]
    expected = first[f"{kind} none"]
    assert first[name]["responses"] == second[name]["responses"] == expected["responses"]
    assert first[name]["rows"] == second[name]["rows"]
    for rows, others in zip(itertools.chain(*first[name]["rows"]), itertools.chain(*expected["rows"]), strict=True):
        assert rows == pytest.approx(others, rel=1e-3, abs=1e-5)
    assert first[name]["held_out"] == second[name]["held_out"]
    assert first[name]["held_out"] == pytest.approx(expected["held_out"], abs=1e-3)
    for role in ("actor", "critic"):
        ours, theirs = weights_of(outcome, name, role), weights_of(outcome, f"{kind} none", role)
        assert ours.keys() == theirs.keys() and (ours or (kind, role) == ("grouped", "critic"))
        for key, weight in ours.items():
            assert torch.allclose(weight, theirs[key], rtol=0, atol=1e-5), (role, key)


def test_the_average_is_that_of_the_actor_wherever_it_lies(outcome):
    apart, other = (weights_of(outcome, f"whole {n}", "ema") for n in ("generation apart", "the other way round"))
    assert apart and apart.keys() == other.keys()
    actor = weights_of(outcome, "whole none", "actor")
    for key, weight in apart.items():
        assert torch.allclose(weight, other[key], rtol=0, atol=1e-5)
    assert any(not torch.equal(weight, actor[key]) for key, weight in apart.items())


def test_a_run_by_a_plan_goes_on_to_the_same_bits_and_leaves_the_actor_wherever_it_lies(ran):
    first, second = (rank["resumed"] for rank in ran)
    assert first["number"] == second["number"] == 1 and not first["stopped"]
    for rank in (first, second):
        straight, resumed = rank["states"]
        assert straight == resumed
    (_, actor, critic, ema, kept), (_, elsewhere, there, nothing, none) = second["states"][1], first["states"][1]
    assert actor and ema and kept and there and not (critic or elsewhere or nothing or none)
    averages = {key: torch.tensor(weight).flatten().tolist() for key, weight in ema.items()}
    assert first["left"] == {"actor": actor, "ema": averages}


def test_what_generation_keeps_is_given_back_while_training(ran):
    for rank in ran:
        assert rank["kept"]["whole released and waiting"] == [0, 0]
        assert all(rank["kept"]["whole in parts"])  # it generates with a copy too


def test_calls_of_a_role_in_one_cut_share_a_copy(ran):
    assert [rank["shared"] for rank in ran] == [
        [ITERATIONS + 1]
    ] * 2  # of "generation apart": once in each, and to evaluate


def test_roles_that_wait_come_for_their_call_one_at_a_time(ran):
    once = ["reference comes", "reference goes", "reward comes", "reward goes"]
    assert all(rank["present"] == once * (ITERATIONS + 1) for rank in ran)
