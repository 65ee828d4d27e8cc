"""Our side of the comparison with TRL's trainers does the work that is said, and the table reads what was measured."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import against_trl, work
from benchmarks.against_trl import FORMS, MENDED, Piece, Work
from benchmarks.work import Lengths, Size
from tests.ranks import run_ranks

LENGTHS = Lengths(longest=5, spread=0.0)


def work_of_each(ranks, directory):
    """What each method did in one iteration; called in a process of its own."""
    from benchmarks import our_ppo, our_supervised

    work.build_models(directory / "models", Size(hidden=32, layers=2, heads=4, ffn=64))
    work.models = lambda size: work.Models(directory / "models" / "actor", directory / "models" / "reward")
    found = {}
    for advantage, mini_batches, kl in (("grpo", 4, 0.05), ("rloo", 1, 0.0)):
        more = our_ppo.in_groups(advantage, mini_batches, kl)
        config = our_ppo.make_config("tiny", LENGTHS, "fp32", "fp32", iterations=1, threads=1, **more)
        ppo = our_ppo.make_ppo(config, LENGTHS, directory / advantage, ranks)
        did = our_ppo.iterate(ppo, 0, LENGTHS)
        found[advantage] = [
            did["tokens"],
            ppo.roles.actor.engine.global_steps,
            "reference_score" in ppo.roles.plan.assignments,
        ]
    for method in ("sft", "dpo"):
        config = our_supervised.make_config(method, "tiny", "fp32", "fp32", threads=1)
        task = our_supervised.make_task(method, config, directory / method, ranks, updates=2)
        did = our_supervised.step(task, 0)
        found[method] = [did["tokens"], task.engine.engine.global_steps, did["loss"]]
    found["second dpo"] = our_supervised.step(task, 1)["loss"]
    return found


def test_ours_does_the_work(tmp_path):
    """Tokens, optimiser steps, whether there is a reference; SFT's loss is that of plain transformers, row by row."""
    found = run_ranks(__file__, "work_of_each", 1, tmp_path)[0]
    assert found["grpo"] == [32 * 5, 4, True]
    assert found["rloo"] == [32 * 5, 1, False]
    assert found["dpo"] == [8448, 1, pytest.approx(math.log(2), abs=1e-4)]
    assert found["second dpo"] < math.log(2) - 1e-4  # the reference is the model as it was
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "actor").eval()
    total = 0.0
    with torch.inference_mode():
        for prompt, response in work.demonstrations():
            logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
            total += float(torch.nn.functional.cross_entropy(logits, response, reduction="sum"))
    tokens = sum(len(response) for _, response in work.demonstrations())
    assert found["sft"] == [8448, 1, pytest.approx(total / tokens, abs=1e-4)]


def test_rows_mix_lengths_and_pairs_share_their_prompts():
    rows = [torch.cat(row) for row in work.demonstrations()]
    assert sorted(map(len, rows)) == list(range(16, 513, 16))
    assert all((row == work.END_ID).sum() == 1 and row[-1] == work.END_ID for row in rows)
    of_pairs = [torch.cat([prompt, answer]) for prompt, *answers in work.pairs() for answer in answers]
    assert [len(row) for row in of_pairs] == [len(row) for row in rows]
    assert all(len(prompt) * 4 <= len(prompt) + len(chosen) for prompt, chosen, _ in work.pairs())


def test_every_piece_names_forms_that_there_are_and_is_measured_once():
    wanted = [(piece.work, form) for piece in against_trl.pieces() for form in piece.forms]
    assert len(set(wanted)) == len(wanted)
    assert {form.removesuffix(MENDED) for _, form in wanted} == {*FORMS, against_trl.FLOOR}


def row(seconds: float, **more: float) -> dict[str, float]:
    phases = dict.fromkeys(("generate", "score", "train"), seconds / 3)
    return {**phases, "total": seconds, "others": 0.0, "peak_gb": 1.0, "tokens": 7, "loss": 2.0, **more}


def test_the_table_has_the_fastest_mended_form_the_fastest_shipped_one_and_the_default():
    piece = Piece(Work("sft"), ("as it comes", "packed", "as it comes, mended", "packed, mended"))
    seconds = {"ours fp32": 1.0, "as it comes": 4.0, "packed": 3.0, "as it comes, mended": 2.5, "packed, mended": 2.0}
    rows = {name: [row(each)] * 3 for name, each in seconds.items()}
    against_trl.require_same_work(piece, rows)
    lines = against_trl.table(json.loads(json.dumps(against_trl.compare(piece, rows, [])))).splitlines()
    cells = [cell.strip().split(" (")[0] for cell in lines[2].strip("|").split("|")]
    assert cells == ["sft fp32", "1.00", "**2.00**", "**3.00**", "**4.00**", "-"]
    assert "packed" in lines[2].split("|")[3] and "mended" not in lines[2]


@pytest.mark.parametrize("other", [{"tokens": 8}, {"loss": 2.1}])
def test_other_work_is_not_compared(other):
    piece = Piece(Work("sft"), ("packed",))
    with pytest.raises(AssertionError, match="packed ha"):
        against_trl.require_same_work(piece, {"ours fp32": [row(1.0)], "packed": [row(2.0, **other)]})
