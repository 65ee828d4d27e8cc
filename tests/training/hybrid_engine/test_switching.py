"""Train, switch, generate: the same tokens for every ZeRO stage, tensor-parallel degree and number of ranks, and the
same weights as without a switch."""

import itertools
import json

import pytest
import torch

from tests.ranks import run_ranks
from tests.training.hybrid_engine.test_reallocation import MicroBatch, batch, gathered, whole_weights

SIZES = (1, 2, 4)
STAGES = (0, 1, 2, 3)
FAMILIES = ("opt", "llama", "gpt2", "bloom lora")
END, PAD, SAMPLES = 2, 1, 11
SWITCHES = 100


def degrees(size):
    return [degree for degree in (1, 2, 4) if size % degree == 0]


def make_engine(ranks, family, stage, dtype=torch.float32):
    from tests.inference.tensor_parallel.families import build, randomise
    from training.hybrid_engine.zero_engine import ZeroEngine
    from training.models.policy import Policy
    from training.role_settings import LoRASettings, OptimizerSettings

    lora = LoRASettings(rank=3 if "lora" in family else 0)
    settings = OptimizerSettings(learning_rate=1e-2, warmup=0, zero_stage=stage, lora=lora, schedule="constant")
    policy = Policy(build(family.split()[0]), lora)
    randomise(policy)
    return ZeroEngine(policy, settings, dtype, SWITCHES, ranks)


def step(ranks, engine, seed):
    """An optimiser step on the same rows on every rank: the mean over ranks is that of one process."""
    same = batch(ranks, seed)
    engine.update([MicroBatch()], lambda _: -engine(same)[0].mean() / ranks.size)


def prompts():
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(4, 101, (1 + i % 6,), generator=generator) for i in range(SAMPLES)]


def generate(ranks, model, layout, slots, greedy=False, tokens=12):
    """Every sample, from the groups that drew them: {index: [tokens, log-probabilities]}."""
    from inference.generation.engine import GenerationEngine
    from inference.generation.sampler import SamplingKey, SamplingSettings

    settings = SamplingSettings(max_tokens=tokens, temperature=0 if greedy else 1.0)
    mine = range(layout.data_rank(ranks.rank), SAMPLES, layout.data)
    drawn = GenerationEngine(model, END, PAD, slots).generate(
        [prompts()[i] for i in mine], settings, SamplingKey(5), list(mine)
    )
    share = {sample.index: [sample.response_ids, sample.logprobs] for sample in drawn}
    shares = ranks.gather(share)
    for group in layout.tensor_groups:  # the ranks of a group drew the same, to the bit
        assert all(shares[rank] == shares[group[0]] for rank in group)
    return {index: found for share in shares for index, found in share.items()}


def plain_logprobs(family, engine, samples):
    """Of plain transformers, one sample at a time, for the weights that the engine has now."""
    from tests.inference.tensor_parallel.families import build
    from training.models.policy import add_lora
    from training.role_settings import LoRASettings

    weights = whole_weights(engine.language_model)
    model = build(family.split()[0])
    if "lora" in family:
        add_lora(model, LoRASettings(rank=3))
    model.load_state_dict({name: weight.float() for name, weight in weights.items()}, strict=False)
    found = {}
    for index, (tokens, _) in samples.items():
        ids = torch.cat([prompts()[index], torch.tensor(tokens)])
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        first = len(prompts()[index]) - 1
        rows = logits[first : first + len(tokens)]
        found[index] = [rows.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist(), rows.argmax(-1).tolist()]
    return found


def generate_everywhere(ranks, directory):
    from training.hybrid_engine.layout import Layout
    from training.hybrid_engine.reallocation import Reallocation, tensor_parallel_of

    layouts = {degree: Layout.over(ranks.size, degree) for degree in degrees(ranks.size)}
    parts = {degree: tensor_parallel_of(layout) for degree, layout in layouts.items()}
    results = {}
    for family, stage in itertools.product(FAMILIES, STAGES):
        engine = make_engine(ranks, family, stage)
        for seed in (1, 2):
            step(ranks, engine, seed)
        for degree, layout in layouts.items():
            trained = Layout.over(ranks.size, zero_stage=stage)
            model = Reallocation(engine.language_model, trained, layout, parts[degree], ranks).run()
            results[f"{family} zero{stage} tp{degree}"] = generate(ranks, model, layout, slots=2 + 3 * degree)
        if stage == ranks.size % 4:  # one stage for each number of ranks
            greedy = generate(ranks, model, layout, slots=4, greedy=True)  # of the highest degree
            results[f"{family} greedy"] = [greedy, plain_logprobs(family, engine, greedy)]
    return results


def switch_a_hundred_times(ranks, directory):
    from training.hybrid_engine.layout import Layout
    from training.hybrid_engine.reallocation import Reallocation, tensor_parallel_of

    layout = Layout.over(2, 2)
    part = tensor_parallel_of(layout)
    results = {}
    for dtype, stage in ((torch.float32, 3), (torch.bfloat16, 2)):
        switching, straight = make_engine(ranks, "llama", stage, dtype), make_engine(ranks, "llama", stage, dtype)
        trained = Layout.over(2, zero_stage=stage)
        reallocation = Reallocation(switching.language_model, trained, layout, part, ranks)
        equal = 0
        for number in range(SWITCHES):
            for engine in (switching, straight):
                step(ranks, engine, number)
            model = reallocation.run()
            generate(ranks, model, layout, slots=SAMPLES, tokens=2)
            wholes = whole_weights(switching.language_model)
            joined = gathered(ranks, reallocation.weights, wholes)
            equal += all(torch.equal(joined[name], whole) for name, whole in wholes.items())
        final = whole_weights(straight.language_model)
        results[str(dtype)] = [equal, all(torch.equal(wholes[name], whole) for name, whole in final.items())]
    return results


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory):
    directory = tmp_path_factory.mktemp("switching")
    return {size: run_ranks(__file__, "generate_everywhere", size, directory)[0] for size in SIZES}


def test_sampled_tokens_do_not_depend_on_ranks_stages_or_degrees(everywhere):
    for family in FAMILIES:
        base = everywhere[1][f"{family} zero0 tp1"]
        assert len(base) == SAMPLES and len({len(tokens) for tokens, _ in base.values()}) > 1
        for size, stage in itertools.product(SIZES, STAGES):
            for degree in degrees(size):
                name = f"{family} zero{stage} tp{degree}"
                found = everywhere[size][name]
                assert found.keys() == base.keys(), (size, name)  # none dropped where ranks have unequal numbers
                for index, (tokens, logprobs) in base.items():
                    assert found[index][0] == tokens, (size, name, index)
                    assert found[index][1] == pytest.approx(logprobs, abs=1e-4), (size, name, index)


def test_greedy_tokens_and_logprobs_are_those_of_plain_transformers(everywhere):
    for size, family in itertools.product(SIZES, FAMILIES):
        drawn, plain = everywhere[size][f"{family} greedy"]
        for index, (tokens, logprobs) in drawn.items():
            assert tokens == plain[index][1], (size, family, index)
            assert logprobs == pytest.approx(plain[index][0], abs=1e-5), (size, family, index)


def test_a_hundred_switches_leave_no_trace(tmp_path):
    for found in run_ranks(__file__, "switch_a_hundred_times", 2, tmp_path):
        assert json.dumps(found) == json.dumps({name: [SWITCHES, True] for name in found}) and len(found) == 2
