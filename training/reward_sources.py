"""What scores beside the reward model: Python functions of the user's, rewards by name, an address.

They get prompts as lists of messages, responses as text and, where they want them, the prompts' other keys in the data.
"""

import base64
import copy
import inspect
import ipaddress
import json
import math
import socket
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote, urlsplit

from inference.chat_template import Message
from inference.errors import UserError
from inference.streams import filled_in
from training.reward_specs import RewardSpec
from training.user_code import UserFile

Row = dict[str, Any]
LONGEST_PAUSE = 30.0  # seconds between two tries


class RewardFailed(UserError):
    """A source of rewards did not give any."""


class NobodyAnswers(RewardFailed):
    """An address may answer later."""


class RewardSource(Protocol):
    """Gives one number for each response. Raises RewardFailed."""

    @property
    def name(self) -> str: ...

    def scores(self, prompts: list[list[Message]], responses: list[str], rows: list[Row]) -> list[float]: ...


class RewardFunction:
    """`path/to/file.py:function`, called with (prompts, responses), or (prompts, responses, rows) if it takes rows."""

    def __init__(self, spec: str, name: str = "function"):
        """Load it. Raises UserError where there is no such function."""
        self.name = name
        self.setting = f"rlhf.reward_function={spec}"
        path, _, function_name = spec.rpartition(":")
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(f"{self.setting}: there is no file {file}; give path/to/file.py:function.")
        self.file = UserFile(file)
        with sentences(f"{self.setting}: the file cannot be loaded"):
            module = self.file.load()
        function = getattr(module, function_name, None)
        if not callable(function):
            raise UserError(f"{self.setting}: the file has no function {function_name}; name one that it has.")
        self.function: Callable[..., Any] = function
        self.way = way_to_call(function, self.setting)

    def scores(self, prompts: list[list[Message]], responses: list[str], rows: list[Row]) -> list[float]:
        given = copy.deepcopy((prompts, responses, rows))  # theirs to change
        with sentences(f"{self.setting} failed"), self.file.running():
            scores = self.way(self.function, *given)
            if isinstance(scores, Iterator):
                scores = list(scores)
        return checked(scores, len(responses), self.setting)


class RewardByName:
    """A reward of `training.reward_specs.NAMED_REWARDS`."""

    def __init__(self, spec: RewardSpec, name: str):
        self.name, self.setting, self.reward = name, f"rlhf.reward_function={spec.text}", spec.named()

    def scores(self, prompts: list[list[Message]], responses: list[str], rows: list[Row]) -> list[float]:
        with sentences(f"{self.setting} failed"):
            scores = [self.reward.score(response, row) for response, row in zip(responses, rows, strict=True)]
        return checked(scores, len(responses), self.setting)

    def require_rows(self, rows: Sequence[Row]) -> None:
        """Raise UserError where some rows of the data have not what it reads."""
        if bad := [row for row in rows if not self.reward.suits(row.get("extra", {}))]:
            raise UserError(
                f"{self.setting} needs {self.reward.needs}, and {len(bad):,} of {len(rows):,} prompts have none, the "
                f"first {bad[0]['prompt'][-1]['content'][:60]!r}: give other data, or another reward."
            )


def without_rows(call: Callable[..., Any], prompts: list, responses: list, rows: list) -> Any:
    return call(prompts, responses)


def with_rows(call: Callable[..., Any], prompts: list, responses: list, rows: list) -> Any:
    return call(prompts, responses, rows)


def with_named_rows(call: Callable[..., Any], prompts: list, responses: list, rows: list) -> Any:
    return call(prompts, responses, rows=rows)


def way_to_call(function: Callable[..., Any], setting: str) -> Callable[..., Any]:
    """Choose how to call `function`, with the rows if it takes them. Raises UserError where no way fits."""
    if not callable(function):
        raise UserError(f"{setting} is {function!r}; it must be a function of (prompts, responses).")
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a built-in
        return without_rows
    given = list(signature.parameters.values())
    ways: list[Callable[..., Any]] = [with_named_rows] if "rows" in signature.parameters else []
    third_is_free = any(p.default is None or p.default is p.empty for p in given[2:3])
    if third_is_free or any(p.kind == p.VAR_POSITIONAL for p in given):
        ways.append(with_rows)
    for way in (*ways, without_rows):
        try:
            way(signature.bind, [], [], [])
            return way
        except TypeError:
            continue
    raise UserError(
        f"{setting} is defined as {getattr(function, '__name__', 'it')}{signature}; it must take (prompts, responses) "
        f"or (prompts, responses, rows)."
    )


class ProxiesForOthers(urllib.request.ProxyHandler):
    """The proxies of the environment, except for services on this machine: none of them knows its loopback."""

    def proxy_open(self, req: urllib.request.Request, proxy: str, type: str) -> Any:
        return None if is_this_machine(req.host) else super().proxy_open(req, proxy, type)


