"""Options of the update, each on real engines against a second implementation: policy losses, PTX, the end by KL."""

import hashlib
import itertools
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.ranks import run_ranks
from tests.training.step3_rlhf.test_ppo_updates import (
    RATE,
    SEED,
    batch_of,
    logprobs_by_hand,
    make_config,
    make_experience,
    make_models,
    stage_of,
)

GROUP, COEFFICIENT, PTX = 3, 0.5, 2.0
DEMONSTRATIONS = [
    ("What is it?", "A house by the sea."),
    ("And then?", "Nothing."),
    ("Who?", "Somebody else, I think."),
]


def change(config, **settings):
    """The config with other settings of step 3, checked."""
    from training.config import RunConfig
    from training.merging import merge

    return RunConfig.model_validate(merge(config.model_dump(), {"rlhf": settings}))


def make_ppo(ranks, directory, config, models):
    from training.data.rows import write_rows
    from training.step3_rlhf.ppo import PPO
    from training.step3_rlhf.roles import Roles

    sft, reward, chat_format = models
    if ranks.is_first:
        rows = [{"prompt": [{"role": "user", "content": p}], "response": r} for p, r in DEMONSTRATIONS]
        write_rows(directory / "sft_train.jsonl", rows)
    ranks.barrier()
    stage = stage_of(config, ranks, directory)
    torch.manual_seed(0)
    roles = Roles(stage, sft, reward if config.rlhf.has_critic else None, chat_format, (100, 100))
    return PPO(stage, roles, chat_format, [], [])


def critic_free(settings: dict) -> dict:
    return {
        "samples_per_prompt": GROUP,
        "prompts_per_iteration": 3,
        "mini_batches": 1,
        "ppo_epochs": 1,
        "advantage": "grpo",
        "reward_weights": {"model": 0},
        "reward_function": "unused.py:f",
        "actor": {"schedule": "constant", "gradient_clipping": 0},
        **settings,
    }


CASES: dict[str, dict] = {
    "grpo": {},
    "ptx": {"ptx": {"coefficient": PTX, "rows": 2}, "ppo_epochs": 2},
    "dapo": {"clip_high": 0.35, "mask_truncated": True},
    "dr_grpo": {"advantage": "dr_grpo", "loss_mean": "constant"},
    "sequence": {"loss_mean": "sequence"},
    "gspo": {"ratio": "sequence", "loss_mean": "sequence", "clip": 0.03, "clip_high": 0.05},
}


def make_case(name: str, stage: int) -> dict:
    actor = {"schedule": "constant", "gradient_clipping": 0, "zero_stage": stage}
    return critic_free({"actor": actor, **CASES[name]})


def update_with_options(ranks, directory):
    from training import rewards
    from training.step3_rlhf.experience import Targets

    rewards.Rewards.__init__ = lambda self, *_: None  # the experience is scored already
    models = make_models(ranks, directory)
    experience = make_experience(models[0])
    weights, metrics = {}, {}
    for name, stage in itertools.product(CASES, (0, 3)):
        base = make_config(models[0], stage, 0, 40)
        config = change(base, **make_case(name, stage))
        ppo = make_ppo(ranks, directory, config, models)
        assert [*ppo.roles._engines] == ["actor"] and "reward" not in ppo.roles._scoring
        targets = Targets.of(experience, config.rlhf, COEFFICIENT)
        metrics[f"{name} {stage}"] = ppo.updates.run(batch_of(experience, targets, COEFFICIENT)).metrics
        weights[f"{name} {stage}"] = ppo.roles.actor.trained_weights()
    if ranks.is_first:
        torch.save(weights, directory / "options.pt")
        torch.save({name: by_hand(models, experience, name) for name in CASES}, directory / "hand.pt")
    stops = {}
    for bound in (0.0, 1e-3):
        plain = change(make_config(models[0], 0, 0, 40), ppo_epochs=4, ppo_kl_stop=bound, actor={"learning_rate": 3e-3})
        ppo = make_ppo(ranks, directory, plain, models)
        # as in a run: the ratio is 1 before the first update
        fresh = [replace(each, logprobs=each.generation_logprobs) for each in experience]
        targets = Targets.of(fresh, plain.rlhf, COEFFICIENT)
        stops[bound] = vars(ppo.updates.run(batch_of(fresh, targets, COEFFICIENT)))
    return {
        "metrics": metrics,
        "stops": stops,
        "offload": offloaded_scores(ranks, models, experience),
        "truncated": updates_without_truncated(ranks, directory, models, experience),
    }


