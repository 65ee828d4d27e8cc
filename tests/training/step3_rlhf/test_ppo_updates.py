"""PPO.update on hand-made experience: one result for ZeRO 0 and 3, any micro-batches, one and two ranks.

That result is the one of a second implementation: plain models, one sample at a time, no padding, torch's AdamW.
"""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from tests.ranks import run_ranks

ZERO_STAGES, RANKS_OF_LORA, BUDGETS = (0, 3), (0, 4), (32, 10_000)
SAMPLES, SEED, NUMBER, RATE, CLIPPING = 9, 3, 1, 1e-3, 0.5
EPOCHS, MINI_BATCHES = 2, 2
SHIFT, SCALE = 0.3, 1.5
KL_COEFFICIENT, TEMPERATURE = 0.1, 0.8
CLIP, VALUE_CLIP = 0.2, 0.3


def case_name(zero_stage: int, lora: int, budget: int) -> str:
    return f"zero{zero_stage} lora{lora} budget{budget}"


def make_config(model, zero_stage: int, lora: int, budget: int):
    from training.config import RunConfig
    from training.rlhf_settings import RLHFSettings
    from training.role_settings import LoRASettings, OptimizerSettings

    optimizer = OptimizerSettings(
        learning_rate=RATE,
        warmup=0,
        epsilon=1e-5,
        gradient_clipping=CLIPPING,
        zero_stage=zero_stage,
        lora=LoRASettings(rank=lora),
    )
    settings = RLHFSettings(
        prompts_per_iteration=SAMPLES,
        ppo_epochs=EPOCHS,
        mini_batches=MINI_BATCHES,
        micro_batch_tokens=budget,
        temperature=TEMPERATURE,
        clip=CLIP,
        value_clip=VALUE_CLIP,
        actor=optimizer,
        critic=optimizer,
        reference={"zero_stage": zero_stage},
        reward={"zero_stage": zero_stage},
    )
    return RunConfig(model=str(model), seed=SEED, dtype="fp32", rlhf=settings)


def make_models(ranks, directory):
    """The SFT model and a reward model of the tiny kind; their directories."""
    from inference.chat_format import ChatFormat
    from inference.families import build_tiny_model
    from training.models.loading import load_scorer, save_model
    from training.role_settings import LoRASettings

    sft, reward = directory / f"sft{ranks.size}", directory / f"reward{ranks.size}"
    if ranks.is_first:
        build_tiny_model(sft)
        chat_format = ChatFormat.load(sft)
        torch.manual_seed(1)
        scorer = load_scorer(sft, chat_format, torch.float32)
        extra = {"score_shift": SHIFT, "score_scale": SCALE}
        save_model(reward, scorer, chat_format, {}, LoRASettings(), torch.float32, extra)
    ranks.barrier()
    return sft, reward, ChatFormat.load(sft)


def make_experience(sft):
    """Samples of 1 to 12 response tokens, with old log-probabilities near those of the actor, values near nothing."""
    from transformers import AutoModelForCausalLM

    from training.step3_rlhf.experience import Experience

    model = AutoModelForCausalLM.from_pretrained(sft)
    generator = torch.Generator().manual_seed(SEED)

    def tokens(shortest: int, longest: int) -> torch.Tensor:
        length = int(torch.randint(shortest, longest, (1,), generator=generator))
        return torch.randint(5, 200, (length,), generator=generator)

    def noise(length: int, size: float) -> torch.Tensor:
        return size * torch.randn(length, generator=generator)

    experience = []
    for index in range(SAMPLES):
        prompt, response = tokens(2, 20), tokens(1, 13)
        with torch.no_grad():
            logprobs = logprobs_by_hand(model, prompt, response)
        length = len(response)
        experience.append(
            Experience(
                index=index,
                prompt=prompt,
                response=response,
                generation_logprobs=logprobs,
                ended=index % 3 > 0,
                logprobs=logprobs + noise(length, 0.2),  # a ratio far enough from 1 that clipping acts on some tokens
                reference_logprobs=logprobs + noise(length, 0.2),
                values=noise(length, 0.5),
                score=float(noise(1, 2.0)),
            )
        )
    return experience


def batch_of(experience, targets, kl_coefficient: float):
    from training.step3_rlhf.update import Batch

    return Batch(NUMBER, experience, targets, list(range(len(experience))), kl_coefficient)


def logprobs_by_hand(
    model, prompt: torch.Tensor, response: torch.Tensor, temperature: float = TEMPERATURE
) -> torch.Tensor:
    logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1] / temperature
    return logits[torch.arange(len(response)), response] - logits.exp().sum(-1).log()


@torch.no_grad()
def entropy_by_hand(model, prompt: torch.Tensor, response: torch.Tensor) -> float:
    """Summed over the response."""
    logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
    chances = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return -float((chances * chances.log()).sum())


