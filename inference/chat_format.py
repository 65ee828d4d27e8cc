"""How a conversation becomes tokens: the one place that knows the chat template and the end of a turn.

All three steps and chat use this class, so that a prompt has the same tokens everywhere and one token ends a turn
everywhere. Prompt and response are tokenised apart, as generation produces them; where the tokenizer has a boundary
between them, as byte-level ones do, the two together are the tokens of the whole text.
"""

import re
from pathlib import Path
from typing import TypedDict, cast

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from inference.errors import UserError
from inference.model_files import require_usable

# The space belongs to the response: byte-level tokenizers have tokens for words with a space before them, and a model
# has hardly ever seen a lone space followed by a word.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'Human: ' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] + eos_token + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
PAD_TOKEN = "<|pad|>"
STAND_IN = "\ufdd0", "\ufdd1"
"""Around a number, in the place of a special token's name in a message; Unicode has them for such uses."""


class Message(TypedDict):
    role: str
    content: str


class ChatFormat:
    """A tokenizer with a chat template, an end-of-turn token and a pad token that differs from it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        """Fill in what the tokenizer lacks; `notes` says what was filled in."""
        self.tokenizer = tokenizer
        self.notes: list[str] = []
        if tokenizer.eos_token is None:
            raise UserError("The tokenizer has no end-of-sequence token (eos_token); set one in tokenizer_config.json.")
        if not tokenizer.chat_template:
            tokenizer.chat_template = DEFAULT_TEMPLATE
            self.notes.append(f"no chat template: using 'Human: ... Assistant: ...' with {tokenizer.eos_token}")
        self._special_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids |= set(tokenizer.all_special_ids)
        begins = tokenizer.encode("a", verbose=False)[:1] == [tokenizer.bos_token_id]
        self._begin: str = tokenizer.bos_token if begins else ""  # OPT and Llama put one before each text
        question: Message = {"role": "user", "content": "question"}
        try:
            prompt = self._text([question], add_generation_prompt=True)
            if not prompt.startswith(self._begin):  # so that other tools, which add none, make the same tokens
                tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
                prompt = self._text([question], add_generation_prompt=True)
            dialogue = self._text([question, {"role": "assistant", "content": "answer"}], add_generation_prompt=False)
        except TemplateError as error:
            raise UserError(f"The tokenizer's chat template fails for a question and an answer: {error}.") from error
        self._lead_in = prompt.rpartition("question")[2]  # what stands before every response
        gap = dialogue.removeprefix(prompt).partition("answer")[0]
        self._gap = gap if gap.isspace() else ""  # what a response begins with
        self.end_of_turn_id: int = self._find_end_of_turn(behind=dialogue.rpartition("answer")[2])
        tokenizer.eos_token_id = self.end_of_turn_id
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id == self.end_of_turn_id:
            self._choose_pad(used=self._encode(dialogue))
        self.pad_id: int = tokenizer.pad_token_id
        self._special_ids.add(self.pad_id)
        special = sorted(tokenizer.convert_ids_to_tokens(list(self._special_ids)), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, [*special, STAND_IN[0]])))

    @classmethod
    def load(cls, directory: str | Path) -> "ChatFormat":
        """The format of a local model directory. Raises UserError where there is no usable tokenizer."""
        require_usable(Path(directory))
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds here, all of them about the directory's files
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(f"{directory} holds no tokenizer that can be loaded ({reason}).") from error
        if not tokenizer.encode("Hello", add_special_tokens=False):
            # transformers makes up an empty tokenizer where the files of one are missing
            raise UserError(f"{directory} has no tokenizer files; copy the model with its tokenizer again.")
        return cls(tokenizer)

    def save(self, directory: str | Path) -> None:
        self.tokenizer.save_pretrained(str(directory))

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest token id."""
        return len(self.tokenizer)

    def prompt_ids(self, messages: list[Message], max_tokens: int = 0) -> list[int]:
        """Tokens up to where the assistant's answer begins; 0 sets no limit.

        What looks like a special token in a message is plain text: only the template begins and ends turns.
        Over `max_tokens` the oldest turns are dropped, so that the first one left is not the assistant's. A system
        message stays. If the last turn alone is too long, its text loses its beginning.
        """
        ids = self._render(messages)
        if max_tokens <= 0 or len(ids) <= max_tokens:
            return ids
        system = [m for m in messages[:1] if m["role"] == "system"]
        turns = messages[len(system) :]
        while len(turns) > 1 and len(ids) > max_tokens:
            turns = turns[1:]
            while len(turns) > 1 and turns[0]["role"] == "assistant":  # many templates refuse to begin with an answer
                turns = turns[1:]
            ids = self._render(system + turns)
        if len(ids) <= max_tokens or not turns:
            return ids[-max_tokens:]
        return self._cut_turn(system, turns[0], max_tokens)

    def refusal(self, messages: list[Message]) -> str:
        """Why the template refuses a prompt, in its own words; empty where it takes it."""
        try:
            self._text(messages, add_generation_prompt=True)
        except Exception as error:  # a template fails as any code may: raise_exception, an index, a type
            return str(error).strip().rstrip(".") or type(error).__name__
        return ""

    def response_ids(self, text: str, max_tokens: int = 0) -> list[int]:
        """Tokens of an answer with its end-of-turn token; over `max_tokens` it is cut and the end token is lost.

        What looks like a special token in `text` is plain text, so only the last token ends the turn.
        """
        head = self._encode(self._lead_in)
        whole = self._encode(self._lead_in + self._gap + text)
        ids = whole[len(head) :]
        if whole[: len(head)] != head or not self._special_ids.isdisjoint(ids):
            ids = self._encode(self._gap + text, plain=True)
        ids.append(self.end_of_turn_id)
        return ids[:max_tokens] if max_tokens > 0 else ids

    def decode(self, ids: list[int]) -> str:
        """Text of a response, without special tokens and without the space that the template puts before it."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return cast(str, text).removeprefix(self._gap)

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
        hidden: list[str] = []

        def hide(found: re.Match[str]) -> str:
            hidden.append(found[0])
            return f"{STAND_IN[0]}{len(hidden) - 1}{STAND_IN[1]}"

        shown = [Message(role=m["role"], content=self._special.sub(hide, m["content"])) for m in messages]
        try:
            text = self._text(shown, add_generation_prompt=True)
        except TemplateError as error:
            begin = messages[-1]["content"][:60] if messages else ""
            raise UserError(
                f"The model's chat template refuses the conversation ending in '{begin}' ({error})."
            ) from error
        text = text if text.startswith(self._begin) else self._begin + text
        if not hidden:
            return self._encode(text)
        parts = re.split(f"{STAND_IN[0]}([0-9]+){STAND_IN[1]}", text)  # every second one is a number
        encoded = (self._encode(hidden[int(p)], plain=True) if i % 2 else self._encode(p) for i, p in enumerate(parts))
        return [token for part in encoded for token in part]

    def _text(self, messages: list[Message], add_generation_prompt: bool) -> str:
        turns = cast(list[dict[str, str]], messages)
        return cast(
            str,
            self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt),
        )

    def _encode(self, text: str, plain: bool = False) -> list[int]:
        """Tokens of `text` and no others; `plain` reads no special tokens in it."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=plain, verbose=False)

    def _find_end_of_turn(self, behind: str) -> int:
        """The special token in what the template puts `behind` an answer; without one, the end-of-sequence token."""
        found = (token for token in self._encode(behind) if token in self._special_ids)
        return next(found, self.tokenizer.eos_token_id)

    def _choose_pad(self, used: list[int]) -> None:
        """A spare special token if the vocabulary has one that the template has not `used`, else a new one.

        With a new one the model's embeddings have to grow.
        """
        spare = [self.tokenizer.unk_token_id, *sorted(self.tokenizer.added_tokens_decoder)]
        taken = {*used, self.end_of_turn_id, self.tokenizer.bos_token_id}
        for token_id in spare:
            if token_id in self._special_ids and token_id not in taken:
                self.tokenizer.pad_token_id = token_id
                break
        else:
            self.tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
        self.notes.append(f"pad token: {self.tokenizer.pad_token} (must differ from the end-of-turn token)")
