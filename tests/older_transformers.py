"""Exported models in another version of transformers and in this one: the same tokens, logits and scores?

`python -m tests.older_transformers PACKAGES [FAMILY ...]`: PACKAGES is a directory with the other version, found before
this environment's. Without families, those that are said to be the same (`READ_BY_OLDER`) are tried, each with a
scaled rope where it has one; `all` tries every one. Exit code 1 if one differs.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, logging

from applications.export import export
from inference.chat_format import ChatFormat
from inference.errors import UserError
from inference.weights import ABSOLUTE_POSITIONS, READ_BY_OLDER, rewrite_config
from tests.families import FAMILIES, UNBUILDABLE, UNCUT, build, narrow_config
from tests.inference.templates import FAMILIES as TEMPLATES
from tests.inference.templates import bytes_tokenizer
from tests.tiny_runs import QUESTIONS, make_tiny_run, messages
from training.data.batching import TokenBatch
from training.models.loading import load_scorer, require_scorer_family
from training.models.policy import Scorer, at_last_token
from training.steps import REWARD

TOLERANCE = 1e-4
"""Of a score, and of a logit beside the largest one: these models have larger weights than trained ones."""
THETA = 500_000.0
ROPES: dict[str, dict[str, Any]] = {
    "theta": {},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
LONG = {"rope_type": "longrope", "short_factor": [2.0] * 8, "long_factor": [4.0] * 8}
"""Of Phi 3, which takes no other; half of a head's width of 16. The longest row of a batch says which factors count."""
TEMPLATE = {"llama": "llama-3", "qwen2": "qwen-2.5", "qwen3": "qwen-3", "mistral": "mistral", "phi3": "phi-3"}
BARE = replace(TEMPLATES["opt"], special=("</s>",))
"""No token of it can pad: one is added, and embeddings grow."""


def cases_of(kind: str) -> dict[str, dict[str, Any]]:
    """Settings of the family's configurations to try."""
    cases: dict[str, dict[str, Any]] = {kind: {}}
    rope = getattr(AutoConfig.for_model(kind), "rope_parameters", None)
    if rope and "full_attention" not in rope:
        names = ROPES if kind in ("llama", "qwen2", "qwen3", "gpt_neox") else ("theta", "linear")
        cases = {f"{kind} {name}": {"rope_parameters": {"rope_theta": THETA} | ROPES[name]} for name in names}
    if kind == "phi3":
        longrope = {"rope_parameters": LONG, "original_max_position_embeddings": 256}
        cases = {"phi3 theta": cases["phi3 theta"], "phi3 longrope": longrope}
    return cases | ({f"{kind} grown": {"vocab_size": 257}} if kind in ("gpt2", "gpt_neox", "llama", "qwen2") else {})


def make_case(place: Path, kind: str, more: dict[str, Any]) -> None:
    """A run of the family, and what is exported of it."""
    config = narrow_config(kind, **more)
    try:
        require_scorer_family(config)
        has_reward = True
    except UserError:
        has_reward = False

    def build_base(directory: Path) -> None:
        build(config).save_pretrained(directory)
        rewrite_config(directory)  # as a base of the hub, which 4 has written, and 5 does not write
        family = BARE if "vocab_size" in more else TEMPLATES[TEMPLATE.get(kind, "chatml")]
        added = {} if family is BARE else {"additional_special_tokens": ["<|tool|>", "<|call|>"]}
        bytes_tokenizer(family, **added).save_pretrained(directory)

    run = make_tiny_run(place / "made", 2, build_base, has_reward)
    for name, what, step in (
        ("policy", "merged", "rlhf"),
        ("adapter", "adapter", "sft"),
        ("joined", "adapter", "rlhf"),
        ("reward", "merged", "reward"),
    ):
        if has_reward or step != "reward":
            export(run.path, place / name, what, "", step)
    prompts = [messages(f"{text} <|tool|> ünïcode 123!  x") for text in QUESTIONS[:2]]
    prompts.append([*prompts[0], {"role": "assistant", "content": "Fine."}, *messages("Why?")])
    dialogues = [
        [*prompt, {"role": "assistant", "content": "Lovely, thank you!"}] for prompt in map(messages, QUESTIONS)
    ]
    said = {"prompts": prompts, "dialogues": dialogues, "scores": [], "vocabulary": config.get_text_config().vocab_size}
    if has_reward:
        said["scores"] = raw_scores(run.step(REWARD).model, dialogues)
    (place / "conversations.json").write_text(json.dumps(said))


