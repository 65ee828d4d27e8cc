"""Decode steps that follow each other without the host, eager here, give what single steps give."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from inspect import signature
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from inference.generation import passes
from inference.generation.engine import GenerationEngine
from inference.generation.passes import MOST_STEPS, Replay, context_bucket, row_bucket
from inference.generation.sampler import Sample, SamplingKey, SamplingSettings
from tests.inference.generation.test_engine import END, KEY, PAD, PROMPTS, build_model, in_order

REAL_GRAPH = torch.cuda.graph
PACKED = ["llama", "opt", "opt-350m", "gpt2", "gpt_neox", "qwen3", "mistral"]
GREEDY = SamplingSettings(max_tokens=20, temperature=0)
DRAWN = SamplingSettings(max_tokens=20, temperature=1.3, top_k=30, top_p=0.9, min_tokens=4)
ENDS = (END, 5)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    """So that samples grow from one into the next."""
    monkeypatch.setattr(passes, "CONTEXT", 8)


def run(engine: GenerationEngine, settings: SamplingSettings, key: SamplingKey = KEY, **options: Any) -> list[Sample]:
    return in_order(engine.generate(PROMPTS, settings, key, **options))


def assert_same(samples: list[Sample], expected: list[Sample]) -> None:
    assert [(s.index, s.response_ids, s.ended) for s in samples] == [
        (s.index, s.response_ids, s.ended) for s in expected
    ]
    for sample, other in zip(samples, expected, strict=True):
        assert sample.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("settings", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("slots", [3, 32])
def test_the_samples_are_those_of_single_steps(family, settings, slots):
    model = build_model(family)
    single, several = (GenerationEngine(model, ENDS, PAD, slots, graphs=on) for on in (False, True))
    expected, samples = run(single, settings), run(several, settings)
    assert_same(samples, expected)
    assert settings == GREEDY or len({len(sample.response_ids) for sample in samples}) > 1
    assert several.stats.response_tokens == single.stats.response_tokens


def test_forced_lengths():
    model = build_model("llama")
    lengths = [5, 1, 9, 20, 3, 7, 2, 4]
    expected, samples = (
        run(GenerationEngine(model, ENDS, PAD, 3, graphs=on), DRAWN, lengths=lengths) for on in (False, True)
    )
    assert [len(sample.response_ids) for sample in samples] == lengths
    assert_same(samples, expected)


def test_cache_and_graphs_that_are_made_for_the_largest_call_stay():
    model = build_model("llama")
    engine = GenerationEngine(model, ENDS, PAD, 6, graphs=True, room=(8, 40))
    list(engine.generate(PROMPTS[:2], GREEDY, KEY))
    cache, replay, stats = engine.cache, engine._replay, engine.stats
    assert (cache.slots, cache.capacity) == (6, 40)
    assert stats.row_steps > 0.5 * stats.slots * stats.decode_steps  # of the slots that two samples need
    samples = run(engine, DRAWN)
    assert engine.cache is cache and engine._replay is replay
    assert_same(samples, run(GenerationEngine(model, ENDS, PAD, 6, graphs=True), DRAWN))


def test_no_run_goes_beyond_a_limit_and_its_work_is_told():
    decoding = GenerationEngine(build_model("llama"), ENDS, PAD, graphs=True).start(
        [Sample(0, PROMPTS[0], 6), Sample(1, PROMPTS[4], 16)], DRAWN, KEY, may_end=False
    )
    works = []
    while not decoding.is_over:
        decoding.step()
        works.append((decoding.work.prefilled, decoding.work.steps, decoding.work.rows, decoding.work.context))
    assert works == [
        (3 + 5, 1, 0, 0),  # the prompts, and a token each
        (0, 5, 2 * 5, (3 + 4 + 5 + 6 + 7) + (5 + 6 + 7 + 8 + 9)),  # up to the first limit
        (0, 8, 8, 10 + 11 + 12 + 13 + 14 + 15 + 16 + 17),
        (0, 2, 2, 18 + 19),
    ]
    stats = decoding.stats
    assert (stats.decode_steps, stats.row_steps, stats.response_tokens) == (15, 20, 6 + 16)


def test_tokens_behind_an_end_are_thrown_away_and_counted_as_work():
    engine = GenerationEngine(build_model("llama"), ENDS, PAD, graphs=True)
    samples = run(engine, DRAWN)
    steps = rows = 0
    left = [len(sample.response_ids) - 1 for sample in samples]  # the first tokens come with the prefill
    limit = DRAWN.max_tokens - 1
    while left := [tokens for tokens in left if tokens > 0]:
        run_length = min(MOST_STEPS, limit - steps)
        steps, rows, left = steps + run_length, rows + run_length * len(left), [t - run_length for t in left]
    assert (engine.stats.decode_steps, engine.stats.row_steps) == (steps, rows)
    assert rows > engine.stats.response_tokens - len(samples) == sum(len(s.response_ids) - 1 for s in samples)


def test_who_streams_gets_each_token_in_turn():
    engine = GenerationEngine(build_model("llama"), ENDS, PAD, graphs=True)
    whole = run(engine, GREEDY)[0]
    lengths = [len(sample.response_ids) for sample in engine.stream(PROMPTS[0], GREEDY, KEY)]
    assert lengths == list(range(1, len(whole.response_ids) + 1))


@pytest.mark.parametrize("giver_graphs", [True, False])
@pytest.mark.parametrize("with_cache", [True, False])
def test_samples_move_to_and_fro(giver_graphs, with_cache):
    model = build_model("llama")
    expected = run(GenerationEngine(model, ENDS, PAD), DRAWN)
    giver, taker = (GenerationEngine(model, ENDS, PAD, 8, graphs=on) for on in (giver_graphs, not giver_graphs))
    halves = [[Sample(i, PROMPTS[i], DRAWN.max_tokens) for i in part] for part in (range(5), range(5, 8))]
    giving, taking = (e.start(half, DRAWN, KEY, room=(8, 40)) for e, half in zip((giver, taker), halves, strict=True))
    for decoding in (giving, taking):
        for most in (1, 3, 2):
            decoding.step(most)
    moved = [sample for sample in giving.unfinished if sample.index in (0, 2, 3)]
    assert moved, "the test needs samples that are still running"
    for sample, kept in zip(moved, giving.take(moved, with_cache), strict=True):
        taking.add(sample, kept)
    for decoding in (giving, taking):
        while not decoding.is_over:
            decoding.step()
    assert_same(halves[0] + halves[1], expected)


class NoHostReads(TorchDispatchMode):
    """Forbids what a graph cannot capture: values read by the host or brought by it, sizes that depend on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "lift_fresh")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} waits for the device"
        if name in ("index", "index_put", "index_put_"):
            assert all(index is None or index.dtype == torch.int64 for index in args[1]), "indexed by truth values"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_in_a_capture(monkeypatch):
    """Every static step runs as it would be captured."""
    step, forbidden = Replay.step, AssertionError("the host reads a tensor")

    def guarded(self: Replay, *inputs: Any) -> None:
        with NoHostReads(), monkeypatch.context() as patched:
            patched.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # transformers looks at it
            for name in ("tolist", "numpy", "cpu"):
                patched.setattr(Tensor, name, lambda tensor: (_ for _ in ()).throw(forbidden))
            step(self, *inputs)

    monkeypatch.setattr(Replay, "step", guarded)


