"""The data sets of DeepSpeed-Chat's table: where their training rows lie, and what of a row is prompt and answer.

A set is one entry of `HUB_SETS`. Most need only the names of their columns; the rest have a function of a few lines.
What a set itself leaves open (a tie, an answer that is missing) raises LeftOut: nobody can correct it there.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from training.data.entries import BadRow, LeftOut

Adapter = Callable[[dict[str, Any]], dict[str, Any]]
"""A row of a set -> the same in one of TRL's formats."""

CITATION = re.compile(r"\s*\[\d+(?:,\s*\d+)*\]")
VICUNA_TURN = re.compile(r"(?:^|</s>|\s)\s*(USER|ASSISTANT):")
VICUNA_ROLES = {"USER": "user", "ASSISTANT": "assistant"}


@dataclass(frozen=True)
class HubSet:
    repository: str
    files: tuple[str, ...]
    """Patterns of the files with training rows. Empty: the repository is a loading script without data beside it."""
    seen: str
    """The revision whose columns we wrote this down from."""
    columns: tuple[str, ...]
    adapt: Adapter
    names: tuple[str, ...] = ()
    """What it may be called besides its repository."""


def follow(row: dict[str, Any], path: str) -> Any:
    """The value at `answers.ja.0.text`. Raises BadRow where a key is missing, LeftOut where there is no value."""
    value: Any = row
    for part in path.split("."):
        if part.isdigit():
            if not isinstance(value, list):
                raise BadRow(f"'{path}' is not a list")
            value = value[int(part)] if int(part) < len(value) else None
        elif not isinstance(value, dict) or part not in value:
            raise BadRow(f"there is no '{path}'")
        else:
            value = value[part]
        if value is None or value == "":
            raise LeftOut(f"'{path}' is empty in the set")
    return value


def renamed(paths: dict[str, str]) -> Adapter:
    return lambda row: {key: follow(row, path) for key, path in paths.items()}


def columns_set(repository: str, files: tuple[str, ...], seen: str, *names: str, **paths: str) -> HubSet:
    """A set whose columns only have other names: `prompt="INSTRUCTION"`."""
    columns = tuple(dict.fromkeys(path.partition(".")[0] for path in paths.values()))
    return HubSet(repository, files, seen, columns, renamed(paths), names)


def from_speakers(row: dict[str, Any]) -> dict[str, Any]:
    """Answers that begin with `Assistant:`, under a prompt that ends before it."""
    prompt = follow(row, "prompt")
    if prompt.lstrip().startswith("Human:"):
        prompt = f"{prompt.rstrip()}\n\nAssistant:"
    answers = {key: follow(row, key).strip().removeprefix("Assistant:") for key in ("chosen", "rejected")}
    return {"prompt": prompt, **answers}


def from_scores(row: dict[str, Any]) -> dict[str, Any]:
    """Two answers with scores; citations such as [1] name pages that the model does not see, and go."""
    answers = [CITATION.sub("", follow(row, f"answer_{i}")) for i in (0, 1)]
    scores = [float(follow(row, f"score_{i}")) for i in (0, 1)]
    if scores[0] == scores[1]:
        raise LeftOut("both answers have the same score")
    better = int(scores[1] > scores[0])
    return {
        "prompt": follow(row, "question.full_text"),
        "chosen": answers[better],
        "rejected": answers[1 - better],
        "margin": abs(scores[1] - scores[0]),
    }


def from_label(row: dict[str, Any]) -> dict[str, Any]:
    """Comments A and B; `labels` is 1 where A is preferred."""
    label = follow(row, "labels")
    if label not in (0, 1):
        raise BadRow(f"'labels' is {str(label)[:20]}, not 0 or 1")
    better, worse = ("A", "B") if label == 1 else ("B", "A")
    return {
        "prompt": follow(row, "history"),
        "chosen": follow(row, f"human_ref_{better}"),
        "rejected": follow(row, f"human_ref_{worse}"),
    }