def raw_scores(directory: Path, dialogues: list[list[dict[str, str]]]) -> list[float]:
    """As PPO has them, before shift and scale."""
    chat_format = ChatFormat.load(directory)
    scorer = Scorer(load_scorer(directory, chat_format, torch.float32, trained=True)).eval()
    rows = [
        (torch.tensor(chat_format.prompt_ids(each[:-1])), torch.tensor(chat_format.response_ids(each[-1]["content"])))
        for each in dialogues
    ]
    batch = TokenBatch.of(rows, torch.device("cpu"))
    with torch.no_grad():
        return (at_last_token(scorer(batch), batch) * scorer.scale + scorer.shift).tolist()


def readings(root: Path, packages: str) -> dict[str, Any]:
    """What `tests/plain_reader.py` says in an interpreter that finds `packages` first."""
    out = root.with_name(f"{root.name}-{bool(packages)}.json")
    reader = Path(__file__).with_name("plain_reader.py")
    environment = {**os.environ, "PYTHONPATH": packages}
    subprocess.run([sys.executable, "-P", reader, root, out], env=environment, cwd=root, check=True)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def furthest(ours: list, theirs: list) -> float:
    """The largest difference of two lists of numbers, or of lists of them; infinite where the lengths differ."""
    if len(ours) != len(theirs):
        return float("inf")
    return max(furthest(a, b) if isinstance(a, list) else abs(a - b) for a, b in zip(ours, theirs, strict=True))


def faults(kind: str, said: dict[str, Any], here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """How the readings of one case differ, and how far the scores of either are from those that were trained."""
    found = []
    for part in sorted(here):
        ours, theirs = here[part], there[part]
        if errors := [each["error"] for each in (ours, theirs) if "error" in each]:
            found.append(f"{part}: {errors[0]}")
        elif part == "reward":
            for version, scores in (("here", ours), ("there", theirs)):
                for how, values in scores.items():
                    off = furthest(values, said["scores"])
                    if not off <= TOLERANCE and not (how == "left" and kind in ABSOLUTE_POSITIONS):
                        found.append(f"scores {version}, {how}: off by {off:.1e}")
        else:
            known = None if part == "policy" else said["vocabulary"]  # rows added to a base are drawn, around the mean
            logits = [[each[:known] for each in readings["logits"]] for readings in (ours, theirs)]
            largest = max(abs(value) for each in logits[0] for value in each)
            off = furthest(*logits) / max(1.0, largest)
            same = ours["prompts"] == theirs["prompts"] and ours["answers"] == theirs["answers"]
            if not (same and off <= TOLERANCE):
                found.append(f"{part}: logits off by {off:.1e}{'' if same else ', other tokens'}")
    return found


def main(packages: str, families: list[str]) -> int:
    logging.set_verbosity_error()
    known = [kind for kind in FAMILIES if kind not in UNBUILDABLE and kind not in UNCUT]
    families = families or sorted(READ_BY_OLDER)
    root = Path(tempfile.mkdtemp(prefix="older-")) / "cases"
    kinds = {}
    for kind in known if families == ["all"] else families:
        for name, more in cases_of(kind).items():
            try:
                with contextlib.redirect_stdout(None):
                    make_case(root / name, kind, more)
                kinds[name] = kind
            except Exception as error:  # a family that cannot be trained here, or not with this rope
                print(f"{name}: not made ({str(error)[:100]})")
                shutil.rmtree(root / name, ignore_errors=True)
    here, there = readings(root, ""), readings(root, os.path.abspath(packages))
    print(f"transformers {here['version']} and {there['version']}:")
    failed = 0
    for name, kind in kinds.items():
        said = json.loads((root / name / "conversations.json").read_text())
        found = faults(kind, said, here["cases"][name], there["cases"][name])
        failed += bool(found)
        print(f"{name} ({', '.join(sorted(here['cases'][name]))}): {'; '.join(found) or 'the same'}")
    shutil.rmtree(root.parent)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
