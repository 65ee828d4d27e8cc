"""How a conversation becomes tokens: the one place that knows the chat template and the end of a turn.

All three steps and chat use this class, so that a prompt has the same tokens everywhere and one token ends a turn
everywhere. Prompt and response are tokenised apart, as generation produces them; where the tokenizer has a boundary
between them, as byte-level ones do, the two together are the tokens of the whole text.
"""

import copy
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from inference.chat_template import TRAINING_DATE, ChatTemplate, Message, Refused, dialogue, differences
from inference.errors import UserError, copied_again
from inference.model_files import require_usable
from inference.weights import quiet_transformers, rewrite_tokenizer

PAD_TOKEN = "<|pad|>"
STAND_IN = "\ufdd0", "\ufdd1"
"""Around a number, in the place of a special token's name in a message; Unicode has them for such uses."""


@dataclass(frozen=True)
class Prompt:
    """Tokens up to where an answer begins, and what of the messages they leave out."""

    ids: list[int]
    left_out: int = 0
    """The oldest messages."""
    is_cut: bool = False
    """Whether what is left has lost its beginning too."""

    @property
    def note(self) -> str:
        """What is left out, in a sentence; '' where nothing is."""
        oldest = "its oldest message" if self.left_out == 1 else f"its oldest {self.left_out} messages"
        parts = [oldest] * (self.left_out > 0) + ["the beginning of the last one"] * self.is_cut
        told = f"The conversation is longer than the model's context: {' and '.join(parts)} had to be left out."
        return told if parts else ""