def is_this_machine(host: str) -> bool:
    """Whether `host`, with a port or without, is an address or name of the loopback interface; no name is looked up."""
    name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    if name in ("localhost", "ip6-localhost", "ip6-loopback") or name.endswith((".localhost", "localhost.localdomain")):
        return True
    try:  # 127.1 and ::ffff:127.0.0.1 are ways to write it too
        known = socket.getaddrinfo(name, None, flags=socket.AI_NUMERICHOST)
    except OSError:
        return False
    addresses = [ipaddress.ip_address(str(sockaddr[0]).partition("%")[0]) for *_, sockaddr in known]
    plain = [getattr(address, "ipv4_mapped", None) or address for address in addresses]
    return all(address.is_loopback or address.is_unspecified for address in plain)


@dataclass(frozen=True)
class RewardEndpoint:
    """POST {"prompts", "responses", "rows"} as JSON to `url`, which answers {"scores": [...]}."""

    url: str
    timeout: float  # seconds
    retries: int
    name = "url"

    def scores(self, prompts: list[list[Message]], responses: list[str], rows: list[Row]) -> list[float]:
        body = json.dumps({"prompts": prompts, "responses": responses, "rows": rows}).encode()
        answer = self._ask(body)
        try:
            scores = json.loads(answer)["scores"]
        except (ValueError, KeyError, TypeError):
            begin = answer[:80].decode(errors="replace")
            raise RewardFailed(
                f'rlhf.reward_url={self.url} must answer {{"scores": [...]}} as JSON, not {begin!r}; correct the '
                f"server and give the same command again."
            ) from None
        return checked(scores, len(responses), f"rlhf.reward_url={self.url}")

    def _ask(self, body: bytes) -> bytes:
        request = self._request(body)
        kind: type[RewardFailed] = NobodyAnswers
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.build_opener(ProxiesForOthers()).open(request, timeout=self.timeout) as response:
                    return response.read()
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}"
                if error.code < 500 and error.code != 429:  # the same question gets the same answer
                    kind = RewardFailed
                    break
            except (OSError, HTTPException) as error:  # URLError and timeouts are OSErrors
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < self.retries:
                time.sleep(min(2.0**attempt, LONGEST_PAUSE))
        raise kind(
            f"rlhf.reward_url={self.url} gives no scores ({reason}, {attempt + 1} tries); see that it runs, then give "
            f"the same command again."
        )

    def _request(self, body: bytes) -> urllib.request.Request:
        """Fill in the values of the environment variables that the address names; user and password go into the header.

        Raises RewardFailed where a variable is not set.
        """
        parts = urlsplit(self.url)
        userinfo, at, host = parts.netloc.rpartition("@")
        try:
            address = filled_in(parts._replace(netloc=host).geturl(), lambda value: quote(value, safe=":/"))
            request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
            if at:
                user, _, password = (filled_in(unquote(part)) for part in userinfo.partition(":"))
                credentials = base64.b64encode(f"{user}:{password}".encode()).decode()
                request.add_unredirected_header("Authorization", f"Basic {credentials}")
        except KeyError as error:
            raise RewardFailed(
                f"rlhf.reward_url={self.url} names the environment variable {error.args[0]}, which is not set: export "
                f"it, then give the same command again."
            ) from None
        return request


@contextmanager
def sentences(what: str) -> Iterator[None]:
    """Turn what the user's code inside raises into RewardFailed, its traceback into a note; Ctrl-C stays what it is."""
    try:
        yield
    except (KeyboardInterrupt, UserError):
        raise
    except BaseException as error:  # SystemExit would end the run without a word
        raised = RewardFailed(f"{what} ({reason_of(error)}); correct it and give the command again.")
        raised.add_note("".join(traceback.format_exception(error)))
        raise raised from error


def reason_of(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"it ended the program, sys.exit({'' if error.code is None else repr(error.code)})"
    line = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def checked(values: Any, count: int, source: str) -> list[float]:
    """Return `values` as finite floats, one for each response. Raises RewardFailed."""
    try:
        if isinstance(values, str | bytes | bytearray | Mapping | Set):  # their members might pass for numbers
            raise TypeError
        scores = [float(score) for score in values]
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: of a tensor of several dimensions
        raise RewardFailed(f"{source} must return a list of numbers, not {str(values)[:80]!r}; correct it.") from None
    if len(scores) != count:
        raise RewardFailed(
            f"{source} returned {len(scores)} scores for {count} responses; it must return one for each."
        )
    bad = next((score for score in scores if not math.isfinite(score)), None)
    if bad is not None:
        raise RewardFailed(f"{source} returned {bad}; every score must be a finite number.")
    return scores
