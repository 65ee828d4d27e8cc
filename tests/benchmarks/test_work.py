"""The benchmarks' work: published token counts, forced lengths, a floor that computes what `transformers` does."""

import json
import os
import sys
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import work
from benchmarks.floor import Floor, FloorIteration, generate, pack
from benchmarks.ppo_iteration import Comparison
from benchmarks.trl_peer import ForcedLengths
from benchmarks.turns import Failed, System, Worker
from benchmarks.work import END_ID, LENGTHS, PAD_ID, PROMPT_TOKENS, SIZES, Size

TINY = Size(hidden=32, layers=2, heads=4, ffn=64)


@pytest.fixture(scope="module")
def tiny_actor(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    work.build_models(directory, TINY)
    return directory / "actor"


@pytest.mark.parametrize(
    ("name", "tokens", "longest"), [("skew", 1332, 128), ("fixed", 4096, 128), ("tail512", 1990, 424)]
)
def test_lengths_add_up_to_the_published_token_counts(name, tokens, longest):
    first, second = LENGTHS[name].of(0), LENGTHS[name].of(1)
    assert (len(first), sum(first), max(first)) == (32, tokens, longest)
    assert Counter(first) == Counter(second)
    assert first == LENGTHS[name].of(0)
    assert (first != second) == (name != "fixed")


@pytest.mark.parametrize(("name", "millions"), [("s", 5.4), ("m", 29.7)])
def test_sizes_have_the_published_numbers_of_parameters(name, millions):
    from transformers import OPTForCausalLM

    with torch.device("meta"):
        model = OPTForCausalLM(SIZES[name].config())
    parameters = sum(p.numel() for p in model.parameters())
    published = parameters - 512 * SIZES[name].hidden  # counted with 512 positions, run with 1,024
    assert published / 1e6 == pytest.approx(millions, abs=0.05)


def test_models_are_the_same_every_time_and_our_chat_format_leaves_them_as_they_are(tiny_actor, tmp_path):
    from inference.chat_format import ChatFormat

    work.build_models(tmp_path, TINY)
    for name in ("actor", "reward"):
        ours, again = (d / name / "model.safetensors" for d in (tiny_actor.parent, tmp_path))
        assert ours.read_bytes() == again.read_bytes()
    chat_format = ChatFormat.load(tiny_actor)
    assert (chat_format.end_of_turn_id, chat_format.pad_id) == (END_ID, PAD_ID)
    assert chat_format.vocabulary_size == work.VOCABULARY_SIZE


def test_prompts_have_exactly_64_plain_tokens():
    prompts = work.prompts(2)
    assert prompts.shape == (64, PROMPT_TOKENS)
    assert prompts.min() > END_ID
    assert torch.equal(prompts[:32], work.prompts(1))


@pytest.mark.parametrize("lengths", [[9, 9, 9, 9], [9, 1, 6, 3]])
def test_floor_gives_the_logits_of_transformers(tiny_actor, lengths):
    """Packed rows of equal and of different lengths, and a decode step after a prefill."""
    floor = Floor(tiny_actor, TINY, torch.float32, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tiny_actor).eval()
    ids = torch.randint(5, work.VOCABULARY_SIZE, (4, 16))
    prompts, responses = ids[:, :7], [row[7 : 7 + length] for row, length in zip(ids, lengths, strict=True)]
    packed = pack(prompts, responses)
    with torch.inference_mode():
        expected = model(ids).logits
        logits = floor.logits(floor.forward(packed))
        for row, (begin, end) in enumerate(packed.bounds):
            torch.testing.assert_close(logits[begin:end], expected[row, : end - begin], atol=1e-5, rtol=0)
        rows = [torch.arange(6, 6 + length) for length in lengths]
        wanted = torch.cat([expected[r].log_softmax(-1)[at, ids[r, at + 1]] for r, at in enumerate(rows)])
        torch.testing.assert_close(floor.logprobs(packed), wanted, atol=1e-5, rtol=0)

        cache = floor.new_cache(rows=6, positions=20)
        floor.forward(pack(ids[:, :15], [ids[0, :0]] * 4), cache)
        torch.testing.assert_close(floor.decode(ids[:, 15], 15, cache), expected[:, -1], atol=1e-5, rtol=0)


def test_floor_generates_the_forced_lengths_from_the_distribution_of_the_model(tiny_actor):
    """Rows leave the batch and others take their places; each kept log-probability is that of its own row."""
    torch.manual_seed(0)
    floor = Floor(tiny_actor, TINY, torch.float32, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tiny_actor).eval()
    prompts, lengths = torch.randint(5, work.VOCABULARY_SIZE, (6, 5)), [3, 8, 1, 8, 2, 5]
    made = generate(floor, prompts, lengths, floor.new_cache(6, 13))
    assert [len(tokens) for tokens, _ in made] == lengths
    for prompt, (tokens, logprobs) in zip(prompts, made, strict=True):
        assert tokens[-1] == END_ID
        assert END_ID not in tokens[:-1]
        with torch.inference_mode():
            logits = model(torch.cat([prompt, tokens])[None]).logits[0, 4:-1]
            logits[:, END_ID] = -torch.inf
        expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:-1, 0]  # the last one is set, not drawn
        torch.testing.assert_close(logprobs[:-1], expected, atol=1e-5, rtol=0)