def updates_without_truncated(ranks, directory, models, experience) -> list:
    """Six of nine samples ended, or one, or none: updates that mask the others, and such as never saw them. Metrics and
    weights of each, and the weights before."""
    from training.step3_rlhf.experience import Targets

    found = []
    for ended in ([each.index for each in experience if each.ended], [4], []):
        seen = [replace(each, ended=each.index in ended) for each in experience]
        for masked, given in ((True, seen), (False, [each for each in seen if each.ended])):
            config = change(make_config(models[0], 0, 0, 40), whiten_advantages=False, mask_truncated=masked)
            ppo = make_ppo(ranks, directory, config, models)
            before = fingerprints(ppo)
            if given:
                update = ppo.updates.run(batch_of(given, Targets.of(given, config.rlhf, COEFFICIENT), COEFFICIENT))
                found.append([update.metrics, fingerprints(ppo), before])
    return found


def fingerprints(ppo) -> list[str]:
    """Of the weights of actor and critic, to the bit; the first rank has them."""
    roles = [engine.trained_weights() for engine in (ppo.roles.actor, ppo.roles.critic)]
    return [hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights.values())).hexdigest() for weights in roles]


@torch.no_grad()
def offloaded_scores(ranks, models, experience) -> list[list[float]]:
    """Log-probabilities of a frozen model: whole, divided, divided and kept in main memory."""
    from training.hybrid_engine.stored_weights import freeze
    from training.models.loading import load_causal_lm
    from training.models.policy import Policy
    from training.role_settings import FrozenSettings
    from training.step3_rlhf.experience import token_batch

    sft, _, chat_format = models
    places = [{}, {"zero_stage": 3}, {"zero_stage": 3, "offload": "parameters"}]
    found = []
    for place in places:
        model = Policy(load_causal_lm(sft, chat_format, torch.float32))
        frozen = freeze(model, FrozenSettings(**place), torch.float32, ranks)
        for _ in range(2):  # it is used again and again
            logprobs = frozen(token_batch(experience, ranks.device))[0]
        found.append(logprobs.tolist())
    return found


def by_hand(models, experience, name: str) -> dict[str, torch.Tensor]:
    """The weights after the update, a sample at a time."""
    from transformers import AutoModelForCausalLM

    sft, _, chat_format = models
    actor = AutoModelForCausalLM.from_pretrained(sft)
    optimizer = torch.optim.AdamW(actor.parameters(), RATE, (0.9, 0.95), 1e-5, weight_decay=0)
    advantages = []
    for first in range(0, len(experience), GROUP):
        scores = torch.tensor([score_by_hand(each) for each in experience[first : first + GROUP]])
        deviation = 1 if name == "dr_grpo" else scores.std() + 1e-4
        advantages += ((scores - scores.mean()) / deviation).tolist()
    order = list(range(len(DEMONSTRATIONS)))
    seen = []
    for epoch in range(2):
        random.Random(f"{SEED}/demonstrations/{epoch}").shuffle(shuffled := list(order))
        seen += shuffled
    for update in range(2 if name == "ptx" else 1):
        loss = torch.tensor(0.0)
        low, high = {"dapo": (0.2, 0.35), "gspo": (0.03, 0.05)}.get(name, (0.2, 0.2))
        learned = [each.ended or name != "dapo" for each in experience]
        tokens = sum(len(each.response) for each, counts in zip(experience, learned, strict=True) if counts)
        for each, advantage, counts in zip(experience, advantages, learned, strict=True):
            logprobs, length = logprobs_by_hand(actor, each.prompt, each.response), len(each.response)
            ratios = (logprobs - each.logprobs).exp()
            away = each.reference_logprobs - logprobs
            penalties = COEFFICIENT * (away.exp() - 1 - away)
            if name == "gspo":
                whole = ratios.prod() ** (1 / length)
                share = penalties.mean() - torch.minimum(whole * advantage, whole.clip(1 - low, 1 + high) * advantage)
                loss = loss + share / len(experience)
                continue
            for ratio, penalty in zip(ratios, penalties, strict=True):
                term = penalty - torch.minimum(ratio * advantage, ratio.clip(1 - low, 1 + high) * advantage)
                if name == "sequence":
                    loss = loss + term / length / len(experience)
                elif name == "dr_grpo":
                    loss = loss + term / 256 / len(experience)  # data.max_response_tokens
                elif counts:
                    loss = loss + term / tokens
        if name == "ptx":
            likelihood, demonstrated = torch.tensor(0.0), 0
            for row in seen[2 * update : 2 * update + 2]:
                prompt, response = DEMONSTRATIONS[row]
                prompt = torch.tensor(chat_format.prompt_ids([{"role": "user", "content": prompt}]))
                response = torch.tensor(chat_format.response_ids(response))
                likelihood = likelihood + logprobs_by_hand(actor, prompt, response, temperature=1.0).sum()
                demonstrated += len(response)
            loss = loss - PTX * likelihood / demonstrated
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {key: weight.detach() for key, weight in actor.named_parameters()}


