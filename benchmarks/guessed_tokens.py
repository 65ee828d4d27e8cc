"""What guessing the next tokens can give: one pass checks several, and keeps them as far as the sampler draws the same.

    python -m benchmarks.guessed_tokens answers answers.json --prompts runs/demo/data/prompts_eval.jsonl \
        --policies runs/demo/step1_sft/model runs/demo/step3_rlhf/model
    python -m benchmarks.guessed_tokens costs costs.json
    python -m benchmarks.guessed_tokens report answers.json costs.json --out benchmarks/results/guessed_tokens.json

`answers` draws real answers: those of SmolLM2-135M-Instruct to openings of dialogues, eight to a prompt in each of
two iterations, and those of a run's models to its held-out prompts, with the same random numbers. `costs` times
passes over one and more tokens a row (`guessed_passes.py`). `report` replays the answers (`guessed_replay.py`): draws
are a function of (seed, iteration, sample, position), so guesses change none of them.
"""

import argparse
import functools
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from benchmarks.guessed_passes import (
    GUESSES,
    INSTRUCT,
    ROWS,
    RUN_TEMPERATURE,
    SLOTS,
    TEMPERATURES,
    draw_answers,
    measure_costs,
)
from benchmarks.guessed_replay import Answer, FromNGrams, FromSameDraws, Guesser, Pass, replay
from benchmarks.ppo_iteration import machine
from benchmarks.work import LENGTHS
from training.run_directory import versions, write_json

FEW_ROWS = 4


class Costs:
    """Seconds of passes of a model, between the sizes that were timed. Other work only adds to a time, so a pass takes
    at most what one over as many rows or more, and tokens, took."""

    def __init__(self, timed: Iterable[dict[str, Any]]):
        self.of_rows: defaultdict[int, dict[int, float]] = defaultdict(dict)
        rows = list(timed)
        for row in rows:
            larger = [r["seconds"] for r in rows if r["rows"] >= row["rows"] and r["guesses"] >= row["guesses"]]
            self.of_rows[row["rows"]][1 + row["guesses"]] = min(larger)

    def seconds(self, rows: int, tokens: float) -> float:
        """Of a pass over so many tokens a row."""
        at = [numpy.interp(tokens, list(each), list(each.values())) for each in self.of_rows.values()]
        return float(numpy.interp(rows, list(self.of_rows), at))

    def of(self, passes: Iterable[Pass]) -> float:
        return sum(self.seconds(each.rows, each.computed / each.rows) for each in passes)


@dataclass(frozen=True)
class Kept:
    """What guesses gave, for each number of them that is tried: tokens kept and computed, a row of a pass."""

    kept: dict[int, float]
    computed: dict[int, float]

    def gain(self, costs: Costs, rows: int) -> tuple[float, int]:
        """How many times faster so many rows grow with the best number of guesses, and that number; at least 1, with
        none."""
        plain = costs.seconds(rows, 1)
        gains = [(self.kept[k] * plain / costs.seconds(rows, self.computed[k]), k) for k in self.kept]
        return max([(1.0, 0), *gains])


def kept_of(answers: Sequence[Answer], make: Callable[[], Guesser]) -> Kept:
    kept, computed = {}, {}
    for count in GUESSES:
        passes = replay(answers, make(), SLOTS, lambda rows, count=count: count)
        rows = sum(each.rows for each in passes)
        kept[count], computed[count] = (sum(getattr(p, name) for p in passes) / rows for name in ("kept", "computed"))
    return Kept(kept, computed)


def guessers(before: Sequence[Answer]) -> dict[str, Callable[[], Guesser]]:
    """By what they learn from; `before` are the answers of earlier iterations."""
    return {
        "its prompt and itself": lambda: FromNGrams(lambda answer: answer.index, prompts=True),
        "the group": lambda: FromNGrams(lambda answer: answer.group),
        "the group, and the iteration before": lambda: FromNGrams(lambda answer: answer.group, before=before),
        "all answers so far": lambda: FromNGrams(lambda answer: 0, before=before),
    }


def cases_of(sets: Sequence[dict[str, Any]]) -> Iterable[tuple[str, float, list[Answer], Callable[[], Guesser]]]:
    """What is guessed from, the temperature, the answers, what makes the guesser."""
    read = defaultdict[tuple[str, float], list[list[Answer]]](list)
    for each in sets:
        read[each["policy"], each["temperature"]].append([Answer(**answer) for answer in each["answers"]])
    for temperature in TEMPERATURES:
        *before, answers = read.get((INSTRUCT, temperature), [[]])
        for name, make in guessers(list(itertools.chain(*before))).items():
            yield name, temperature, answers, make
    policies = [policy for policy, _ in read if policy != INSTRUCT]
    for number, (one, other) in enumerate(itertools.pairwise(policies), 1):
        (before,), (answers,) = read[one, RUN_TEMPERATURE], read[other, RUN_TEMPERATURE]
        name = f"policy {number}'s answers, same numbers, to policy {number + 1}'s"
        yield name, RUN_TEMPERATURE, answers, lambda before=before: FromSameDraws(before)