def update_by_hand(sft, reward, experience, targets) -> dict:
    """The same updates by the formulas, a sample at a time."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    actor = AutoModelForCausalLM.from_pretrained(sft)
    critic = AutoModelForSequenceClassification.from_pretrained(reward)
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), RATE, (0.9, 0.95), 1e-5, weight_decay=0)
        for name, model in (("actor", actor), ("critic", critic))
    }
    sums, clips, seen, norms, made = {"actor": 0.0, "critic": 0.0}, {"actor": 0, "critic": 0}, 0, {}, 0

    means = dict.fromkeys(("policy/ratio_mean", "kl/old_k1", "kl/old_k3", "policy/entropy"), 0.0)

    def actor_loss(row: int) -> torch.Tensor:
        e, length = experience[row], len(experience[row].response)
        logratio = logprobs_by_hand(actor, e.prompt, e.response) - e.logprobs
        ratio = logratio.exp()
        advantages = targets.advantages[row, :length]
        clips["actor"] += int(((ratio < 1 - CLIP) | (ratio > 1 + CLIP)).sum())
        means["policy/ratio_mean"] += float(ratio.sum())
        means["kl/old_k1"] -= float(logratio.sum())
        means["kl/old_k3"] += float((ratio - 1 - logratio).sum())
        means["policy/entropy"] += entropy_by_hand(actor, e.prompt, e.response)
        return -torch.minimum(ratio * advantages, ratio.clip(1 - CLIP, 1 + CLIP) * advantages).sum()

    def critic_loss(row: int) -> torch.Tensor:
        e, length = experience[row], len(experience[row].response)
        hidden = critic.model(torch.cat([e.prompt, e.response])[None]).last_hidden_state[0, len(e.prompt) - 1 : -1]
        values = (critic.score(hidden)[:, 0] - SHIFT) / SCALE
        returns = targets.returns[row, :length]
        clipped = torch.clip(
            values, e.values - VALUE_CLIP, e.values + VALUE_CLIP
        )  # is `values` itself inside the range
        clips["critic"] += int(((clipped - returns) ** 2 > (values - returns) ** 2).sum())
        return torch.maximum((values - returns) ** 2, (clipped - returns) ** 2).sum() / 2

    for epoch in range(EPOCHS):
        order = list(range(SAMPLES))
        random.Random(f"{SEED}/samples/{NUMBER}/{epoch}").shuffle(order)
        for place in range(MINI_BATCHES):
            chosen = order[place::MINI_BATCHES]
            tokens = sum(len(experience[row].response) for row in chosen)
            for name, model, loss in (("actor", actor, actor_loss), ("critic", critic, critic_loss)):
                optimizers[name].param_groups[0]["lr"] = RATE * (1 - made / (EPOCHS * MINI_BATCHES))
                optimizers[name].zero_grad()
                total = sum(loss(row) for row in chosen)
                (total / tokens).backward()
                norms[name] = float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING))
                optimizers[name].step()
                sums[name] += float(total.detach())
            seen += tokens
            made += 1
    return {
        "actor": {name: weight.detach() for name, weight in actor.named_parameters()},
        "critic": {name: weight.detach() for name, weight in critic.named_parameters()},
        "metrics": {
            **{name: value / seen for name, value in means.items()},
            "policy/loss": sums["actor"] / seen,
            "value/loss": sums["critic"] / seen,
            "policy/clip_fraction": clips["actor"] / seen,
            "value/clip_fraction": clips["critic"] / seen,
            "policy/grad_norm": norms["actor"],
            "value/grad_norm": norms["critic"],
        },
    }


def stage_of(config, ranks, directory):
    """What a trainer needs that only updates; data of the run lie in `directory`."""
    from training.metrics import NullJournal
    from training.run_directory import StepDirectory
    from training.steps import PPO

    return SimpleNamespace(
        config=config,
        seed=config.seed,
        ranks=ranks,
        dtype=torch.float32,
        display=SimpleNamespace(say=print),
        run=SimpleNamespace(data=directory),
        directory=StepDirectory(directory, PPO),
        journal=lambda name: NullJournal(),
    )


def update_everywhere(ranks, directory):
    """All cases in one process group; weights go into a file of the first rank, the rest is returned by case."""
    from training.step3_rlhf.experience import Targets, token_batch
    from training.step3_rlhf.ppo import PPO
    from training.step3_rlhf.roles import Roles

    sft, reward, chat_format = make_models(ranks, directory)
    experience = make_experience(sft)
    weights, results = {}, {}
    for case in itertools.product(ZERO_STAGES, RANKS_OF_LORA, BUDGETS):
        stage = stage_of(make_config(sft, *case), ranks, directory)
        targets = Targets.of(experience, stage.config.rlhf, KL_COEFFICIENT)
        torch.manual_seed(0)  # adapters begin at random
        roles = Roles(stage, sft, reward, chat_format, (EPOCHS * MINI_BATCHES, EPOCHS * MINI_BATCHES))
        ppo = PPO(stage, roles, chat_format, [], [])
        batch = token_batch(experience, ranks.device)

        def look(roles=roles, batch=batch):
            scored = {role: roles.score(role, [batch])[0] for role in ("critic", "reference", "reward")}
            return {name: values.tolist() for name, values in {"actor": roles.logprobs([batch])[0], **scored}.items()}

        before = look()
        metrics = ppo.updates.run(batch_of(experience, targets, KL_COEFFICIENT)).metrics
        results[case_name(*case)] = {"before": before, "after": look(), "metrics": metrics}
        weights[case_name(*case)] = {
            "actor": roles.actor.trained_weights(),
            "critic": roles.critic.trained_weights(),
        }
    if ranks.is_first:
        if ranks.size == 1:
            weights["by hand"] = update_by_hand(sft, reward, experience, targets)
            plain = [logprobs_by_hand_of(sft, e).tolist() for e in experience]
            weights["by hand"]["reference"] = list(itertools.chain(*plain))
        torch.save(weights, directory / f"weights{ranks.size}.pt")
    return results


@torch.no_grad()
def logprobs_by_hand_of(sft, experience) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(sft)
    return logprobs_by_hand(model, experience.prompt, experience.response)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """`results` and `weights` by number of ranks, `second` of the second rank, `by hand`."""
    directory = tmp_path_factory.mktemp("updates")
    one = run_ranks(__file__, "update_everywhere", 1, directory)[0]
    two = run_ranks(__file__, "update_everywhere", 2, directory)
    weights = {size: torch.load(directory / f"weights{size}.pt") for size in (1, 2)}
    by_hand = weights[1].pop("by hand")
    return SimpleNamespace(results={1: one, 2: two[0]}, second=two[1], weights=weights, by_hand=by_hand)


def assert_same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], what: str) -> None:
    assert ours.keys() == theirs.keys() and ours, what
    for name, weight in ours.items():
        # 1e-6 is a thousandth of what one update moves a weight
        torch.testing.assert_close(
            weight, theirs[name], rtol=1e-5, atol=1e-6, msg=lambda said, name=name: f"{what}, {name}: {said}"
        )


@pytest.mark.parametrize("role", ["actor", "critic"])
@pytest.mark.parametrize("lora", RANKS_OF_LORA)
def test_weights_do_not_depend_on_zero_micro_batches_or_ranks(outcome, role, lora):
    base = outcome.weights[1][case_name(0, lora, 10_000)][role]
    for size, zero_stage, budget in itertools.product((1, 2), ZERO_STAGES, BUDGETS):
        name = case_name(zero_stage, lora, budget)
        assert_same_weights(outcome.weights[size][name][role], base, f"{role}, {name}, {size} ranks")


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_weights_are_those_of_the_second_implementation(outcome, role):
    assert_same_weights(outcome.weights[1][case_name(0, 0, 10_000)][role], outcome.by_hand[role], role)


def test_losses_clip_fractions_and_gradient_norms_are_those_of_the_second_implementation(outcome):
    metrics = outcome.results[1][case_name(0, 0, 10_000)]["metrics"]
    for name, value in outcome.by_hand["metrics"].items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_metrics_do_not_depend_on_zero_micro_batches_or_ranks(outcome):
    for lora in RANKS_OF_LORA:
        base = outcome.results[1][case_name(0, lora, 10_000)]["metrics"]
        assert 0 < base["policy/clip_fraction"] < 1 and 0 < base["value/clip_fraction"] < 1
        for size, zero_stage, budget in itertools.product((1, 2), ZERO_STAGES, BUDGETS):
            name = case_name(zero_stage, lora, budget)
            assert outcome.results[size][name]["metrics"] == pytest.approx(base, rel=1e-4, abs=1e-6), (size, name)


def test_both_ranks_report_the_same(outcome):
    for name, result in outcome.results[2].items():
        assert outcome.second[name]["metrics"] == pytest.approx(result["metrics"], rel=1e-12)


def test_the_update_moves_actor_and_critic_and_nothing_else(outcome):
    """With adapters the reference is the actor without them; without, a model of its own."""
    for size, results in outcome.results.items():
        for name, result in results.items():
            before, after = (
                {call: torch.tensor(values) for call, values in result[when].items()} for when in ("before", "after")
            )
            assert torch.equal(after["reference"], before["reference"]), (size, name)
            assert torch.equal(after["reward"], before["reward"]), (size, name)
            assert (after["actor"] - before["actor"]).abs().mean() > 1e-3, (size, name)
            assert (after["critic"] - before["critic"]).abs().mean() > 1e-3, (size, name)


def test_the_reference_is_the_sft_model_and_the_critic_begins_as_the_reward_model(outcome):
    for size, results in outcome.results.items():
        base = results[case_name(0, 0, 10_000)]["before"]
        for name, result in results.items():
            before = result["before"]
            assert before["reference"] == pytest.approx(outcome.by_hand["reference"], abs=1e-5), (size, name)
            assert before["actor"] == pytest.approx(before["reference"], abs=1e-6), (size, name)
            assert before["reward"] == pytest.approx(base["reward"], abs=1e-5), (size, name)
            assert before["critic"] == pytest.approx(base["critic"], abs=1e-5), (size, name)
