"""YAML that people write. A key that is there twice is no YAML: one of its two values would be lost without a word."""

import re
from typing import Any

import yaml


class KeyTwice(yaml.MarkedYAMLError):
    """A mapping has a key two times."""


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
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
        return node

    def number_as_written(self, node: yaml.ScalarNode) -> Any:
        """YAML 1.1 reads 2:4:4 as seconds and 010 as 8, which nobody means."""
        text = str(self.construct_scalar(node))
        return text if re.match(r"[-+]?\d+:|[-+]?0\d", text) else self.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.number_as_written)


def load_yaml(text: str) -> Any:
    """The value of `text`. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def what_is_wrong(error: yaml.YAMLError) -> str:
    """One line about it, with its place."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return str(error).splitlines()[0]
    problem = error.problem or error.context or "it cannot be read"
    mark = error.problem_mark or error.context_mark
    return problem if mark is None else f"line {mark.line + 1}: {problem}"
