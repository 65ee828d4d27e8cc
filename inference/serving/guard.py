"""Who may ask: in front of everything else."""

import hmac
import re
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from inference.serving.request import ApiError

LOOPBACK_NAMES = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE)


class Guard:
    """Asks for a token where one is set, and turns away requests that came here under another machine's name.

    A page from elsewhere can point its own name at this machine and then read what a server on the loopback interface
    answers (DNS rebinding). Its requests carry that name in their Host header.
    """

    def __init__(self, app: ASGIApp, token: str | None, loopback_only: bool):
        self.app = app
        self._token = None if token is None else token.encode()
        self._loopback_only = loopback_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope["path"], Headers(scope=scope))
            except ApiError as error:
                await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> None:
        hosts = headers.getlist("host")
        if self._loopback_only and not is_loopback_name(hosts):
            raise ApiError(403, "This server answers to localhost and 127.0.0.1 alone.", code="wrong_host")
        if self._token is not None and path.startswith("/v1/"):
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token):
                message = "A token is needed, as the API key: 'Authorization: Bearer TOKEN'."
                raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


def is_loopback_name(hosts: Iterable[str]) -> bool:
    """Of the values of Host headers: exactly one is right."""
    found = list(hosts)
    return len(found) == 1 and LOOPBACK_NAMES.fullmatch(found[0]) is not None
