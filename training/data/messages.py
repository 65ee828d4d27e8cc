"""Lists of messages in the spellings that people have -> messages with role and content.

A message is {"role": ..., "content": text} or, as ShareGPT has it, {"from": ..., "value": text}. A list of them may
also stand in a text, as JSON or as Python writes it: a table that was saved as CSV has it so.
"""

import ast
import json
import re
import warnings
from functools import lru_cache
from typing import Any

from inference.chat_template import Message
from training.data.entries import BadRow

ROLES = ("system", "user", "assistant")
SAME_ROLES = {role: role for role in ROLES} | {
    **dict.fromkeys(("developer",), "system"),
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "ai", "model", "bing", "bard"), "assistant"),
}
"""What a role is called elsewhere; upper and lower case are alike."""
TOOL_ROLE = re.compile("(tool|function)s?([_-](call|response|result|output)s?)?|observation|ipython", re.IGNORECASE)
NO_TOOLS = "tools are not supported"
TRAINED_KEYS = ("weight", "train", "training", "trainable", "train_on_turn", "loss")
"""Keys of a message that may say whether its answer is trained on."""
MESSAGE_KEYS = frozenset(("role", "from", "content", "value", *TRAINED_KEYS))
SPEAKERS = {"Human": "user", "Assistant": "assistant"}

SERIALISED = re.compile(r'\s*(?:"|array)?[\s(\[]*(?:\{|\[\s*[\w.]+\()')
"""How a list of messages begins in JSON, Python and numpy; also `[Message(role=...)]`, which nothing can read."""
ROLE_IN_TEXT = re.compile(r"""(?:\\*['"](?:role|from)\\*['"]\s*:|\brole=)\s*\\*['"](\w+)\\*['"]""")
CONTENT_IN_TEXT = re.compile(r"""\\*['"](?:content|value|tool_calls)\\*['"]\s*:|\bcontent=""")


def read_messages(value: Any, key: str) -> list[Message]:
    return [read_message(item) for item in message_items(value, key)]


def message_items(value: Any, key: str) -> list[dict[str, Any]]:
    """Return the messages of a list as they are in the file, without a system message that says nothing."""
    value = deserialised(value, key)
    if isinstance(value, dict):
        value = turns_of_columns(value) or [value]
    if not isinstance(value, list):
        raise BadRow(f"'{key}' is not {'' if key == 'messages' else 'text or '}a list of messages")
    for index, item in enumerate(value):
        check_message(item, key, index)
    items = [item for item in value if role_of(item) != "system" or str(content_of(item)).strip()]
    if not items:
        raise BadRow(f"'{key}' is empty")
    return items


def turns_of_columns(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Read the messages of {"role": [...], "content": [...]}, `datasets`' sequence of objects; else none."""
    columns = {name: cells for name, cells in value.items() if isinstance(cells, list)}
    if not {"role", "from"} & columns.keys() or len({len(cells) for cells in columns.values()}) > 1:
        return []
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    return [{name: cell for name, cell in row.items() if cell is not None} for row in rows]


def check_message(item: Any, key: str, index: int) -> None:
    if not isinstance(item, dict):
        raise BadRow(f"'{key}' has a message without role and content")
    role = item.get("role", item.get("from"))
    usual = role_of(item)
    if item.get("tool_calls") or item.get("function_call") or (usual not in ROLES and TOOL_ROLE.fullmatch(str(role))):
        raise BadRow(f"'{key}' has a message that calls or answers a tool ({NO_TOOLS})")
    if role is None or content_of(item) is None:
        raise BadRow(f"'{key}' has a message without role and content")
    if usual not in ROLES:
        raise BadRow(f"the role {str(role)[:30]!r} is none of {', '.join(ROLES)}")
    if usual == "system" and index > 0:
        raise BadRow("a system message is not the first")


def read_message(item: dict[str, Any]) -> Message:
    return {"role": role_of(item), "content": check_text(text_of(content_of(item)), "content")}


def role_of(item: dict[str, Any]) -> str:
    role = item["role"] if "role" in item else item.get("from")
    return usual_role(role if isinstance(role, str) else str(role))


@lru_cache(1000)
def usual_role(role: str) -> str:
    return SAME_ROLES.get(role.strip().lower(), role)


def content_of(item: dict[str, Any]) -> Any:
    return item["content"] if "content" in item else item.get("value")


def text_of(content: Any) -> Any:
    """Join the text of a list of parts, as servers take it; anything else as it is."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise BadRow(f"a message has a part that is no text ({str(kind)[:30]}): only text is supported")
    return "".join(part["text"] for part in content)


def is_trained(item: dict[str, Any]) -> bool:
    """Whether an answer is trained on, or only context for what follows. Raises BadRow for a weight between."""
    for key in TRAINED_KEYS:
        if key not in item:
            continue
        value = str(item[key]).lower()
        if value in ("false", "0", "0.0", "no"):
            return False
        if value not in ("true", "1", "1.0", "yes"):
            raise BadRow(f"the '{key}' of a message is {value[:20]}: only 0 and 1 (false and true) are known")
    return True


def looks_like_messages(value: Any) -> bool:
    """Whether a list is one of messages and not one of rows."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) for item in value)
        and any(role_of(item) in ROLES and ("role" in item or "from" in item) for item in value)
    )


