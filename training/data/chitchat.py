"""The embedded default: people's small talk from the package `chitchat-dataset`, and texts that people rated.

Steps 1 and 3 learn from the talk, step 2 from the ratings (rated_texts.py). A sample is a context (the question that a
dialogue is about and its last turns) with a person's reply. Six of the 34 questions are for evaluation alone;
of the others, some dialogues are. Left out on purpose: the dialogues' own ratings (they follow length and little else),
dialogues without a question, and rude talk.
"""

import functools
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from inference.chat_format import ChatFormat
from inference.chat_template import Message
from inference.errors import UserError
from training.data.rated_texts import RatedTexts, is_decent, is_talk, share_texts
from training.data.rows import PromptRow, RowSets, SFTRow
from training.data.split import check_shares, keep_once, opening
from training.data_settings import DataSettings

HELD_OUT_QUESTIONS = 6
ROWS_PER_DIALOGUE = 8  # dialogues have up to hundreds of turns; a few of them must not outweigh the rest
CONTEXT_TURNS = (3, 1)
"""Turns of a context, first choice first; odd, so that it begins and ends with the user's."""
SAME_REPLY = 3  # times that the same reply ("yeah") is used
COMPARED_PROMPTS = 600
"""Held-out prompts for the comparison of models; behind them stand those of `rlhf.eval_prompts`."""
MORE_PROMPTS = 64
ENOUGH_ROWS = 1500
"""With fewer than this for step 1 or 3, both get all training dialogues instead of dividing them."""
MIN_REPLY_TOKENS = 2
MAX_CHARACTERS_PER_TOKEN = 6
"""Talk has about 4; a text with more than this for each token allowed counts as too long without tokenising it."""
GREETING = re.compile(r"(?:h+i+|he+y+|hell+o+|hola|yo|sup|what'?s? up|good (?:morning|afternoon|evening))\b", re.I)


@dataclass(frozen=True)
class Dialogue:
    name: str
    question: str
    turns: list[str]  # of two people, in turn


def load_dialogues() -> list[Dialogue]:
    """Load the dialogues of the package that have a question and two turns or more."""
    text = (files("chitchat_dataset") / "dataset.json").read_text(encoding="utf-8")
    dialogues = [read_dialogue(name, value) for name, value in json.loads(text).items()]
    return [dialogue for dialogue in dialogues if dialogue.question and len(dialogue.turns) > 1]


def read_dialogue(name: str, value: dict[str, Any]) -> Dialogue:
    """Join what one person says in a row, so that the speakers alternate."""
    turns: list[str] = []
    last = None
    for utterance in (utterance for turn in value["messages"] for utterance in turn):
        words = utterance["text"].split()
        if not words:
            continue
        if utterance["sender"] == last:
            turns[-1] += " " + " ".join(words)
        else:
            turns.append(" ".join(words))
        last = utterance["sender"]
    question = re.sub(r"\s*\(i\.e\..*\)\s*$", "", value.get("prompt") or "")  # examples would cost 30 tokens
    return Dialogue(name, question, turns)