def from_vicuna(row: dict[str, Any]) -> dict[str, Any]:
    """`USER: ... ASSISTANT: ...</s>USER: ... ASSISTANT:`, the answer in `label`; before it perhaps a system text."""
    parts = VICUNA_TURN.split(follow(row, "prompt"))
    texts = [text.removesuffix("</s>").strip() for text in parts[::2]]
    messages = [{"role": "system", "content": texts[0]}] if texts[0] else []
    messages += [{"role": VICUNA_ROLES[r], "content": t} for r, t in zip(parts[1::2], texts[1:], strict=True)]
    if len(parts) == 1:
        messages = [{"role": "user", "content": texts[0]}]
    elif not texts[-1]:  # where the answer is to stand
        messages.pop()
    return {"prompt": messages, "response": follow(row, "label").strip().removesuffix("</s>")}


TRAIN = ("data/train-*.parquet",)
PAIR = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
MIRACL = {"prompt": "query", "chosen": "positive_passages.0.text", "rejected": "negative_passages.0.text"}

HUB_SETS = (
    columns_set("Dahoas/rm-static", TRAIN, "64fd53cc91f7cb73b283a6e4f661205e277d23c9", **PAIR),
    columns_set("Dahoas/full-hh-rlhf", TRAIN, "273ff2a", **PAIR),
    columns_set("Dahoas/synthetic-instruct-gptj-pairwise", TRAIN, "cc92d8d", **PAIR),
    HubSet("yitingxie/rlhf-reward-datasets", TRAIN, "eaf94e8", tuple(PAIR), from_speakers),
    HubSet(
        "openai/webgpt_comparisons",
        (),
        "f30e1bd2f0a51535b493de36d3686cfcfff47abe",
        ("question", "answer_0", "answer_1", "score_0", "score_1"),
        from_scores,
    ),
    HubSet(
        "stanfordnlp/SHP",
        ("*/train.json",),
        "e94b5f32602712d78ed494fe79105b1959396686",
        ("history", "human_ref_A", "human_ref_B", "labels"),
        from_label,
    ),
    HubSet(
        "pvduy/sharegpt_alpaca_oa_vicuna_format",
        TRAIN,
        "37b38dcfe4019b1bbebe6a91b04bab40d3978380",
        ("prompt", "label"),
        from_vicuna,
        ("sharegpt_alpaca_oa_vicuna",),
    ),
    columns_set("wangrui6/Zhihu-KOL", TRAIN, "fb4a72c", prompt="INSTRUCTION", response="RESPONSE"),
    columns_set("Hello-SimpleAI/HC3-Chinese", ("all.jsonl",), "09a687b", prompt="question", response="human_answers.0"),
    columns_set("apple/mkqa", (), "3251318", "mkqa-Chinese", prompt="queries.zh_cn", response="answers.zh_cn.0.text"),
    columns_set("apple/mkqa", (), "3251318", "mkqa-Japanese", prompt="queries.ja", response="answers.ja.0.text"),
    columns_set("lmqg/qg_jaquad", ("data/processed/train*.jsonl",), "3fef4e9", prompt="question", response="sentence"),
    columns_set(
        "lmqg/qag_jaquad", ("data/processed/train*.jsonl",), "1382b50", prompt="questions.0", response="paragraph"
    ),
    columns_set("Cohere/miracl-zh-queries-22-12", TRAIN, "125f282", **MIRACL),
    columns_set("Cohere/miracl-ja-queries-22-12", TRAIN, "46d49461b36bf03945d8ced94b62f7a90bc9acae", **MIRACL),
)


def find_set(name: str) -> HubSet | None:
    """The set of this name; upper and lower case are alike."""
    return next((each for each in HUB_SETS if name.lower() in all_names(each)), None)


def all_names(each: HubSet) -> tuple[str, ...]:
    """In lower case. A repository with several sets in it does not name one of them."""
    shared = sum(other.repository == each.repository for other in HUB_SETS) > 1
    return tuple(name.lower() for name in (*(() if shared else (each.repository,)), *each.names))


def same(row: dict[str, Any]) -> dict[str, Any]:
    """The adapter of data that is in one of TRL's formats already."""
    return row


PLAIN = HubSet("", (), "", (), same)
"""Any other data."""
