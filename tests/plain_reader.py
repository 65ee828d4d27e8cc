"""What plain transformers and peft, of any version, make of exported models; it knows nothing of ours.

`python -P tests/plain_reader.py CASES OUT` reads in each directory of CASES what is there of `policy`, `adapter`,
`joined` and `reward`, and writes to OUT (JSON) what they say to the conversations in its conversations.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

Conversation = list[dict[str, str]]
TOKENS = 8


def answers(loader: Any, directory: Path, prompts: list[Conversation]) -> dict[str, Any]:
    """Tokens of the prompts, greedy answers, and the logits behind each prompt."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = loader.from_pretrained(directory).float().eval()
    found: dict[str, Any] = {"prompts": [], "answers": [], "logits": []}
    for messages in prompts:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        length = inputs["input_ids"].shape[1]
        answer = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)[0, length:]
        found["prompts"].append(inputs["input_ids"][0].tolist())
        found["answers"].append(answer.tolist())
        with torch.no_grad():
            found["logits"].append(model(**inputs).logits[0, -1].tolist())
    return found


def scores(directory: Path, dialogues: list[Conversation]) -> dict[str, list[float]]:
    """The raw score of each dialogue: alone, in batches padded on either side, and through the pipeline."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory).float().eval()
    found = {}
    with torch.no_grad():
        alone = (tokenizer.apply_chat_template(each, return_tensors="pt", return_dict=True) for each in dialogues)
        found["alone"] = [model(**inputs).logits.item() for inputs in alone]
        for side in ("right", "left", "as saved"):
            more = {} if side == "as saved" else {"tokenizer_kwargs": {"padding_side": side}}
            inputs = tokenizer.apply_chat_template(
                dialogues, return_tensors="pt", return_dict=True, padding=True, **more
            )
            found[side] = model(**inputs).logits[:, 0].tolist()
    classify = pipeline("text-classification", model=str(directory), device="cpu", dtype=torch.float32)
    texts = tokenizer.apply_chat_template(dialogues, tokenize=False)
    found["pipeline"] = [each["score"] for each in classify(texts)]
    return found


def read(case: Path) -> dict[str, Any]:
    said = json.loads((case / "conversations.json").read_text())
    found: dict[str, Any] = {}
    for place in sorted(case.iterdir()):
        if place.name not in ("policy", "adapter", "joined", "reward"):
            continue
        try:
            if place.name == "reward":
                found[place.name] = scores(place, said["dialogues"])
            else:
                loader = AutoModelForCausalLM if place.name == "policy" else AutoPeftModelForCausalLM
                found[place.name] = answers(loader, place, said["prompts"])
        except Exception as error:  # any that the other version raises is a finding
            found[place.name] = {"error": f"{type(error).__name__}: {str(error).strip()[:200]}"}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    cases = {case.name: read(case) for case in sorted(Path(sys.argv[1]).iterdir())}
    Path(sys.argv[2]).write_text(json.dumps({"version": transformers.__version__, "cases": cases}), encoding="utf-8")