@pytest.mark.parametrize("family", PACKED)
def test_a_step_never_waits_for_the_host(family, as_in_a_capture):
    engine = GenerationEngine(build_model(family), ENDS, PAD, 3, graphs=True)
    for settings in (GREEDY, DRAWN):
        assert len(run(engine, settings)) == len(PROMPTS)
    run(engine, DRAWN, lengths=[3] * len(PROMPTS))


@pytest.mark.parametrize(
    "read", [Tensor.item, bool, Tensor.nonzero, lambda t: t[t > 0], lambda t: t + torch.tensor(2)], ids=range(5)
)
def test_the_guard_sees_what_waits(read):
    tensor = torch.ones(1)
    with pytest.raises(AssertionError), NoHostReads():
        read(tensor)


def test_buckets(monkeypatch):
    assert [row_bucket(rows, 24) for rows in (1, 2, 3, 4, 5, 8, 9, 16, 17, 24)] == [1, 2, 4, 4, 8, 8, 16, 16, 24, 24]
    monkeypatch.setattr(passes, "CONTEXT", 128)
    tokens = [1, 128, 129, 500, 1000, 1024, 1025, 1281, 2048, 2049, 2990]
    expected = [128, 128, 256, 512, 1024, 1024, 1280, 1536, 2048, 2560, 3000]
    assert [context_bucket(n, 3000) for n in tokens] == expected


class Recorded:
    """In place of a CUDA graph: runs the step that was captured, with what was fixed then."""

    def __init__(self, step):
        self.replay = step


@pytest.fixture
def captured(monkeypatch) -> list[Recorded]:
    made: list[Recorded] = []

    def capture(replay: Replay, step) -> Recorded:
        made.append(Recorded(step))
        return made[-1]

    monkeypatch.setattr(passes, "can_capture", lambda device: True)
    monkeypatch.setattr(Replay, "_capture", capture)
    return made


