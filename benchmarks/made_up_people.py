"""Two made-up persons with known tastes judge, the next round learns from each: does the new model please them more?

    python -m benchmarks.made_up_people runs/demo --out benchmarks/results/made_up_people.json
    python -m benchmarks.made_up_people runs/demo --method dpo --set dpo.epochs=4

The newest model of the run answers its own training prompts twice. Each person judges pairs of answers by one rule,
skips those that are alike by it, and `rlhf-chat run --go-on` goes on from the run with that person's preferences.
Both models then answer the run's held-out prompts, on which the person judges again, a tie counting half. Preferences
and rounds lie in runs/made-up-NAME.
Prints Markdown. Exit code 1 where a person does not prefer the new model, or a guard rail is broken.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from applications.prefer import find_model, suggestions
from benchmarks.ppo_iteration import machine
from inference.chat_model import ChatModel
from inference.generation.engine import GenerationEngine
from inference.generation.sampler import OwnDraw, OwnSample, SamplingKey, SamplingSettings
from inference.preferences import Answer, BlindPair, PreferenceFile, Winner, new_seed
from training.data.rows import read_rows
from training.data.split import choose_groups
from training.evaluation.comparison import win_rate
from training.evaluation.statistics import guard_signs
from training.run_directory import RunDirectory, versions, write_json

TARGET = 0.65
"""Share of held-out prompts on which a person is to prefer the new model."""
LEAST_WORDS = 3
"""Of a whole answer."""
SLOTS = 32
"""Answers that are written at the same time."""


def short_but_whole(text: str) -> float:
    """The fewer words the better, as long as it is a sentence with its end."""
    words = len(text.split())
    return -words if words >= LEAST_WORDS and re.search(r"[.!?…][\"')]*$", text.strip()) else float("-inf")


def asks_back(text: str) -> float:
    """Whether it ends in a question."""
    return float(text.strip().endswith("?"))


@dataclass(frozen=True)
class Person:
    name: str
    taste: str
    score: Callable[[str], float]

    def choose(self, pair: BlindPair) -> Winner | None:
        """None where the person skips the pair."""
        left, right = self.score(pair.left.text), self.score(pair.right.text)
        return None if left == right else "a" if left > right else "b"


PEOPLE = (
    Person("ann", "short but whole answers", short_but_whole),
    Person("bob", "answers that end in a question", asks_back),
)


def draw_pairs(run: RunDirectory) -> Iterator[BlindPair]:
    """Two different answers of the run's newest model to each of its training prompts, as `prefer` draws them."""
    newest, config = find_model(run.path, "", trusts=False), run.read_config()
    model = ChatModel.load(newest.directory)
    settings = SamplingSettings(config.data.max_response_tokens, config.rlhf.temperature)
    engine = GenerationEngine(model.model, model.format.end_ids, model.pad_id, SLOTS, graphs=False)
    prompts = suggestions(run, [])
    while asked := list(islice(prompts, SLOTS * 4)):
        seeds = [(new_seed(), new_seed()) for _ in asked]
        texts = answers(model, engine, asked, seeds, settings)
        for prompt, both, of_both in zip(asked, seeds, texts, strict=True):
            one, other = (Answer(newest.label, *each) for each in zip(of_both, both, strict=True))
            pair = BlindPair.of(prompt, one, other, settings.temperature, settings.max_tokens)
            if not pair.teaches_nothing:
                yield pair


def answers(
    model: ChatModel,
    engine: GenerationEngine,
    prompts: list[Any],
    seeds: list[tuple[int, int]],
    settings: SamplingSettings,
) -> Iterator[tuple[str, str]]:
    """Those of each prompt with each of its two seeds; the tokens that `ChatModel.reply` would give."""
    samples = []
    for prompt, both in zip(prompts, seeds, strict=True):
        ids = torch.tensor(model.prompt(prompt, settings).ids)
        samples += [
            OwnSample(0, ids, settings.max_tokens, settings=settings, key=SamplingKey(seed, 0)) for seed in both
        ]
    decoding = engine.start_with(OwnDraw(engine.end_ids), list(samples))
    while not decoding.is_over:
        decoding.step(1)
    texts = [model.format.decode(sample.response_ids) for sample in samples]
    return zip(texts[::2], texts[1::2], strict=True)