def test_the_floor_trains(tiny_actor, monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", TINY)
    monkeypatch.setattr(work, "models", lambda size: work.Models(tiny_actor, tiny_actor.with_name("reward")))
    floor = FloorIteration("tiny", torch.float32, torch.float32, longest=5)
    before = [tensor.detach().clone() for tensor in (*floor.actor.tensors(), *floor.critic.tensors())]
    seconds = floor.iterate(work.prompts(1), [5, 2] * 16, ["gen", "score", "train"])
    assert seconds["tokens"] == 112
    after = [*floor.actor.tensors(), *floor.critic.tensors()]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, floor.reference.tensors(), strict=False))


def test_lengths_are_forced_in_the_generation_of_transformers(tiny_actor):
    """What TRL calls, with a model that would like to end at once."""
    model = AutoModelForCausalLM.from_pretrained(tiny_actor).eval()
    prompts, lengths = work.prompts(1)[:4], [1, 7, 3, 7]

    class Eager(ForcedLengths):
        def __call__(self, input_ids, scores):
            scores[:, END_ID] += 100
            return super().__call__(input_ids, scores)

    whole = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        logits_processor=[Eager(lengths)],
        max_new_tokens=20,
        do_sample=True,
        top_k=0,
    )
    ends = (whole[:, PROMPT_TOKENS:] == END_ID).int().argmax(1) + 1
    assert ends.tolist() == lengths


def rows(seconds: list[float], others: list[float]) -> list[dict[str, float]]:
    return [
        {"generate": s, "score": s, "train": s, "total": 3 * s, "others": o}
        for s, o in zip(seconds, others, strict=True)
    ]


def test_ratios_are_medians_of_pairs_and_disturbed_pairs_do_not_count():
    """Pairs 1/2, 2/2, 4/2 and a disturbed 100/2: the median of all ratios is 0.75, of the quiet ones 1."""
    ours, peer = rows([2, 2, 2, 2], [0, 0, 0, 0.01]), rows([1, 2, 4, 100], [0, 0.01, 0, 0.9])
    calm = Comparison(ours, peer).calm()
    assert (len(calm.ours), calm.disturbed) == (3, 0)
    assert calm.figures()["train"] == {"ours": 2, "peer": 2, "ratio": 1, "lowest": 0.5, "highest": 2}
    noisy = Comparison(ours[:2], peer[2:]).calm()
    assert noisy.disturbed == 1
    assert noisy.figures()["total"]["ratio"] == 26, "with fewer than two quiet pairs all count"


SYSTEM = """
import os
from benchmarks.turns import Channel, serve
channel = Channel()
print("what libraries print is no answer")
serve({"what": os.environ.get("OMP_NUM_THREADS", "unset")}, lambda number: {"total": 10 / number}, channel)
"""


def test_a_system_answers_when_it_is_asked_and_its_end_is_an_error_with_its_log(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    system = System("echo", [sys.executable, "-c", SYSTEM])
    with Worker(system, tmp_path / "log") as worker:
        assert worker.notes == {"what": "unset"}
        answer = worker.iterate(4)
        assert answer["total"] == 2.5
        assert 0.001 < answer["peak_gb"] < 10
        assert 0 <= answer["others"] <= 1
        with pytest.raises(Failed, match="ZeroDivisionError"):
            worker.iterate(0)
    assert "no answer" in (tmp_path / "log").read_text()
    json.dumps(answer)
    assert os.environ["OMP_NUM_THREADS"] == "1"
