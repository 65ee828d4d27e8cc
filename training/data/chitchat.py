"""The embedded default: human dialogues of the package chitchat-dataset 0.9.0 (MIT), and the upbeat preference.

Two people talk under one of 34 opening questions. A sample is a context (the question and the last turns) with the
human's next reply. A pair is two human replies given under the same question, about equally long and at least 0.3
apart on the scale of the vaderSentiment lexicon; the more upbeat one is chosen. The rule is known, so what PPO
achieves can be checked against the truth: it is a demonstration, not a human preference.
"""

import json
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from inference.chat_format import ChatFormat, Message
from training.config import DataSettings
from training.data.upbeat import upbeat_score

HELD_OUT_QUESTIONS = 6
CONTEXT_TURNS = (3, 1)
"""How many last turns a context has: the most that fit. Odd, so that it starts and ends with the user."""
SAMPLES_PER_DIALOGUE = 8
SHORTEST_REPLY_TOKENS = 4
SAME_REPLY_LIMIT = 3
SCORE_GAP = 0.3
LENGTH_GAP = 0.25
USES_OF_A_REPLY = 2
MOST_ROWS = {"train": 4000, "eval": 500}
HARMLESS = frozenset(
    [
        "god",
        "omg",
        "kill",
        "murder",
        "stupid",
        "fat",
        "ugly",
        "hell",
        "damn",
        "pot",
        "stroke",
        "organ",
        "strip",
        "facial",
        "drunk",
        "crap",
        "suck",
        "sucked",
        "screw",
        "screwed",
        "slope",
        "pawn",
        "thrust",
        "woody",
        "willy",
        "potty",
        "vodka",
        "womb",
        "urine",
        "vomit",
    ]
)
"""Words of the filter's list that are no abuse in small talk."""


@dataclass(frozen=True)
class Reply:
    """One sample: what a human answered, in which context."""

    dialogue: str
    question: str
    prompt: list[Message]
    text: str
    tokens: int
    score: float


@dataclass(frozen=True)
class Dialogue:
    key: str
    question: str
    turns: list[str]


def load_dialogues() -> dict[str, dict]:
    """The package's raw records by key."""
    import chitchat_dataset

    file = Path(chitchat_dataset.__file__).with_name("dataset.json")
    return json.loads(file.read_text(encoding="utf-8"))


def usable_dialogues(records: dict[str, dict], counts: Counter[str]) -> list[Dialogue]:
    """Those with a question and two turns or more, in a fixed order; `counts` says what was left out."""
    usable = []
    for key in sorted(records):
        record = records[key]
        question = (record.get("prompt") or "").strip()
        turns = [" ".join(utterance["text"].strip() for utterance in turn) for turn in record["messages"]]
        counts["dialogues"] += 1
        if not question:
            counts["dialogues without a question"] += 1
        elif len(turns) < 2:
            counts["dialogues of one turn"] += 1
        else:
            usable.append(Dialogue(key, question, turns))
    counts["dialogues used"] = len(usable)
    return usable