def build_chitchat(
    dialogues: Sequence[Dialogue], texts: RatedTexts, settings: DataSettings, seed: int, chat_format: ChatFormat
) -> tuple[RowSets, Counter[str], list[str]]:
    """Build the rows, how many replies and rated texts were left out and why, and notes.

    No dialogue and no rated text is in both training and evaluation.
    """
    check_shares(settings.split)
    if why := chat_format.refusal(next(prompts_for(Dialogue("", "Tea?", ["Yes."]), 0))):
        raise UserError(
            f"The dialogues of chitchat begin with a system message, which the model's chat template refuses ({why}): "
            f"give data of your own with --data, or choose another model."
        )
    rng = random.Random(f"{seed} chitchat")
    dialogues = sorted(dialogues, key=lambda dialogue: dialogue.name)
    rng.shuffle(dialogues)
    dialogues = dialogues[: settings.limit or None]
    questions = sorted({dialogue.question for dialogue in dialogues})
    held_out = set(rng.sample(questions, min(HELD_OUT_QUESTIONS, len(questions) // 2)))
    known = [dialogue for dialogue in dialogues if dialogue.question not in held_out]
    evaluated = max(1, round(settings.held_out * len(known)))

    reader = DialogueReader(settings, seed, chat_format)
    training = reader.read(known[evaluated:])
    if not any(training):
        raise UserError(
            f"chitchat has no replies for data.max_prompt_tokens={settings.max_prompt_tokens}, "
            f"data.max_response_tokens={settings.max_response_tokens} and data.limit={settings.limit}; "
            "64, 32 and 0 are known to do."
        )
    sets, shared = share_out(training, settings.split, rng)
    reader.leave_out_known_talk(flatten(training))
    new_talk = flatten(reader.read(known[:evaluated]))
    new_questions = flatten(reader.read([dialogue for dialogue in dialogues if dialogue.question in held_out]))
    add_evaluation(sets, new_talk, new_questions, rng)
    keep_once(sets)
    prompts, held_out_prompts = (
        [row["prompt"] for row in rows] for rows in (sets.prompts_train, sets.prompts_eval[:COMPARED_PROMPTS])
    )
    rated = (
        share_texts(texts, settings, seed, chat_format, prompts, held_out_prompts) if settings.split[1] > 0 else None
    )
    if rated:
        sets.pairs_train, sets.pairs_eval, sets.panel = [*rated.pairs_train], [*rated.pairs_eval], rated.panel
        reader.left_out.update(rated.left_out)
    notes = [
        f"{len(known) - evaluated:,} dialogues to train on; held out: {evaluated:,} more, "
        f"and all {len(dialogues) - len(known):,} about {len(held_out)} of the {len(questions)} questions",
        f"steps 1 and 3 {'share their dialogues' if shared else 'have dialogues of their own'}",
        *(rated.notes if rated else []),
    ]
    return sets, reader.left_out, notes


class DialogueReader:
    """Turns dialogues into demonstrations, whose response is a person's reply, and counts what it leaves out."""

    def __init__(self, settings: DataSettings, seed: int, chat_format: ChatFormat):
        self.settings = settings
        self.seed = seed
        self.chat_format = chat_format
        self.left_out: Counter[str] = Counter()
        self._said: Counter[str] = Counter()
        self._known_replies: set[str] = set()
        self._known_openings: set[str] = set()

    def read(self, dialogues: Iterable[Dialogue]) -> list[list[SFTRow]]:
        return [self._rows(dialogue) for dialogue in dialogues]

    def leave_out_known_talk(self, rows: Iterable[SFTRow]) -> None:
        """Leave out, from now on, replies that are in `rows`, and contexts that begin as one there."""
        for row in rows:
            self._known_replies.add(bare(row["response"]))
            self._known_openings.add(opening(row["prompt"]))

    def _rows(self, dialogue: Dialogue) -> list[SFTRow]:
        order = list(range(len(dialogue.turns)))
        random.Random(f"{self.seed} {dialogue.name}").shuffle(order)
        rows: list[SFTRow] = []
        for turn in order:
            if len(rows) == ROWS_PER_DIALOGUE:
                break
            row = self._row(dialogue, turn)
            if isinstance(row, str):
                self.left_out[row] += 1
            else:
                rows.append(row)
        return rows

    def _row(self, dialogue: Dialogue, turn: int) -> SFTRow | str:
        """Return the turn with this index as a reply in its context, or why it is not used."""
        reply = dialogue.turns[turn]
        if turn == 0 and GREETING.match(reply):
            return "greeting for an answer"
        if not is_talk(reply):
            return "no words, or a link"
        if self._said[bare(reply)] == SAME_REPLY:
            return "said too often"
        if bare(reply) in self._known_replies:
            return "held out, but said in training too"
        limit = self.settings.max_response_tokens
        tokens = limit if is_longer(reply, limit) else len(self.chat_format.response_ids(reply)) - 1
        if not MIN_REPLY_TOKENS <= tokens < limit:  # one is for the end of turn
            return "reply too short or too long"
        prompt = next((prompt for prompt in prompts_for(dialogue, turn) if self._fits(prompt)), None)
        if prompt is None:
            return "context too long"
        if not is_talk(prompt[-1]["content"]):
            return "no words, or a link"
        if opening(prompt) in self._known_openings:
            return "held out, but said in training too"
        if not all(map(is_decent, [reply, *(message["content"] for message in prompt)])):
            return "rude words"
        self._said[bare(reply)] += 1
        return {"prompt": prompt, "response": reply}

    def _fits(self, prompt: list[Message]) -> bool:
        limit = self.settings.max_prompt_tokens
        text = "".join(message["content"] for message in prompt)
        return not is_longer(text, limit) and len(self.chat_format.prompt_ids(prompt)) <= limit


def is_longer(text: str, tokens: int) -> bool:
    return len(text) > MAX_CHARACTERS_PER_TOKEN * tokens


def prompts_for(dialogue: Dialogue, turn: int) -> Iterator[list[Message]]:
    """Yield what the turn with this index may reply to, first choice first. The first turn replies to the question."""
    if turn == 0:
        yield [
            {"role": "system", "content": "You chat with a friend."},
            {"role": "user", "content": dialogue.question},
        ]
    for count in CONTEXT_TURNS:
        if count <= turn:
            prompt: list[Message] = [
                {"role": "system", "content": f"You chat with a friend about: {dialogue.question}"},
            ]
            for i, text in enumerate(dialogue.turns[turn - count : turn]):
                prompt.append({"role": ("user", "assistant")[i % 2], "content": text})
            yield prompt


def bare(text: str) -> str:
    """Write a reply as one hears it: "Haha, yes!!" and "hahaha yes" are the same."""
    words = re.findall(r"\w+", text.lower())
    return " ".join("haha" if re.fullmatch(r"a?(?:ha)+h?", word) else word for word in words)


def flatten(rows: Iterable[Iterable[SFTRow]]) -> list[SFTRow]:
    return [row for group in rows for row in group]


def share_out(
    training: list[list[SFTRow]], shares: tuple[float, float, float], rng: random.Random
) -> tuple[RowSets, bool]:
    """Training rows of steps 1 and 3, and whether they had to share dialogues: step 1 gets its share, step 3 the rest.

    A step whose share is 0 gets nothing.
    """
    bound = round(len(training) * shares[0] / sum(shares))
    sets = training_rows(flatten(training[:bound]), flatten(training[bound:]) if shares[2] > 0 else [], rng)
    counts = (len(sets.sft_train), len(sets.prompts_train))
    if all(count >= ENOUGH_ROWS for count, share in zip(counts, shares[::2], strict=True) if share > 0):
        return sets, False
    first, third = (flatten(training) if share > 0 else [] for share in shares[::2])
    return training_rows(first, third, rng), True


def training_rows(first: list[SFTRow], third: list[SFTRow], rng: random.Random) -> RowSets:
    sets = RowSets(sft_train=first, prompts_train=prompt_rows(third))
    rng.shuffle(sets.sft_train)
    rng.shuffle(sets.prompts_train)
    return sets


def add_evaluation(sets: RowSets, new_talk: list[SFTRow], new_questions: list[SFTRow], rng: random.Random) -> None:
    """Add held-out rows: half of the prompts under held-out questions, if there are enough, and none for SFT."""
    half, more = COMPARED_PROMPTS // 2, list[PromptRow]()
    for samples, is_new in ((new_talk, False), (new_questions, True)):
        prompts = prompt_rows(samples)
        rng.shuffle(prompts)
        rows: list[PromptRow] = [{**prompt, "held_out_question": is_new} for prompt in prompts]
        sets.prompts_eval += rows[:half]
        more += rows[half : half + MORE_PROMPTS // 2]
    sets.sft_eval = [{**row, "held_out_question": False} for row in new_talk]
    for shuffled in (sets.sft_eval, sets.prompts_eval, more):
        rng.shuffle(shuffled)
    sets.prompts_eval += more


def prompt_rows(rows: Iterable[SFTRow]) -> list[PromptRow]:
    """Return the prompts of demonstrations, each once."""
    distinct = {json.dumps(row["prompt"]): row["prompt"] for row in rows}
    return [{"prompt": prompt} for prompt in distinct.values()]


def upbeat_score(text: str) -> float:
    """Score from -1 (gloomy) to 1 (upbeat): the compound score of VADER (Hutto and Gilbert 2014)."""
    return _analyzer().polarity_scores(text)["compound"]


@functools.cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()  # reads its lexicon, about 7,500 lines
