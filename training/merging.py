"""Settings laid over others, before they are checked."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml


def merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, group by group; neither is changed."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both else value
    return result


def did_you_mean(names: Sequence[str], otherwise: str) -> str:
    """`did you mean 'a', 'b' or 'c'?`; `otherwise` where there are none."""
    if not names:
        return otherwise
    *others, last = [f"'{name}'" for name in names]
    return f"did you mean {', '.join(others)} or {last}?" if others else f"did you mean {last}?"


def likeness(given: str, name: str) -> float:
    """Compare two names, from 0 to 1; an abbreviation (`coef`, `lr` for `learning_rate`) is as good as a slip."""
    initials = "".join(word[:1] for word in name.split("_"))
    if given != name and (given == initials or (len(given) > 2 and name.startswith(given))):
        return 0.9
    return difflib.SequenceMatcher(None, given, name).ratio()


def near_keys(given: str, keys: Iterable[str]) -> list[str]:
    """Find dotted keys that end like `given`: those in the groups that it names, by the shortest way down."""
    *groups, name = given.lower().split(".")
    likely: dict[str, float] = {}
    for key in keys:
        *above, last = key.split(".")
        like = max(likeness(name, "_".join([*above[start:], last])) for start in range(len(above) + 1))
        if like > 0.65:
            named = sum(group in above for group in groups)
            group_score = named or 0.2 * likeness(".".join(groups), ".".join(above))
            likely[key] = group_score + like - 0.1 * len(above)
    return [key for key, score in likely.items() if score == max(likely.values())]


LIBYAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # several times as fast, where PyYAML was built with it
DEEP = 1000  # brackets, or columns of a line; with less, nothing is so deep that libyaml would run out of stack


class KeyTwice(yaml.MarkedYAMLError):
    """A mapping has a key two times."""


def number_as_written(loader: Any, node: yaml.ScalarNode) -> Any:
    """YAML 1.1 reads 2:4:4 as seconds and 010 as 8, which nobody means."""
    text = str(loader.construct_scalar(node))
    return text if re.match(r"[-+]?\d+:|[-+]?0\d", text) else loader.construct_yaml_int(node)


def refuse_twice(node: yaml.MappingNode) -> None:
    """Raise KeyTwice where a mapping has a key two times."""
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
        if name is None:
            continue
        line = key.start_mark.line + 1
        if name in lines:
            where = f"lines {lines[name]} and {line}" if line != lines[name] else f"line {line}"
            raise KeyTwice(problem=f"'{key.value}' is there twice ({where}): put both together")
        lines[name] = line


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        refuse_twice(node)
        return node


class _Quick(LIBYAML):  # type: ignore[misc, valid-type]
    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        left, seen = [node], set()
        while left:
            inner = left.pop()
            if isinstance(inner, yaml.CollectionNode) and id(inner) not in seen:
                seen.add(id(inner))
                if isinstance(inner, yaml.MappingNode):
                    refuse_twice(inner)
                left += [part for entry in inner.value for part in (entry if isinstance(entry, tuple) else (entry,))]
        return node


for loader in (_Loader, _Quick):
    loader.add_constructor("tag:yaml.org,2002:int", number_as_written)


def load_yaml(text: str) -> Any:
    """Read the value of `text`. Raises yaml.YAMLError."""
    try:
        if max(text.count("[") + text.count("{"), *map(len, text.splitlines()), 0) < DEEP:
            return yaml.load(text, Loader=_Quick)
    except (yaml.YAMLError, RecursionError):
        pass  # the other one says what is wrong
    return yaml.load(text, Loader=_Loader)


def what_is_wrong(error: yaml.YAMLError) -> str:
    """Describe an error in one line, with its line number."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return str(error).splitlines()[0]
    problem = error.problem or error.context or "it cannot be read"
    mark = error.problem_mark or error.context_mark
    return problem if mark is None else f"line {mark.line + 1}: {problem}"
