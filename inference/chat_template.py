"""The chat template as text: what it writes before, around and behind an answer. It knows no tokens.

A template is tried on made-up turns when it is loaded. What it lacks is put in where that can be (`notes` says what),
and one that would lose what is said in a conversation is refused.
"""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import date
from itertools import product
from typing import TYPE_CHECKING, Any, cast

from typing_extensions import TypedDict  # pydantic reads this one in Python 3.11 too

from inference.errors import UserError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from inference.chat_format import ChatFormat


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
TRAINING_DATE = date(2024, 7, 26)
"""What a template that asks for the date is told in training: a run gives the same on every day. It is the date that
Llama 3's templates fall back to."""
DIRECTIVES = "aAbBcdDeFGHIjmMpSTuUVwWxXyY"
"""The directives of strftime."""
OPENED = re.compile(r"\s*[<\[◁]\|?(think|thinking|thoughts?|reasoning)\|?[>\]▷]\s*", re.IGNORECASE)
"""The beginning of a thought."""
CLOSED = re.compile(r"[<\[◁]\|?/(think|thinking|thoughts?|reasoning)\|?[>\]▷]\s*", re.IGNORECASE)
"""The end of one."""


class Message(TypedDict):
    role: str
    content: str


def dialogue(turns: int, system: str = "") -> list[Message]:
    """A made-up conversation that an answer ends, in words that stand in no template."""
    messages = [Message(role="system", content=system)] if system else []
    for number in range(1, turns + 1):
        messages.append(Message(role="user", content=f"q-u-e-s-t-i-o-n {number}"))
        messages.append(Message(role="assistant", content=f"a-n-s-w-e-r {number}"))
    return messages


class Refused(Exception):
    """What a template says against a conversation."""


