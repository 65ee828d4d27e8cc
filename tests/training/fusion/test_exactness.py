"""Fusion on and off: the same tokens, log-probabilities, rewards and weights, on 1, 2 and 4 ranks."""

from unittest.mock import patch

import pytest
import torch
from transformers import OPTForCausalLM, OPTForSequenceClassification

from benchmarks import work
from benchmarks.work import Lengths, Size
from inference.generation.sampler import SamplingKey
from tests.ranks import run_ranks
from training.fusion import choice
from training.fusion.costs import Costs
from training.rlhf_settings import FusionSettings

LENGTHS = Lengths(longest=64, spread=0.8)  # from 5 tokens on
ITERATIONS = 5
# with 32 samples on 4 instances: 3 instances from 24 on, 2 from 16, 1 from 8
TAIL = {"mode": "inter", "threshold": 24, "rows": 8}
COSTS = Costs(rows=(1, 32), step=(1e-3, 4e-3), per_context=1e-6, prefill=(1e-3, 1e-5), score=(1e-3, 1e-5))
"""In place of measured ones: what moves when follows from them, and with it how sums round."""
WAYS = {
    "none": (FusionSettings(mode="none"), 1),
    "cache": (FusionSettings(**TAIL, move="cache"), 1),
    "tokens": (FusionSettings(**TAIL, move="tokens"), 1),
    "none, tensor-parallel": (FusionSettings(mode="none"), 2),
    "cache, tensor-parallel": (FusionSettings(**TAIL, move="cache"), 2),
}
WAYS_OF_SIZE = {1: ["none", "cache"], 2: ["none", "cache", "tokens"], 4: list(WAYS)}


def build_models(directory):
    """Weights large enough that every token depends on those before it."""
    work.build_models(directory, Size(hidden=32, layers=2, heads=4, ffn=64))
    for name, kind in (("actor", OPTForCausalLM), ("reward", OPTForSequenceClassification)):
        model = kind.from_pretrained(directory / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(8 if parameter.ndim > 1 else 1)
        model.save_pretrained(directory / name)


def numbers_of(e):
    return [e.logprobs.tolist(), e.reference_logprobs.tolist(), e.values.tolist(), e.score]


def iterate_in_all_ways(ranks, directory):
    """Experience of every iteration, weights in the end and what moved, by way; called in processes of its own."""
    from benchmarks import our_ppo
    from training.step3_rlhf.rollout import Rollout

    learn = Rollout.learn
    work.VOCABULARY_SIZE = 256
    if ranks.is_first:
        build_models(directory / "models")
    ranks.barrier()
    work.models = lambda size: work.Models(directory / "models" / "actor", directory / "models" / "reward")
    found = {}
    for way in WAYS_OF_SIZE[ranks.size]:
        fusion, tensor = WAYS[way]
        config = our_ppo.make_config("tiny", LENGTHS, "fp32", "fp32", iterations=ITERATIONS, threads=1)
        config.seed = 16  # no draw of it lies within 1e-6 of the next token; sums that round otherwise move it by 1e-7
        config.rlhf.fusion, config.rlhf.generation_tensor_parallel = fusion, tensor
        config.rlhf.actor.learning_rate = config.rlhf.critic.learning_rate = 1e-4
        ppo = our_ppo.make_ppo(config, LENGTHS, directory / way, ranks)
        seen, reports = [], []

        def watched(rollout, experience, seen=seen, reports=reports):
            seen.append([[e.index, e.response.tolist(), *numbers_of(e)] for e in experience])
            everyone = ranks.gather(rollout.report)
            reports.append(
                [
                    max(r.repackings for r in everyone),
                    *(sum(getattr(r, n) for r in everyone) for n in ("moved", "moved_with_cache")),
                ]
            )
            return learn(rollout, experience)

        known = {"fit": lambda *measured: COSTS, "WRONG": -1.0}  # so the same in every run, however long it takes
        with patch.object(Rollout, "learn", watched), patch.multiple(choice, **known):
            for number in range(1, 1 + (ITERATIONS if tensor == 1 else 2)):
                ppo.iterate(number, check=False)
            ppo.rollouts.forced_lengths = None
            alone = ppo.rollouts.answers([torch.arange(3, 9)], SamplingKey(16, ITERATIONS + 1))
        weights = ppo.roles.actor.trained_weights() | {
            f"critic {name}": tensor for name, tensor in ppo.roles.critic.trained_weights().items()
        }
        torch.save(weights, directory / f"{way}.{ranks.rank}.pt")
        held_out = [[e.response.tolist(), *numbers_of(e)] for e in alone]
        found[way] = {"experience": seen, "reports": reports, "held_out": held_out}
    return found


def flat(weights):
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_fusion_changes_nothing_but_the_time(size, tmp_path):
    found = run_ranks(__file__, "iterate_in_all_ways", size, tmp_path)[0]
    start = OPTForCausalLM.from_pretrained(tmp_path / "models" / "actor").state_dict()
    for way in WAYS_OF_SIZE[size]:
        if "none" in way:
            continue
        plain = "none, tensor-parallel" if "tensor" in way else "none"
        for expected, got in zip(found[plain]["experience"], found[way]["experience"], strict=True):
            assert len(got) == 32
            for (index, tokens, *numbers), (our_index, our_tokens, *our_numbers) in zip(expected, got, strict=True):
                assert (index, tokens) == (our_index, our_tokens)
                for one, other in zip(numbers, our_numbers, strict=True):
                    assert other == pytest.approx(one, abs=1e-5, rel=1e-5)
        ((tokens, *numbers),), ((our_tokens, *our_numbers),) = (found[name]["held_out"] for name in (plain, way))
        assert tokens == our_tokens and len(tokens) > 1  # one prompt in all: what rlhf.eval_every asks of few rows
        for one, other in zip(numbers, our_numbers, strict=True):
            assert other == pytest.approx(one, abs=1e-4, rel=1e-4)
        weights, ours = (torch.load(tmp_path / f"{name}.0.pt") for name in (plain, way))
        for role in ("model", "critic"):  # all weights of a role in one: the gradient of key biases is rounding alone
            whole, our_whole = (flat({n: t for n, t in w.items() if n.startswith(role)}) for w in (weights, ours))
            assert float((our_whole - whole).norm()) <= 1e-5 * float(whole.norm()), role
        trained = {name: tensor for name, tensor in weights.items() if name in start}
        assert float((flat(trained) - flat({name: start[name] for name in trained})).norm()) > 0.01
        instances = size // WAYS[way][1]
        for repackings, samples, with_cache in found[way]["reports"]:
            assert repackings >= {1: 0, 2: 1, 4: 2}[instances]
            assert (samples > 0) == (instances > 1)
            if "cache" in way:
                assert with_cache > samples / 2 or instances == 1
            else:
                assert with_cache == 0
