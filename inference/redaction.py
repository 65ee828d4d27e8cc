"""What is a secret in a text that is kept or shown: nothing of ours leaves without going through here."""

import logging
import os
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
VARIABLE = re.compile(r"\$\{(\w+)\}")
"""How a setting names an environment variable that holds its secret."""
_OF_URL = re.compile(r"(?<=://)(?:[^\s/'\":@]*:)?([^\s/'\"]*)@")
_NAMED = re.compile(
    r"(?i)((?:^|[\s?&;\"'.:_-]|api|access|auth)"
    r"(?:token|key|secret|password|passwd|passphrase|pwd|pw|jwt|signature|sig|credentials?|authorization|auth)"
    r"[\"']?\s*[=:]\s*)"
    r"(\$\{\w+\}|\"[^\"]*\"|'[^']*'|(?:(?:bearer|basic|token)\s+)?[^\s&;,\"'#}]+)"
)
_OPTION = re.compile(r"(?i)--?(?:[a-z0-9_-]+[_-])?(?:token|key|secret|password|auth)")
_KNOWN = re.compile(
    r"\b(?:hf_|sk-|gh[opsu]_|github_pat_|glpat-|xox[abp]-|AKIA|eyJ)[\w.-]{12,}|(?<=\bbearer )[\w.~+/=-]{8,}",
    re.IGNORECASE,
)
_SECRET_NAME = re.compile(r"(?i)(?:token|key|secret|password|passwd|passphrase|credentials)$")
SHORTEST = 8
"""Characters of a value from the environment that is looked for: shorter ones occur in words."""


def redacted(text: str) -> str:
    """`text` without user and password in URLs, values of names such as `token=`, keys known by how they begin, and
    secrets of the environment. Names of variables stay: `${REWARD_KEY}`."""
    text = _OF_URL.sub(lambda found: found[0] if _names_variable(found[1]) else f"{HIDDEN}@", text)
    text = _NAMED.sub(lambda found: found[0] if _names_variable(found[2]) else found[1] + HIDDEN, text)
    text = _KNOWN.sub(HIDDEN, text)
    for secret in secrets_of_environment():
        text = text.replace(secret, HIDDEN)
    return text


def _names_variable(text: str) -> bool:
    return VARIABLE.fullmatch(text.strip("\"'")) is not None


def secrets_of_environment() -> list[str]:
    """Values of variables that are called `..._KEY` and the like, and passwords of proxies; the longest first."""
    found = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)} | _FILLED_IN
    for name, value in os.environ.items():
        if name.lower().endswith("_proxy") and "@" in value:
            userinfo = value.rpartition("://")[2].rpartition("@")[0]
            found |= {userinfo, unquote(userinfo.partition(":")[2])}
    return sorted((secret for secret in found if len(secret) >= SHORTEST), key=len, reverse=True)


_FILLED_IN: set[str] = set()


def filled_in(text: str, write: Callable[[str], str] = str) -> str:
    """`text` with the values of the environment variables that it names, as `write` writes them. Raises KeyError with
    the name of one that is not set."""

    def value(found: re.Match[str]) -> str:
        secret = os.environ[found[1]]
        _FILLED_IN.update((secret, write(secret)))
        return write(secret)

    return VARIABLE.sub(value, text)


def redacted_values(values: Any) -> Any:
    """Settings as data, with their texts redacted."""
    if isinstance(values, dict):
        return {key: redacted_values(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [redacted_values(value) for value in values]
    return redacted(values) if isinstance(values, str) else values


def redacted_arguments(arguments: list[str]) -> list[str]:
    """A command line; what follows an option such as `--token` is hidden too."""
    found, hides = [], False
    for argument in arguments:
        found.append(HIDDEN if hides else redacted(argument))
        hides = _OPTION.fullmatch(argument) is not None
    return found


class RedactedLines(logging.Formatter):
    """What libraries log."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))