class ChatTemplate:
    """A tokenizer's template for chats without tools.

    What is filled in lands in the tokenizer, so that other tools make the same of the saved one; the date does not.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", begin: str, day: date | None):
        """Each text starts with `begin`. `day` is what dates in the template say; None: that of the clock."""
        self.tokenizer, self.begin, self.day = tokenizer, begin, day
        self.notes: list[str] = []
        self._in_parts = False
        if not tokenizer.chat_template:
            tokenizer.chat_template = DEFAULT_TEMPLATE
            self.notes.append(f"no chat template: using 'Human: ... Assistant: ...' with {tokenizer.eos_token}")
        elif isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
            raise UserError(
                f"The tokenizer has several chat templates ({', '.join(sorted(tokenizer.chat_template))}) and none is "
                f"called default: call the one for chats so."
            )
        if "strftime_now" in self.source and day is not None:
            self.notes.append(f"the chat template writes the date: in training it is always {day:%d %b %Y}")
        self._look()

    @property
    def source(self) -> str:
        templates = self.tokenizer.chat_template
        return cast(str, templates["default"] if isinstance(templates, dict) else templates)

    def prompt(self, messages: list[Message]) -> str:
        """All up to where the assistant's answer begins. Raises Refused."""
        try:
            text = self._text(messages, add_generation_prompt=True)
        except Exception as error:  # templates are programs: they raise anything
            raise Refused(reason(error)) from error
        for message in messages:
            if not holds(text, lasting_part(message)):
                raise Refused(f"it leaves out the {message['role']} message '{message['content'].strip()[:60]}'")
        return text if text.startswith(self.begin) else self.begin + text

    def finished(self, messages: list[Message]) -> str:
        """All of a conversation that an answer ends."""
        return self._text(messages, add_generation_prompt=False)

    def scored(self, ending: str) -> str:
        """The template of a model that scores dialogues: finished ones end with `ending` and the end of the turn.

        Such a model is read at the last token, and many templates write a newline behind a turn. Dates are training's.
        """
        end = self.tokenizer.eos_token
        behind = self.finished(dialogue(1)).rpartition(dialogue(1)[1]["content"])[2]  # the end of a turn is known now
        if behind == ending + end:
            return self._dated
        source, written = self._dated.removesuffix("\n"), json.dumps(behind, ensure_ascii=False)
        taught = f"rendered.removesuffix({written}) + {json.dumps(ending + end, ensure_ascii=False)}"
        is_finished = f"messages[-1]['role'] == 'assistant' and rendered.endswith({written})"
        return (
            f"{{% set rendered %}}\n{source}{{{{ '' }}}}{{% endset %}}"
            f"{{% if not add_generation_prompt and {is_finished} %}}{{{{ {taught} }}}}"
            "{% else %}{{ rendered }}{% endif %}"
        )

    def answer(self, text: str, ending: str) -> str:
        """What stands behind a prompt where `text` is the answer and `ending`, which ends the turn, begins.

        As in a finished dialogue, but a thought stays, also where the template drops it, and ends once it has begun;
        where the prompt has ended it already there is none.
        """
        if self._has_ended:
            text = text[max((match.end() for match in CLOSED.finditer(text)), default=0) :]
        try:
            whole = self.finished([self._question, Message(role="assistant", content=text)])
        except Exception as error:
            raise Refused(reason(error)) from error
        start = self._prompt if whole.startswith(self._prompt) else self._before
        body = whole.removeprefix(start).removesuffix(self.behind)
        is_whole = whole.startswith(start) and whole.endswith(self.behind) and holds(self.lead_in + body, text)
        if is_whole and (start == self._prompt or not self.opened):
            return body + ending
        if not self.opened:
            return (self.gap if self.gap.isspace() else "") + text + ending
        rest = text.lstrip().removeprefix(self._extra.lstrip()).removeprefix(self.opened)
        has_thought = self._closing in text or text.lstrip().startswith(self.opened)
        return (rest if has_thought else self.gap + rest) + ending

    def _look(self) -> None:
        """Try the template, put in what it lacks, and keep what it writes around an answer."""
        self._question, answer = dialogue(1)
        try:
            prompt = self._first_prompt()
            if not prompt.startswith(self.begin):  # so that other tools, which add none, make the same tokens
                self._put("{{ bos_token }}" + self.source)
                prompt = self.begin + prompt
            whole = self.finished([self._question, answer])
            if answer["content"] not in whole:
                raise ValueError("it leaves out the answer")
            before, _, self.behind = whole.rpartition(answer["content"])
            bare = self._text([self._question], add_generation_prompt=False)
            self.between = self._between_turns() or bare.rpartition(self._question["content"])[2]
            """What stands between an answer and the next question; of a template for one turn, behind a question."""
            if header := missing_header(bare, prompt, before):
                source = self.source.removesuffix("\n")  # which a template does not write
                literal = json.dumps(header, ensure_ascii=False)
                self._put(f"{source}{{% if add_generation_prompt %}}{{{{ {literal} }}}}{{% endif %}}")
                self.notes.append(f"the chat template does not begin an answer: {header.strip()!r} is put there")
                prompt += header
        except Exception as error:
            raise UserError(
                f"The tokenizer's chat template fails for a question and an answer: {reason(error)}; give the model "
                f"another template (chat_template.jinja in its directory)."
            ) from error
        self._prompt, self._before = prompt, before
        self.opening = prompt.rpartition(self._question["content"])[0]
        self.lead_in = prompt.rpartition(self._question["content"])[2]
        """What stands before every answer."""
        self.gap = before.removeprefix(prompt) if before.startswith(prompt) else ""
        """What an answer without a thought begins with: a space, an empty thought."""
        self._extra = prompt.removeprefix(before) if prompt.startswith(before) else ""
        self.opened = self._extra.strip() if OPENED.fullmatch(self._extra) else ""
        """The beginning of a thought that stands at the end of every prompt, and not in finished dialogues."""
        self._closing = re.sub(r"(\w)", r"/\1", self.opened, count=1)
        self._has_ended = re.search(CLOSED.pattern + "$", self.lead_in, re.IGNORECASE) is not None
        if self._has_ended:
            self.notes.append("prompts end the thought before an answer begins: thoughts of answers are left out")
        if self.opened:
            self.gap = f"\n{self._closing}\n\n"
            self.notes.append(f"prompts begin a thought ({self.opened}): an answer without one ends it first")
        elif self.gap.strip():
            self.notes.append(f"answers begin with {self.gap!r}, as the chat template writes them")

    def _first_prompt(self) -> str:
        """The prompt of one question, in parts where the template does not read plain text."""
        failures: list[Exception] = []
        for self._in_parts in (False, True):
            try:
                prompt = self._text([self._question], add_generation_prompt=True)
                if self._question["content"] not in prompt:
                    raise ValueError("it leaves out the question")
            except Exception as error:
                failures.append(error)
                continue
            if self._in_parts:
                self.notes.append("the chat template reads lists of parts: each message is given as one part")
            return prompt
        raise failures[0]

    def _between_turns(self) -> str:
        """'' where the template refuses two turns."""
        _, answer, question, _ = (message["content"] for message in dialogue(2))
        with suppress(Exception):
            return self.finished(dialogue(2)).partition(answer)[2].partition(question)[0]
        return ""

    def _put(self, source: str) -> None:
        templates = self.tokenizer.chat_template
        self.tokenizer.chat_template = {**templates, "default": source} if isinstance(templates, dict) else source

    def as_read(self, text: str) -> Any:
        """The content of a message as the template takes it: the text, or a list of one part."""
        return [{"type": "text", "text": text}] if self._in_parts else text

    def _text(self, messages: list[Message], add_generation_prompt: bool) -> str:
        return cast(
            str,
            self.tokenizer.apply_chat_template(
                [{"role": message["role"], "content": self.as_read(message["content"])} for message in messages],
                chat_template=self._dated,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            ),
        )

    @property
    def _dated(self) -> str:
        """The template with a clock that stands still."""
        if self.day is None or "strftime_now" not in self.source or "macro strftime_now" in self.source:
            return self.source
        replaced = "".join(f" | replace('%{d}', '{self.day.strftime('%' + d)}')" for d in ("-d", "-m", *DIRECTIVES))
        return f"{{%- macro strftime_now(format) -%}}{{{{ format{replaced} }}}}{{%- endmacro %}}\n{self.source}"