def deserialised(value: Any, key: str) -> Any:
    """Read the messages that a text is the JSON or Python notation of; any other value as it is.

    Raises BadRow for a text that is plainly meant as messages and cannot be read: as prose it would be trained on.
    """
    if not isinstance(value, str) or not SERIALISED.match(value) or not CONTENT_IN_TEXT.search(value):
        return value
    if not any(role.lower() in SAME_ROLES or TOOL_ROLE.fullmatch(role) for role in ROLE_IN_TEXT.findall(value)):
        return value
    notation, rest = leading_value(value.strip())
    if isinstance(notation, str) and not rest:
        return deserialised(notation, key)
    if notation is None:
        raise BadRow(f"'{key}' is the text of a list of messages that is neither JSON nor Python; write it as JSON")
    items = unwrapped(notation)
    if not rest and items and all(isinstance(item, (list, tuple)) for item in items):
        raise BadRow(f"'{key}' is the text of several lists of messages")
    return value if rest or not looks_like_messages(items) else items


def unwrapped(value: Any) -> list[Any]:
    """Return the list that stands in a list or an object of its own."""
    while True:
        if isinstance(value, dict) and len(value) == 1 and isinstance(next(iter(value.values())), list):
            value = next(iter(value.values()))
        elif isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], (list, tuple)):
            value = value[0]
        else:
            return list(value) if isinstance(value, (list, tuple)) else [value]


def leading_value(text: str) -> tuple[Any, str]:
    """Read the JSON or Python value with which a text begins (None without one), and the text behind it."""
    try:
        value, end = json.JSONDecoder(strict=False).raw_decode(text)
        return value, text[end:].strip()
    except (ValueError, RecursionError):
        pass
    closing = {"[": "]", "(": ")"}.get(text[:1], "}")
    ends = [match.end() for match in re.finditer(re.escape(closing), text)]
    for end in [*ends[-1:], *ends[:20]]:
        if (value := python_value(text[:end])) is not None:
            return value, text[end:].strip()
    return None, ""


def python_value(text: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes in the text
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def parsed(value: Any) -> Any:
    """Read a list or an object that a table's cell holds as text; anything else as it is."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return python_value(text) or text.replace("None", "")


def read_transcript(text: str) -> list[Message]:
    """Read the turns of "Human: ... Assistant: ..."; none in another text. An empty last turn is no turn."""
    if not re.match(r"\s*Human:.*\n\s*Assistant:", text, re.DOTALL):
        return []
    parts = re.split(r"(?:^|\n)\s*(Human|Assistant):", text.strip())[1:]
    turns = list(zip(parts[::2], parts[1::2], strict=True))
    if not turns[-1][1].strip():
        turns.pop()
    return [{"role": SPEAKERS[name], "content": check_text(words, "a turn").strip()} for name, words in turns]


def check_text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"'{key}' is not text")
    if not value.strip():
        raise BadRow(f"'{key}' is empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # "\ud83d" alone: JSON allows it, no tokenizer takes it
        raise BadRow(f"'{key}' has half a character") from None
    return value
