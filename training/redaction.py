"""What is a secret in a text that is kept or shown."""

import re

HIDDEN = "***"
_OF_URL = re.compile(r"(?<=://)[^\s/@'\"]+@")
_NAMED = re.compile(
    r"(?i)((?:^|[\s?&;\"'.:_-]|api|access|auth)"
    r"(?:token|key|secret|password|passwd|pwd|signature|sig|credentials?|authorization|auth)[\"']?\s*[=:]\s*[\"']?)"
    r"(?:bearer\s+)?[^\s&;,\"'#}]+"
)
_OPTION = re.compile(r"(?i)--?(?:[a-z0-9_-]+[_-])?(?:token|key|secret|password|auth)")
_KNOWN = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|glpat-|xox[abp]-)[\w-]{12,}")


def redacted(text: str) -> str:
    """`text` without user and password in URLs, values of names such as `token=`, and keys known by how they begin."""
    return _KNOWN.sub(HIDDEN, _NAMED.sub(rf"\1{HIDDEN}", _OF_URL.sub(f"{HIDDEN}@", text)))


def redacted_arguments(arguments: list[str]) -> list[str]:
    """A command line; what follows an option such as `--token` is hidden too."""
    found, hides = [], False
    for argument in arguments:
        found.append(HIDDEN if hides else redacted(argument))
        hides = _OPTION.fullmatch(argument) is not None
    return found