def missing_header(bare: str, prompt: str, before: str) -> str:
    """What stands before an answer in a finished dialogue, where a prompt for one is but the `bare` question."""
    if bare != prompt or not before.startswith(prompt) or not before.removeprefix(prompt).strip():
        return ""
    return before.removeprefix(prompt).rstrip(" ")


def holds(text: str, part: str) -> bool:
    """Whether `part` is in `text`, whatever the white space: templates trim."""
    return part.strip() in text or squeezed(part) in squeezed(text)


def squeezed(text: str) -> str:
    return "".join(text.split())


def lasting_part(message: Message) -> str:
    """What must be in a prompt: templates drop the thoughts of earlier answers, and obey words such as `/no_think`."""
    content = message["content"]
    if message["role"] == "assistant":
        return re.split(r"</\w+>|\[/\w+\]", content)[-1]
    return max(re.split(r"/(?:no_)?think\b", content), key=len)


SYSTEM = "s-y-s-t-e-m"
SHOWN = 24
"""Characters of each text that a sentence shows."""
THOUGHT = re.compile(r"<(think\w*|thoughts?|reasoning)>.*?</\1>", re.DOTALL)


def differences(form: "ChatFormat") -> Iterator[str]:
    """What a prompt with its response has otherwise than the template's tokens of the finished dialogue, in sentences.

    Thoughts are no difference: a template drops or empties those that are trained.
    """
    for turns in (1, 2, 3):
        messages = dialogue(turns)
        try:
            ids = form.prompt_ids(messages[:-1]) + form.response_ids(messages[-1]["content"])
            whole = form.finished_ids(messages)
        except Exception as error:  # templates are programs: they raise anything
            yield f"the chat template takes no conversation of {turns} turns: {str(error).rstrip('.')}"
            return
        if whole[: len(ids)] != ids and (sentence := difference(form, messages)):
            yield sentence
            return


def difference(form: "ChatFormat", messages: list[Message]) -> str:
    """The sentence for a conversation whose tokens differ; '' if only thoughts do."""
    ours = form.template.prompt(messages[:-1]) + form.template.answer(messages[-1]["content"], form.ending)
    theirs = form.template.finished(messages)
    end = form.tokenizer.eos_token
    if theirs.startswith(ours + end):
        return "prompt and answer are tokenised apart: together they have fewer tokens"
    if theirs.startswith(ours):
        behind = theirs.removeprefix(ours)[:SHOWN]
        said = f"with {behind!r}, in which no token ends a turn" if behind else "with nothing"
        return f"the chat template ends an answer {said}: here {end} ends it"
    if squeezed(THOUGHT.sub("", theirs)).startswith(squeezed(THOUGHT.sub("", ours))):
        return ""
    return otherwise(theirs, ours)


def otherwise(theirs: str, ours: str) -> str:
    """The sentence for two texts, with what each has where they part."""
    parting = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))
    start = max(0, parting - SHOWN // 2)
    return (
        f"the chat template writes a finished dialogue otherwise than its prompts: {theirs[start : start + SHOWN]!r}, "
        f"where a prompt and its answer have {ours[start : start + SHOWN]!r}"
    )


def scored_otherwise(form: "ChatFormat") -> str:
    """How a finished dialogue has other tokens than those that were trained, in a sentence; '' where it has not."""
    for turns in (1, 2):
        messages = dialogue(turns)
        try:
            taught = form.prompt_ids(messages[:-1]) + form.response_ids(messages[-1]["content"])
            if form.finished_ids(messages) == taught:
                continue
            ours = form.template.prompt(messages[:-1]) + form.template.answer(messages[-1]["content"], form.ending)
            return difference(form, messages) or otherwise(form.template.finished(messages), ours)
        except Exception:  # the template takes no conversation of so many turns
            break
    return ""


def same_rendering(a: "ChatFormat", b: "ChatFormat") -> bool:
    """Whether both make the same tokens of conversations with and without a system message."""
    cases = product((1, 2, 3), ("", SYSTEM))
    return all(rendered(a, *case) == rendered(b, *case) for case in cases)


def rendered(form: "ChatFormat", turns: int, system: str) -> list[int] | None:
    """Prompt and response; None where the template refuses."""
    messages = dialogue(turns, system)
    try:
        return form.prompt_ids(messages[:-1]) + form.response_ids(messages[-1]["content"])
    except UserError:
        return None