class ChatFormat:
    """A tokenizer with a chat template, an end-of-turn token and a pad token that differs from it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int] = (), day: date | None = TRAINING_DATE
    ):
        """Fill in what the tokenizer lacks; `notes` says what was filled in, and what the template does otherwise.

        `end_ids` end an answer beside the end of a turn; `day` is what a date in the template says, see `ChatTemplate`.
        """
        self.tokenizer = tokenizer
        if tokenizer.eos_token is None:
            raise UserError("The tokenizer has no end-of-sequence token (eos_token); set one in tokenizer_config.json.")
        begins = tokenizer.encode("a", verbose=False)[:1] == [tokenizer.bos_token_id]
        begin: str = tokenizer.bos_token if begins else ""  # OPT and Llama put one before each text
        self.template = ChatTemplate(tokenizer, begin, day)
        self.notes = self.template.notes
        ends = [tokenizer.eos_token_id, *end_ids]
        self.end_of_turn_id: int = self._find_end_of_turn()
        self._make_special(self.end_of_turn_id)
        tokenizer.eos_token_id = self.end_of_turn_id
        end = tokenizer.eos_token
        behind = self.template.behind
        self.ending: str = behind.partition(end)[0] if end in behind else ""
        """What the template writes between an answer and the end of the turn."""
        used = self._encode(self.template.finished(dialogue(1)))
        with suppress(Refused):
            used += self._encode(self.template.prompt(dialogue(1, system="s-y-s-t-e-m")[:-1]))
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id == self.end_of_turn_id:
            self._choose_pad(used)
        self.pad_id: int = tokenizer.pad_token_id
        self.end_ids = tuple(dict.fromkeys([self.end_of_turn_id, *(i for i in ends if 0 <= i < self.vocabulary_size)]))
        """All tokens that end an answer; the first one is the end of a turn, which training teaches."""
        self._special_ids = special_ids(tokenizer)
        special = sorted(tokenizer.convert_ids_to_tokens(list(self._special_ids)), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, [*special, STAND_IN[0]])))
        self._framing = self._special_ids & set(used)  # what the template may write around an answer
        self._head = self._encode(self.template.lead_in)
        self._shown_gap = self._decode(self._encode(self.template.gap))
        self.differences = list(differences(self))
        """How trained rows differ from the template's own finished dialogues, in sentences; thoughts do not count."""
        self.notes += self.differences

    @classmethod
    def load(cls, directory: str | Path, day: date | None = TRAINING_DATE) -> "ChatFormat":
        """The format of a local model directory. Raises UserError where there is no usable tokenizer."""
        require_usable(Path(directory))
        try:
            with quiet_transformers():
                tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds here, all of them about the directory's files
            if package := missing_package(Path(directory)):
                raise UserError(f"The tokenizer in {directory} needs a package: pip install {package}.") from error
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(f"{directory} holds no tokenizer that can be loaded ({reason}).") from error
        if not tokenizer.encode("Hello", add_special_tokens=False):
            # transformers makes up an empty tokenizer where the files of one are missing
            raise UserError(f"{directory} has no tokenizer files; copy the model with its tokenizer again.")
        of_processor = Path(directory) / "chat_template.json"  # where models that read images had theirs
        if not tokenizer.chat_template and of_processor.is_file():
            tokenizer.chat_template = read_values(of_processor).get("chat_template")
        return cls(tokenizer, generation_ends(Path(directory), tokenizer), day)

    def save(self, directory: str | Path, scored: bool = False) -> None:
        """Write the tokenizer, as transformers 4 reads it too.

        `scored` is for a reward model, read at a dialogue's last token: by the usual chat template, also as text, a
        finished dialogue then has the tokens that training gave it.
        """
        tokenizer, more = self.tokenizer, dict[str, Any]()
        if scored:
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.chat_template = self.template.scored(self.ending)
            more["padding_side"] = "right"  # GPT-2 and GPT-Neo count positions from the first token, padding or not
            if self.template.begin and tokenizer.is_fast:  # the template writes it
                cast(Any, tokenizer).backend_tokenizer.post_processor = TemplateProcessing("$A", "$A $B:1")
                more["add_bos_token"] = False
        tokenizer.save_pretrained(str(directory))
        rewrite_tokenizer(Path(directory), **more)

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest token id."""
        return max(self.tokenizer.get_vocab().values()) + 1  # more than there are tokens where ids have gaps

    def prompt_ids(self, messages: list[Message], max_tokens: int = 0) -> list[int]:
        """The tokens of `prompt`."""
        return self.prompt(messages, max_tokens).ids

    def prompt(self, messages: list[Message], max_tokens: int = 0) -> Prompt:
        """All up to where the assistant's answer begins; 0 sets no limit.

        What looks like a special token in a message is plain text: only the template begins and ends turns.
        Over `max_tokens` the oldest turns are dropped, so that the first one left is not the assistant's. A system
        message stays. If the last turn alone is too long, its text loses its beginning.
        """
        ids = self._render(messages)
        if max_tokens <= 0 or len(ids) <= max_tokens:
            return Prompt(ids)
        system = [m for m in messages[:1] if m["role"] == "system"]
        turns = messages[len(system) :]
        while len(turns) > 1 and len(ids) > max_tokens:
            turns = turns[1:]
            while len(turns) > 1 and turns[0]["role"] == "assistant":  # many templates refuse to begin with an answer
                turns = turns[1:]
            ids = self._render(system + turns)
        left_out = len(messages) - len(system) - len(turns)
        if len(ids) <= max_tokens or not turns:
            return Prompt(ids[-max_tokens:], left_out, is_cut=len(ids) > max_tokens)
        return Prompt(self._cut_turn(system, turns[0], max_tokens), left_out, is_cut=True)

    def refusal(self, messages: list[Message]) -> str:
        """Why the template refuses a prompt, in its own words; empty where it takes it."""
        try:
            self.template.prompt(messages)
        except Refused as refused:
            return str(refused)
        return ""

    def response_ids(self, text: str, max_tokens: int = 0) -> list[int]:
        """Tokens of an answer with its end-of-turn token; over `max_tokens` it is cut and the end token is lost.

        The tokens are those of the template's finished dialogue, see `ChatTemplate.answer`. What looks like a special
        token in `text` is plain text, so only the last token ends the turn.
        """
        ids = [*self._answer_ids(text, self.ending), self.end_of_turn_id]
        return ids[:max_tokens] if max_tokens > 0 else ids

    def begun_ids(self, text: str) -> list[int]:
        """The tokens of an answer that begins with `text`, behind those of its prompt."""
        return self._answer_ids(text, "") if text else []

    def _answer_ids(self, text: str, ending: str) -> list[int]:
        (shown,), hidden = self._hide([Message(role="assistant", content=text)])
        try:
            body = self.template.answer(shown["content"], ending)
        except Refused as refused:
            raise UserError(f"The model's chat template refuses the answer '{text[:60]}' ({refused}).") from None
        head = self._head
        whole = self._encode_shown(self.template.lead_in + body, hidden)
        ids = whole[len(head) :] if whole[: len(head)] == head else self._encode_shown(body, hidden)
        if not (self._special_ids - self._framing).isdisjoint(ids) or self.end_of_turn_id in ids:
            ids = self._encode(self.template.gap + text, plain=True)
        return ids

    def finished_ids(self, messages: list[Message]) -> list[int]:
        """The template's own tokens of a conversation that an answer ends."""
        shown, hidden = self._hide(messages)
        return self._encode_shown(self.template.finished(shown), hidden)

    def as_taught(self, response_ids: Sequence[int]) -> list[int]:
        """A response as training would have it: with the end of the turn instead of another token that ends."""
        ids = list(response_ids)
        return [*ids[:-1], self.end_of_turn_id] if ids and ids[-1] in self.end_ids else ids

    def decode(self, ids: list[int]) -> str:
        """Text of a response, without special tokens and without what the template puts around an answer.

        The text of some first tokens is the beginning of that of more.
        """
        text = self._decode(ids[:-1] if ids and ids[-1] in self.end_ids else ids)
        if self._shown_gap.startswith(text):
            return ""
        return text.removeprefix(self._shown_gap).removesuffix(self.ending)

    def _cut_turn(self, system: list[Message], turn: Message, max_tokens: int) -> list[int]:
        """A prompt of one turn, whose text loses as many of its first tokens as it must."""
        content = self._encode(turn["content"], plain=True)
        uncut = ids = self._render([*system, turn])
        while len(ids) > max_tokens:
            content = content[len(ids) - max_tokens :]
            if not content:  # what the template and the system message add is too long already
                return uncut[-max_tokens:]
            text = cast(str, self.tokenizer.decode(content, clean_up_tokenization_spaces=False))
            text = text.lstrip("\ufffd")  # the rest of a character that was cut
            ids = self._render([*system, {"role": turn["role"], "content": text}])
        return ids

    def _render(self, messages: list[Message]) -> list[int]:
        shown, hidden = self._hide(messages)
        try:
            return self._encode_shown(self.template.prompt(shown), hidden)
        except Refused as refused:
            end = messages[-1]["content"][:60] if messages else ""
            raise UserError(
                f"The model's chat template refuses the conversation ending in '{end}' ({refused})."
            ) from None

    def _hide(self, messages: list[Message]) -> tuple[list[Message], list[str]]:
        """The messages with stand-ins for what looks like special tokens, and that."""
        hidden: list[str] = []

        def hide(match: re.Match[str]) -> str:
            hidden.append(match[0])
            return f"{STAND_IN[0]}{len(hidden) - 1}{STAND_IN[1]}"

        return [Message(role=m["role"], content=self._special.sub(hide, m["content"])) for m in messages], hidden

    def _encode_shown(self, text: str, hidden: list[str]) -> list[int]:
        """Tokens of a text with stand-ins."""
        if not hidden:
            return self._encode(text)
        parts = re.split(f"{STAND_IN[0]}([0-9]+){STAND_IN[1]}", text)  # every second one is a number
        encoded = (self._encode(hidden[int(p)], plain=True) if i % 2 else self._encode(p) for i, p in enumerate(parts))
        return [token for part in encoded for token in part]

    def _encode(self, text: str, plain: bool = False) -> list[int]:
        """Tokens of `text` and no others; `plain` reads no special tokens in it."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=plain, verbose=False)

    def _decode(self, ids: list[int]) -> str:
        return cast(str, self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _find_end_of_turn(self) -> int:
        """The first token of its own kind that the template puts behind an answer, unless it begins answers too;
        without one, the end-of-sequence token."""
        added = self.tokenizer.added_tokens_decoder
        named = {i for i in added if not added[i].content.isspace()} | set(self.tokenizer.all_special_ids)
        begins = {*self._encode(self.template.lead_in)} - {*self._encode(self.template.between)}
        opening = (i for i in self._encode(self.template.opening) if i in named and i != self.tokenizer.bos_token_id)
        begins = begins | {next(opening, None), self.tokenizer.bos_token_id} - {self.tokenizer.eos_token_id}
        ends = (i for i in self._encode(self.template.behind) if i in named and i not in begins)
        return next(ends, self.tokenizer.eos_token_id)

    def _make_special(self, token_id: int) -> None:
        """Make the token plain text in a message, and hidden in an answer."""
        token = self.tokenizer.added_tokens_decoder.get(token_id)
        if token is not None and not token.special:
            token.special = True
            self.tokenizer.add_special_tokens({"eos_token": token})

    def _choose_pad(self, used: list[int]) -> None:
        """A spare special token if the vocabulary has one that the template has not `used`, else a new one.

        With a new one the model's embeddings have to grow.
        """
        spare = [self.tokenizer.unk_token_id, *sorted(self.tokenizer.added_tokens_decoder)]
        special = special_ids(self.tokenizer)
        taken = {*used, self.end_of_turn_id, self.tokenizer.bos_token_id}
        for token_id in spare:
            if token_id not in special or token_id in taken:
                continue
            if str(self.tokenizer.convert_ids_to_tokens(token_id)) not in self.template.source:
                self.tokenizer.pad_token_id = token_id
                break
        else:
            self.tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
            if list(self.tokenizer.get_vocab().values()).count(self.tokenizer.pad_token_id) > 1:  # ids have gaps
                raise UserError("The tokenizer has no pad token and no free id for one; give it a pad token.")
        self.notes.append(f"pad token: {self.tokenizer.pad_token} (must differ from the end-of-turn token)")


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)


def missing_package(directory: Path) -> str:
    """What reads the only file that a tokenizer has, where it is not installed; '' for other files."""
    if (directory / "tokenizer.json").is_file():
        return ""
    for file in sorted(directory.glob("*.model")) + sorted(directory.glob("*.tiktoken")):
        with open(file, "rb") as opened:
            is_text = re.fullmatch(rb"[A-Za-z0-9+/=]+ \d+", opened.readline(1000).strip())  # a token and its rank
        package = "tiktoken" if is_text else "sentencepiece"
        return package if find_spec(package) is None else ""
    return ""


def read_values(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); {copied_again(error)}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged: it holds no names with values; copy the model again.")
    return values


def generation_ends(directory: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that generation_config.json lets an answer end with; without that file, those of config.json.

    Configurations have an end by default, so that config.json counts only where its ids are tokens of their own kind.
    """
    for name, allowed in (("generation_config.json", None), ("config.json", special_ids(tokenizer))):
        if not (directory / name).is_file():
            continue
        given = read_values(directory / name).get("eos_token_id")
        ids = given if isinstance(given, list) else [given]
        return [i for i in ids if type(i) is int and (allowed is None or i in allowed)]
    return []