def figures(sets: Sequence[dict[str, Any]], costs: dict[str, Costs]) -> list[dict[str, Any]]:
    """A line for each case: tokens kept a pass, by guesses; by model and rows the gain, and over the whole."""
    found = []
    for name, temperature, answers, make in cases_of(sets):
        if not answers:
            continue
        kept = kept_of(answers, make)
        row = {"from": name, "temperature": temperature, "kept": kept.kept, "computed": kept.computed, "gain": {}}
        for model, cost in costs.items():
            of_rows = {rows: kept.gain(cost, rows) for rows in ROWS}
            plain = replay(answers, make(), SLOTS, lambda rows: 0)
            best = functools.cache(lambda rows, kept=kept, cost=cost: kept.gain(cost, rows)[1])
            guessed = replay(answers, make(), SLOTS, best)
            tail = LENGTHS["tail512"].of(0)
            of_tail = [(cost.seconds(rows, 1), kept.gain(cost, rows)[0]) for rows in running(tail)]
            row["gain"][model] = {
                **of_rows,
                "whole": cost.of(plain) / cost.of(guessed),
                "tail512": sum(seconds for seconds, _ in of_tail) / sum(seconds / gain for seconds, gain in of_tail),
            }
        found.append(row | {"answers": len(answers), "tokens": sum(len(answer.tokens) for answer in answers)})
    return found


def running(lengths: Sequence[int]) -> list[int]:
    """Rows of each decode step, where all samples have a slot; the first token comes with the prefill."""
    return [sum(length > place for length in lengths) for place in range(1, max(lengths))]


def show(rows: Sequence[dict[str, Any]], costs: dict[str, Costs]) -> None:
    print("| a pass, times a decode step | " + " | ".join(f"{k} guessed" for k in GUESSES) + " | step, ms |")
    print("|---" * (len(GUESSES) + 2) + "|")
    for (model, cost), size in itertools.product(costs.items(), ROWS):
        plain = cost.seconds(size, 1)
        ratios = " | ".join(f"{cost.seconds(size, 1 + k) / plain:.2f}" for k in GUESSES)
        print(f"| {model}, {size} rows | {ratios} | {plain * 1e3:.2f} |")
    print("\n| tokens a pass, guessed from | temperature | " + " | ".join(f"{k} guessed" for k in GUESSES) + " |")
    print("|---" * (len(GUESSES) + 2) + "|")
    for row in rows:
        print(
            f"| {row['from']} | {row['temperature']} | " + " | ".join(f"{v:.2f}" for v in row["kept"].values()) + " |"
        )
    for model, cost in costs.items():
        steps = [(size, cost.seconds(size, 1)) for size in running(LENGTHS["tail512"].of(0))]
        share = sum(seconds for size, seconds in steps if size <= FEW_ROWS) / sum(seconds for _, seconds in steps)
        print(f"\n{model}: {share:.0%} of the decoding of tail512 has at most {FEW_ROWS} rows. Times as fast:\n")
        print("| guessed from | temperature | " + " | ".join(f"{size} rows" for size in ROWS) + " | whole | tail512 |")
        print("|---" * (len(ROWS) + 4) + "|")
        for row in rows:
            gain = row["gain"][model]
            of_rows = " | ".join(f"{gain[size][0]:.2f}" for size in ROWS)
            print(f"| {row['from']} | {row['temperature']} | {of_rows} | {gain['whole']:.2f} | {gain['tail512']:.2f} |")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parts = parser.add_subparsers(dest="part", required=True)
    for name in ("answers", "costs", "report"):
        part = parts.add_parser(name)
        for file in ("answers", "costs") if name == "report" else (name,):
            part.add_argument(file, type=Path)
        if name == "answers":
            part.add_argument("--policies", nargs="*", default=[], help="model directories, the earlier first")
            part.add_argument("--prompts", type=Path)
        if name == "costs":
            part.add_argument("--models", nargs="+", default=["s", "m", INSTRUCT])
            part.add_argument("--dtype", nargs="+", default=["fp32", "bf16"])
            part.add_argument("--repeats", type=int, default=5)
        if name == "report":
            part.add_argument("--out", type=Path)
    arguments = parser.parse_args(given)
    torch.set_num_threads(arguments.threads)
    if arguments.part == "answers":
        draw_answers(arguments.answers, arguments.policies, arguments.prompts)
    elif arguments.part == "costs":
        measure_costs(arguments.costs, arguments.models, arguments.dtype, arguments.repeats)
    else:
        timed = json.loads(arguments.costs.read_text(encoding="utf-8"))
        costs = {model: Costs(timed[model]) for model in timed}
        rows = figures(json.loads(arguments.answers.read_text(encoding="utf-8")), costs)
        show(rows, costs)
        if arguments.out:
            write_json(arguments.out, {"machine": machine(), "versions": versions(), "costs": timed, "rows": rows})


if __name__ == "__main__":
    main()