def one_round(run: RunDirectory, person: Person, file: PreferenceFile, name: str, options: list[str]) -> dict[str, Any]:
    """Train on the person's preferences, then let them judge both models' answers to the held-out prompts."""
    path = Path("runs") / name
    command = [sys.executable, "-m", "rlhf_chat", "run", "--from", str(run.path), "--go-on", "--data", str(file.path)]
    subprocess.run([*command, "--name", str(path), *options], check=True)
    made = RunDirectory(path)
    evaluation = made.read_comparison(made.last_step) or {}
    rows = read_rows(made.comparison_of(made.last_step)[1])
    before, after = evaluation["pair"]
    scores = tuple([person.score(row[key]) for row in rows] for key in (before, after))
    questions = list(map(choose_groups(rows), rows))  # type: ignore[arg-type]
    signs = guard_signs(evaluation, before, after)
    return {
        "taste": person.taste,
        "preferences": len(file.read()),
        "step": made.last_step.command,
        "win_rate": win_rate((scores[0], scores[1]), questions, range(len(rows))),
        "evaluation": {key: evaluation[key] for key in (before, after)},
        "broken": [sign.text for sign in signs if not sign.is_good],
        "guard_rails": [sign.text for sign in signs],
        "seconds": {each.step.command: each.read_result().get("seconds") for each in trained(made)},
    }


def trained(run: RunDirectory) -> Iterator[Any]:
    return (run.step(step) for step in run.read_config().steps if run.step(step).is_finished)


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| taste | preferences | preferred over the one before | target | KL | length | guard rails |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in found.values():
        win, (before, after) = each["win_rate"], each["evaluation"].values()
        lines.append(
            f"| {each['taste']} | {each['preferences']} | {win['rate']:.3f} ({win['low']:.3f} to "
            f"{win['high']:.3f}), {win['prompts']} prompts | >= {TARGET} | {after.get('kl', float('nan')):.2f} | "
            f"{before['length']:.1f} to {after['length']:.1f} | {'; '.join(each['broken']) or 'hold'} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="whose newest model is asked, and gone on from")
    parser.add_argument("--preferences", type=int, default=200, help="of each person")
    parser.add_argument("--people", nargs="+", default=[person.name for person in PEOPLE])
    parser.add_argument("--name", default="made-up", help="pairs and rounds lie in runs/NAME-...")
    parser.add_argument("--method", help="of run: ppo or dpo; default: the run's")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of run")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    run, found = RunDirectory(arguments.run), dict[str, dict[str, Any]]()
    options = [part for each in arguments.set for part in ("--set", each)]
    options += ["--method", arguments.method] if arguments.method else []
    chosen = [person for person in PEOPLE if person.name in arguments.people]
    files = {person.name: PreferenceFile(Path("runs") / f"{arguments.name}-{person.name}.jsonl") for person in chosen}
    left = {person: arguments.preferences - len(files[person.name].read()) for person in chosen}
    for pair in draw_pairs(run) if any(left.values()) else ():
        for person in chosen:
            if left[person] and (winner := person.choose(pair)):
                files[person.name].add(pair.judged(winner, person.name))
                left[person] -= 1
        if not any(left.values()):
            break
    for person in chosen:
        name = f"{arguments.name}-{person.name}"
        found[person.name] = one_round(run, person, files[person.name], name, options)
    print(table(found))
    if arguments.out:
        settings = {"preferences": arguments.preferences, "options": options}
        write_json(arguments.out, {"people": found, **settings, "machine": machine(), "versions": versions()})
    return int(any(each["win_rate"]["rate"] < TARGET or each["broken"] for each in found.values()))


if __name__ == "__main__":
    sys.exit(main())
