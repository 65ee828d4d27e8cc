"""Engines on parts of the ranks train as if these were all ranks, bit for bit: disjoint and overlapping ones."""

import copy
import functools
import itertools

import pytest
import torch

from tests.ranks import run_ranks
from tests.training.hybrid_engine.test_zero_engine import make_rows

LEFT, RIGHT, ALONE = (0, 2), (1, 2), (1,)
BESIDE = [(0, RIGHT), (1, RIGHT), (2, RIGHT), (3, RIGHT), (3, ALONE)]
"""ZeRO stage of both engines, and the mesh of the one beside LEFT."""
ROWS = {LEFT: (11, 5), RIGHT: (7, 3), ALONE: (7, 3)}
"""Of the updates before and after a checkpoint."""


@functools.cache
def load(directory):
    from inference.chat_format import ChatFormat
    from training.models.loading import load_causal_lm

    return load_causal_lm(directory, ChatFormat.load(directory), torch.float32)


def make_engine(ranks, model, stage: int):
    from training.hybrid_engine.zero_engine import ZeroEngine
    from training.models.policy import Policy
    from training.role_settings import OptimizerSettings

    settings = OptimizerSettings(learning_rate=1e-2, warmup=0, zero_stage=stage, gradient_clipping=0.5)
    policy = Policy(copy.deepcopy(load(model)))
    return ZeroEngine(policy, settings, torch.float32, 10, ranks)


def update(engine, ranks, count: int) -> float:
    from training.data.batching import TokenBatch, plan_micro_batches

    rows = make_rows(count)
    tokens = sum(len(response) for _, response in rows)

    def loss(micro_batch):
        batch = TokenBatch.of([rows[i] for i in micro_batch.rows], ranks.device)
        return -engine(batch)[0].sum() / tokens

    lengths = [len(prompt) + len(response) for prompt, response in rows]
    return engine.update(plan_micro_batches(lengths, 60, ranks.size)[ranks.rank], loss)["grad_norm"]


def digest(engine) -> list[str]:
    import hashlib

    return [hashlib.sha256(w.numpy().tobytes()).hexdigest() for w in engine.trained_weights().values()]


def found(engine, directory, before: int, after: int) -> dict:
    """What an engine does: an update, a checkpoint, another update, back to the checkpoint, the same update."""
    norms, weights = [update(engine, engine.ranks, before)], [digest(engine)]
    engine.save(directory)
    for is_back in (False, True):
        if is_back:
            engine.load(directory)
        norms.append(update(engine, engine.ranks, after))
        weights.append(digest(engine))
    return {"norms": norms, "weights": weights}


def train_on_parts(ranks, directory):
    """Three ranks, two engines at a time."""
    results = {}
    parts = {mesh: ranks.part(mesh) for mesh in (LEFT, RIGHT, ALONE)}
    for stage, other in BESIDE:
        engines = [
            (mesh, make_engine(part, directory / "tiny", stage)) for mesh in (LEFT, other) if (part := parts[mesh])
        ]
        for mesh, engine in engines:
            name = f"zero{stage} {mesh} of {LEFT} {other}"
            results[name] = found(engine, directory / name, *ROWS[mesh])
    results["met"] = ranks.sum_values({"ranks": 1.0})["ranks"]
    return results


def train_alone(ranks, directory):
    results = {}
    for stage, mesh in itertools.product((0, 1, 2, 3), (LEFT, RIGHT, ALONE)):
        if ranks.size == len(mesh) and (mesh == LEFT or (stage, mesh) in BESIDE):
            name = f"zero{stage} {mesh}"
            results[name] = found(make_engine(ranks, directory / "tiny", stage), directory / name, *ROWS[mesh])
    return results


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    from inference.families import build_tiny_model

    directory = tmp_path_factory.mktemp("meshes")
    build_tiny_model(directory / "tiny")
    return directory


def test_a_part_of_the_ranks_trains_as_if_it_were_all(directory):
    parts = run_ranks(__file__, "train_on_parts", 3, directory)
    alone = {size: run_ranks(__file__, "train_alone", size, directory) for size in (1, 2)}
    assert all(part["met"] == 3 for part in parts)
    for stage, other in BESIDE:
        for mesh in (LEFT, other):
            for place, rank in enumerate(mesh):
                ours = parts[rank][f"zero{stage} {mesh} of {LEFT} {other}"]
                assert ours == alone[len(mesh)][place][f"zero{stage} {mesh}"], (stage, mesh, rank)
                assert ours["norms"][1] == ours["norms"][2] and ours["weights"][1] == ours["weights"][2]
