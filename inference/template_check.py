"""A chat template compared with itself, and with another one, on made-up conversations of one, two and three turns."""

import re
from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING

from inference.chat_template import Message, dialogue, squeezed
from inference.errors import UserError

if TYPE_CHECKING:
    from inference.chat_format import ChatFormat

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
    """The sentence for two texts, with the places where they part."""
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