def score_by_hand(each) -> float:
    return each.score - (0 if each.ended else 1)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    directory = tmp_path_factory.mktemp("options")
    results = run_ranks(__file__, "update_with_options", 2, directory)[0]
    weights, by_hand = (torch.load(directory / name) for name in ("options.pt", "hand.pt"))
    return SimpleNamespace(**results, weights=weights, by_hand=by_hand)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stage", [0, 3])
def test_the_weights_are_those_of_the_second_implementation(outcome, case, stage):
    ours = outcome.weights[f"{case} {stage}"]
    assert ours.keys() == outcome.by_hand[case].keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, outcome.by_hand[case][name], rtol=1e-5, atol=2e-6, msg=f"{case} {name}")


def test_demonstrations_change_what_is_learned(outcome):
    grpo, ptx = outcome.by_hand["grpo"], outcome.by_hand["ptx"]
    assert max(float((grpo[name] - ptx[name]).abs().max()) for name in grpo) > RATE / 2
    metrics = outcome.metrics
    assert metrics["ptx 0"]["ptx/loss"] > 1 and "ptx/loss" not in metrics["grpo 0"]
    assert metrics["ptx 0"]["ptx/loss"] == pytest.approx(metrics["ptx 3"]["ptx/loss"], rel=1e-5)


def test_each_policy_loss_learns_something_else(outcome):
    for one, other in itertools.combinations(outcome.by_hand, 2):
        ours, theirs = outcome.by_hand[one], outcome.by_hand[other]
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) > RATE / 2, (one, other)
    clipped = [outcome.metrics[f"{name} 0"]["policy/clip_fraction"] for name in ("grpo", "dapo", "gspo")]
    assert all(0 < each < 1 for each in clipped) and clipped[1] < clipped[0]


def test_truncated_samples_are_as_if_they_had_never_been(outcome):
    six, never_six, one, never_one, none = outcome.truncated
    assert six[:2] == never_six[:2] and one[:2] == never_one[:2]
    assert [metrics["update/mini_batches"] for metrics, *_ in outcome.truncated] == [4, 4, 2, 2, 0]
    for _, after, before in (six, one):
        assert not set(after) & set(before)
    assert none[1] == none[2] and none[0] == {"update/mini_batches": 0}


def test_without_a_critic_nothing_is_said_of_one(outcome):
    assert not [name for name in outcome.metrics["grpo 3"] if name.startswith("value/")]


def test_four_epochs_end_where_the_policy_has_left_the_old_one(outcome):
    free, bound = outcome.stops["0.0"], outcome.stops["0.001"]
    assert len(free["mini_batches"]) == free["metrics"]["update/mini_batches"] == 8
    kls = [each["kl/old_k3"] for each in bound["mini_batches"]]
    assert 1 < len(kls) < 8 and max(kls[:-1]) <= 1e-3 < kls[-1]
    assert bound["metrics"]["kl/old_k3_max"] == kls[-1]
    assert bound["metrics"]["policy/ratio_max"] < free["metrics"]["policy/ratio_max"]


def test_a_frozen_role_scores_alike_wherever_its_weights_lie(outcome):
    whole, divided, offloaded = outcome.offload
    assert divided == pytest.approx(whole, abs=1e-6) and offloaded == pytest.approx(whole, abs=1e-6)


def test_offload_of_a_frozen_role_asks_deepspeed_for_main_memory():
    from training.deepspeed_config import deepspeed_config
    from training.role_settings import FrozenSettings

    for offload, expected in (("none", None), ("parameters", "cpu")):
        settings = FrozenSettings(zero_stage=3, offload=offload).as_optimizer
        zero = deepspeed_config(settings, torch.bfloat16, trained=False)["zero_optimization"]
        assert zero.get("offload_param", {}).get("device") == expected


def test_each_mini_batch_is_reported(outcome):
    free = outcome.stops["0.0"]
    rows = free["mini_batches"]
    assert [(row["epoch"], row["mini_batch"]) for row in rows] == list(itertools.product(range(4), range(2)))
    assert rows[0]["kl/old_k3"] == pytest.approx(0, abs=1e-6) and rows[0]["policy/clip_fraction"] == 0
    assert free["metrics"]["policy/ratio_max"] == max(row["policy/ratio_max"] for row in rows)
    assert free["metrics"]["kl/old_k3_max"] == max(row["kl/old_k3"] for row in rows) > 0
