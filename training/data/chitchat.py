"""The embedded default: people's small talk from the package `chitchat-dataset`, and texts that people rated.

Steps 1 and 3 learn from the talk, step 2 from the ratings (rated_texts.py). A sample is a context (the question that a
dialogue is about and its last turns) with a person's reply. Six of the 34 questions are kept for evaluation altogether;
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
from training.config import DataSettings
from training.data.decency import is_decent, is_talk
from training.data.rated_texts import RatedTexts, share_texts
from training.data.rows import PromptRow, RowSets, SFTRow
from training.data.split import check_shares, keep_once, opening

HELD_OUT_QUESTIONS = 6
SAMPLES_PER_DIALOGUE = 8
"""Dialogues have up to hundreds of turns; a few of them must not outweigh the rest."""
CONTEXT_TURNS = (3, 1)
"""Turns of a context, first choice first; odd, so that it begins and ends with the user's."""
SAME_REPLY = 3
"""How often the same reply ("yeah") is kept."""
EVALUATION_ROWS = 600
"""Prompts for the comparison of models."""
MORE_ROWS = 64
"""Prompts behind them, for evaluation while step 3 learns (`rlhf.eval_prompts`)."""
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
    turns: list[str]
    """Two people in turn."""


@dataclass(frozen=True)
class Sample:
    """A person's reply in its context."""

    question: str
    prompt: list[Message]
    reply: str