class ReplyMaker:
    """Dialogues -> replies in context, filtered. Counts what it leaves out."""

    def __init__(self, settings: DataSettings, chat_format: ChatFormat, counts: Counter[str]):
        self.settings, self.chat_format, self.counts = settings, chat_format, counts
        self.abuse = abuse_pattern()
        self.seen: Counter[str] = Counter()

    def replies(self, dialogue: Dialogue, draw: random.Random) -> list[Reply]:
        """Up to SAMPLES_PER_DIALOGUE replies from random places, so that long dialogues do not fill the set."""
        places = list(range(1, len(dialogue.turns)))
        draw.shuffle(places)
        found: list[Reply] = []
        for place in places:
            if len(found) == SAMPLES_PER_DIALOGUE:
                break
            reply = self.reply(dialogue, place)
            if reply is not None:
                found.append(reply)
        return found

    def reply(self, dialogue: Dialogue, place: int) -> Reply | None:
        text = dialogue.turns[place]
        if not re.search(r"[a-z]{2}", text.lower()) or "http" in text or "www." in text:
            return self._drop("replies without words or with links")
        if self.abuse.search(text.lower()):
            return self._drop("abusive replies or contexts")
        tokens = len(self.chat_format.response_ids(text))
        if not SHORTEST_REPLY_TOKENS <= tokens <= self.settings.max_response_tokens:
            return self._drop("replies too short or too long")
        if self.seen[text.lower()] >= SAME_REPLY_LIMIT:
            return self._drop("replies seen before")
        prompt = self.context(dialogue, place)
        if prompt is None:
            return self._drop("contexts too long or empty")
        if any(self.abuse.search(message["content"].lower()) for message in prompt):
            return self._drop("abusive replies or contexts")
        self.seen[text.lower()] += 1
        return Reply(dialogue.key, dialogue.question, prompt, text, tokens, upbeat_score(text))

    def context(self, dialogue: Dialogue, place: int) -> list[Message] | None:
        """The question as system message, then as many last turns as fit; the human before `place` is the user."""
        system: Message = {"role": "system", "content": f"You chat with a friend. Topic: {dialogue.question}"}
        for turns in CONTEXT_TURNS:
            last = dialogue.turns[max(0, place - turns) : place]
            if len(last) < turns or not all(turn.strip() for turn in last):
                continue
            roles = ("user", "assistant")
            prompt = [system] + [Message(role=roles[i % 2], content=turn) for i, turn in enumerate(last)]
            if len(self.chat_format.prompt_ids(prompt)) <= self.settings.max_prompt_tokens:
                return prompt
        return None

    def _drop(self, reason: str) -> Reply | None:
        self.counts[reason] += 1
        return None


def abuse_pattern() -> re.Pattern[str]:
    """Whole words of better_profanity's list, less the harmless ones (its own matching is too slow here)."""
    import better_profanity

    file = Path(better_profanity.__file__).with_name("profanity_wordlist.txt")
    words = {line.strip().lower() for line in file.read_text(encoding="utf-8").splitlines()} - HARMLESS - {""}
    return re.compile(r"\b(?:" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + r")\b")


def make_pairs(replies: list[Reply], most: int, draw: random.Random) -> list[tuple[Reply, Reply, list[Message]]]:
    """(chosen, rejected, prompt), spread over the questions. The prompt is the context of either, by a coin."""
    by_question: dict[str, list[Reply]] = defaultdict(list)
    for reply in replies:
        by_question[reply.question].append(reply)
    found: dict[str, list[tuple[Reply, Reply]]] = {}
    for question, group in sorted(by_question.items()):
        draw.shuffle(group)
        found[question] = match(sorted(group, key=lambda reply: reply.tokens))
        draw.shuffle(found[question])
    pairs: list[tuple[Reply, Reply, list[Message]]] = []
    while len(pairs) < most and any(found.values()):
        for candidates in found.values():
            if candidates and len(pairs) < most:
                chosen, rejected = candidates.pop()
                pairs.append((chosen, rejected, draw.choice((chosen, rejected)).prompt))
    return pairs


def match(by_length: list[Reply]) -> list[tuple[Reply, Reply]]:
    """(chosen, rejected) among replies sorted by length; a reply is used at most USES_OF_A_REPLY times."""
    uses: Counter[int] = Counter()
    pairs = []
    for i, first in enumerate(by_length):
        for j in range(i + 1, len(by_length)):
            second = by_length[j]
            if uses[i] >= USES_OF_A_REPLY or not about_equally_long(first.tokens, second.tokens):
                break
            if uses[j] < USES_OF_A_REPLY and abs(first.score - second.score) >= SCORE_GAP:
                uses[i] += 1
                uses[j] += 1
                pairs.append((first, second) if first.score > second.score else (second, first))
    return pairs


def about_equally_long(shorter: int, longer: int) -> bool:
    """Within a quarter, or two tokens."""
    return longer - shorter <= max(2, LENGTH_GAP * longer)