def test_graphs_are_made_once_and_serve_later_calls(captured):
    model = build_model("llama")
    engine, single = (GenerationEngine(model, ENDS, PAD, 3, graphs=on) for on in (True, False))
    run(engine, DRAWN)
    made = len(captured)
    # 1, 2 and 3 rows; 8, 16, 24 and 31 tokens (the longest prompt has 11, a response at most 20)
    assert 3 < made <= 3 * 4
    assert_same(run(engine, DRAWN), run(single, DRAWN))
    assert len(captured) == made
    other = SamplingKey(seed=5, iteration=3)  # of the key nothing is fixed
    assert_same(run(engine, DRAWN, other), run(single, DRAWN, other))
    assert {(key.rows, key.settings) for key in engine._replay.graphs} == {(rows, DRAWN) for rows in (1, 2, 3)}
    run(engine, GREEDY)
    assert {key.settings for key in engine._replay.graphs} == {DRAWN, GREEDY}


def test_graphs_go_when_cache_or_weights_have_moved(captured):
    model = build_model("llama")
    engine = GenerationEngine(model, ENDS, PAD, 3, graphs=True)

    def replay_of(max_tokens: int) -> Replay:
        list(engine.generate(PROMPTS, SamplingSettings(max_tokens), KEY))
        return engine._replay

    first = replay_of(8)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)  # in place, as an optimiser does
    engine.weights_changed()
    assert replay_of(8) is first
    second = replay_of(30)  # does not fit into the first cache
    assert second is not first and second.cache is engine.cache
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    engine.weights_changed()
    assert replay_of(30) is not second


def test_a_capture_changes_nothing_that_was_loaded(monkeypatch):
    """With stand-ins for CUDA that take the arguments which the real ones take."""
    seen: list[Any] = []

    @contextmanager
    def graph(*args: Any, **options: Any) -> Iterator[None]:
        call = signature(REAL_GRAPH).bind(*args, **options).arguments
        seen.append((call["pool"], call["stream"], decoding.replay.state.clone()))
        yield

    stream = Mock()
    for name, stand_in in {
        "CUDAGraph": Mock(),
        "Stream": lambda device: stream,
        "stream": nullcontext,
        "current_stream": lambda device: stream,
        "graph_pool_handle": lambda: (0, 1),
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    samples = [Sample(i, PROMPTS[i], 9) for i in range(2)]
    decoding = GenerationEngine(build_model("llama"), ENDS, PAD, graphs=True).start(samples, GREEDY, KEY)
    decoding.step()
    decoding.step(1)
    replay = decoding.replay
    with torch.inference_mode():
        loaded = replay.state.clone()
        replay._capture(partial(replay.step, 2, 16, decoding.draw))
    ((pool, side, state),) = seen
    assert (pool, side) == ((0, 1), stream)
    assert torch.equal(state, loaded) and loaded[1].tolist() == [3 + 1, 11 + 1]


def test_a_capture_that_fails_is_told_once_and_costs_no_sample(monkeypatch, caplog):
    def refuse(replay: Replay, step) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand much more")

    monkeypatch.setattr(passes, "can_capture", lambda device: True)
    monkeypatch.setattr(Replay, "_capture", refuse)
    model = build_model("llama")
    with caplog.at_level(logging.WARNING):
        samples = run(GenerationEngine(model, ENDS, PAD, 3, graphs=True), DRAWN)
    assert_same(samples, run(GenerationEngine(model, ENDS, PAD, 3), DRAWN))
    (record,) = caplog.records
    assert record.getMessage().endswith("operation not permitted when stream is capturing")


def test_only_packed_models_and_by_default_only_cuda():
    def replay_of(family: str, on: bool | None) -> Replay | None:
        return GenerationEngine(build_model(family), ENDS, PAD, graphs=on).start([], GREEDY, KEY).replay

    assert replay_of("llama", True) is not None
    assert replay_of("llama", False) is None and replay_of("llama", None) is None
    assert replay_of("bloom", True) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures for real: needs CUDA")
@pytest.mark.parametrize("family", PACKED)
def test_captured_steps_give_what_eager_ones_give(family, caplog):
    model = build_model(family).cuda()
    single, several = (GenerationEngine(model, ENDS, PAD, 3, graphs=on) for on in (False, None))
    for settings in (GREEDY, DRAWN):
        for iteration in range(2):
            key = SamplingKey(11, iteration)
            assert_same(run(several, settings, key), run(single, settings, key))
            with torch.no_grad():  # a graph reads the weights that are there when it runs
                model.get_output_embeddings().weight.mul_(-1)
            several.weights_changed()
    assert several._replay is not None and several._replay.captures and len(several._replay.graphs) > 3
    assert not [record for record in caplog.records if record.name == passes.__name__]