def load_dialogues() -> list[Dialogue]:
    """The dialogues of the package that have a question and two turns or more."""
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
    """The rows, how many replies and rated texts were left out and why, and notes.

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

    reader = Reader(settings, seed, chat_format)
    training = reader.read(known[evaluated:])
    if not any(training):
        raise UserError(
            f"chitchat has no replies for data.max_prompt_tokens={settings.max_prompt_tokens}, "
            f"data.max_response_tokens={settings.max_response_tokens} and data.limit={settings.limit}; "
            "64, 32 and 0 are known to do."
        )
    sets, shared = share_out(training, settings.split, rng)
    reader.leave_out_known_talk(training)
    new_talk = flatten(reader.read(known[:evaluated]))
    new_questions = flatten(reader.read([dialogue for dialogue in dialogues if dialogue.question in held_out]))
    add_evaluation(sets, new_talk, new_questions, rng)
    keep_once(sets)
    prompts, held_out_prompts = (
        [row["prompt"] for row in rows] for rows in (sets.prompts_train, sets.prompts_eval[:EVALUATION_ROWS])
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


class Reader:
    """Turns dialogues into samples and counts what it leaves out."""

    def __init__(self, settings: DataSettings, seed: int, chat_format: ChatFormat):
        self.settings = settings
        self.seed = seed
        self.chat_format = chat_format
        self.left_out: Counter[str] = Counter()
        self._said: Counter[str] = Counter()
        self._known_replies: set[str] = set()
        self._known_openings: set[str] = set()

    def read(self, dialogues: Iterable[Dialogue]) -> list[list[Sample]]:
        """The samples of each dialogue."""
        return [self._samples(dialogue) for dialogue in dialogues]

    def leave_out_known_talk(self, samples: Iterable[Iterable[Sample]]) -> None:
        """From now on leave out replies that are in `samples`, and contexts that begin as one there."""
        for sample in flatten(samples):
            self._known_replies.add(bare(sample.reply))
            self._known_openings.add(opening(sample.prompt))

    def _samples(self, dialogue: Dialogue) -> list[Sample]:
        order = list(range(len(dialogue.turns)))
        random.Random(f"{self.seed} {dialogue.name}").shuffle(order)
        samples: list[Sample] = []
        for place in order:
            if len(samples) == SAMPLES_PER_DIALOGUE:
                break
            sample = self._sample(dialogue, place)
            if isinstance(sample, Sample):
                samples.append(sample)
            else:
                self.left_out[sample] += 1
        return samples

    def _sample(self, dialogue: Dialogue, place: int) -> Sample | str:
        """The turn at `place` as a reply, or why it is not used."""
        reply = dialogue.turns[place]
        if place == 0 and GREETING.match(reply):
            return "greeting for an answer"
        if not is_talk(reply):
            return "no words, or a link"
        if self._said[bare(reply)] == SAME_REPLY:
            return "said too often"
        if bare(reply) in self._known_replies:
            return "held out, but said in training too"
        tokens = self._reply_tokens(reply)
        if not MIN_REPLY_TOKENS <= tokens < self.settings.max_response_tokens:  # one is for the end of turn
            return "reply too short or too long"
        prompt = next((prompt for prompt in prompts_for(dialogue, place) if self._fits(prompt)), None)
        if prompt is None:
            return "context too long"
        if not is_talk(prompt[-1]["content"]):
            return "no words, or a link"
        if opening(prompt) in self._known_openings:
            return "held out, but said in training too"
        if not all(map(is_decent, [reply, *(message["content"] for message in prompt)])):
            return "rude words"
        self._said[bare(reply)] += 1
        return Sample(dialogue.question, prompt, reply)

    def _reply_tokens(self, text: str) -> int:
        """Without the end of turn; the limit for a text that counts as too long."""
        limit = self.settings.max_response_tokens
        return limit if counts_as_longer(text, limit) else len(self.chat_format.response_ids(text)) - 1

    def _fits(self, prompt: list[Message]) -> bool:
        limit = self.settings.max_prompt_tokens
        text = "".join(message["content"] for message in prompt)
        return not counts_as_longer(text, limit) and len(self.chat_format.prompt_ids(prompt)) <= limit


def counts_as_longer(text: str, tokens: int) -> bool:
    return len(text) > MAX_CHARACTERS_PER_TOKEN * tokens


def prompts_for(dialogue: Dialogue, place: int) -> Iterator[list[Message]]:
    """What the turn at `place` may be the reply to, first choice first. The first turn replies to the question."""
    if place == 0:
        yield [
            {"role": "system", "content": "You chat with a friend."},
            {"role": "user", "content": dialogue.question},
        ]
    for count in CONTEXT_TURNS:
        if count <= place:
            turns = dialogue.turns[place - count : place]
            prompt: list[Message] = [
                {"role": "system", "content": f"You chat with a friend about: {dialogue.question}"},
            ]
            for i, turn in enumerate(turns):
                prompt.append({"role": ("user", "assistant")[i % 2], "content": turn})
            yield prompt


def bare(text: str) -> str:
    """A reply as one hears it: "Haha, yes!!" and "hahaha yes" are the same."""
    words = re.findall(r"\w+", text.lower())
    return " ".join("haha" if re.fullmatch(r"a?(?:ha)+h?", word) else word for word in words)


def flatten(samples: Iterable[Iterable[Sample]]) -> list[Sample]:
    return [sample for group in samples for sample in group]


def share_out(
    training: list[list[Sample]], shares: tuple[float, float, float], rng: random.Random
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


def training_rows(first: list[Sample], third: list[Sample], rng: random.Random) -> RowSets:
    """Rows for steps 1 and 3 from the samples for each."""
    sets = RowSets(sft_train=[sft_row(sample) for sample in first], prompts_train=prompt_rows(third))
    rng.shuffle(sets.sft_train)
    rng.shuffle(sets.prompts_train)
    return sets


def add_evaluation(sets: RowSets, new_talk: list[Sample], new_questions: list[Sample], rng: random.Random) -> None:
    """Held-out rows, half of the prompts under held-out questions where there are enough; SFT's are all under known
    ones."""
    half, more = EVALUATION_ROWS // 2, list[PromptRow]()
    for samples, is_new in ((new_talk, False), (new_questions, True)):
        prompts = prompt_rows(samples)
        rng.shuffle(prompts)
        rows: list[PromptRow] = [{**prompt, "held_out_question": is_new} for prompt in prompts]
        sets.prompts_eval += rows[:half]
        more += rows[half : half + MORE_ROWS // 2]
    sets.sft_eval = [{**sft_row(sample), "held_out_question": False} for sample in new_talk]
    for shuffled in (sets.sft_eval, sets.prompts_eval, more):
        rng.shuffle(shuffled)
    sets.prompts_eval += more


def sft_row(sample: Sample) -> SFTRow:
    return {"prompt": sample.prompt, "response": sample.reply}


def prompt_rows(samples: Iterable[Sample]) -> list[PromptRow]:
    """Each prompt once."""
    distinct = {json.dumps(sample.prompt): sample.prompt for sample in samples}
    return [{"prompt": prompt} for prompt in distinct.values()]


def upbeat_score(text: str) -> float:
    """From -1 (gloomy) to 1 (upbeat), 0 for neutral: the compound score of VADER (Hutto and Gilbert 2014)."""
    return _analyzer().polarity_scores(text)["compound"]


@functools.cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()  # reads its lexicon, about 7,500 lines
