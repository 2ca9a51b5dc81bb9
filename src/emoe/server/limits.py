"""What the server refuses before anybody looks at it: one connection too many, wrong keys, bodies too large or slow."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from emoe.config import format_bytes
from emoe.server.errors import ApiError

OPEN_PATHS = frozenset({"/health"})
PROBES = frozenset({"/health", "/metrics"})
"""Answered however many connections there are."""

CROWDED = "crowded"
"""In the state of a request's scope: what says whether there are more connections than may be."""

Refused = Callable[[str | None], None]
"""Is told the code of every refusal."""

READ_TIMEOUT_S = 30.0
"""Seconds that a part of a body may take, and a body beyond what `READ_BYTES_PER_S` gives it. A client that has less to
say holds a connection for nothing."""

READ_BYTES_PER_S = 16 << 10
"""A body that comes more slowly than this, but for `READ_TIMEOUT_S`, is given up."""

_READ_OUT = 8
"""A refused body of up to this many times the limit is read to its end: who still sends does not read the answer."""

REFUSED_READ_S = 5.0
"""Seconds for that where nobody looks at the body: on a connection too many, with a wrong key, with two lengths."""


def too_many_connections() -> ApiError:
    """What is said on a connection too many."""
    return ApiError(
        503,
        "requests are under way on all connections that the server takes; try again, or raise --max-connections",
        kind="service_unavailable_error",
        code="too_many_connections",
        headers={"Retry-After": "1", "Connection": "close"},
    )


class CrowdLimit:
    """Refuses requests on connections beyond the limit (`emoe.server.connections`), except probes."""

    def __init__(self, app: ASGIApp, max_bytes: int, refused: Refused) -> None:
        self._app = app
        self._max = max_bytes
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI side."""
        crowded = scope.get("state", {}).get(CROWDED)
        if scope["type"] != "http" or crowded is None or not crowded() or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        error = too_many_connections()
        self._refused(error.code)
        await _answer(error, self._max * _READ_OUT, scope, receive, send)


async def _answer(error: ApiError, most: int, scope: Scope, receive: Receive, send: Send) -> None:
    """Refuse; a body of up to `most` bytes is read out first, so that the client does not see a reset instead."""
    size, asks_first = _announced(scope)
    more = size <= most and not asks_first
    with suppress(TimeoutError):
        async with asyncio.timeout(REFUSED_READ_S):
            size = 0
            while more and size <= most:
                message = await receive()
                size += len(message.get("body", b""))
                more = message.get("more_body", False)
    await error.response()(scope, receive, send)


def _announced(scope: Scope) -> tuple[int, bool]:
    """The size of a body, as its header says (0: it does not), and whether the client asks before it sends it."""
    headers = Headers(scope=scope)
    declared = headers.get("content-length", "0")
    size = int(declared) if declared.isascii() and declared.isdigit() else 0
    return size, headers.get("expect", "").lower() == "100-continue"


class OneLength:
    """Refuses requests whose body has two lengths: a proxy before the server may believe the other one.

    What follows would be a request for one of them and a body for the other (RFC 9112, 6.1: the connection must close).
    """

    def __init__(self, app: ASGIApp, max_bytes: int, refused: Refused) -> None:
        self._app = app
        self._max = max_bytes
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI side."""
        names = {name for name, _ in scope["headers"]} if scope["type"] == "http" else set()
        if not {b"content-length", b"transfer-encoding"} <= names:
            await self._app(scope, receive, send)
            return
        text = "a request has either Content-Length or Transfer-Encoding; leave one out"
        error = ApiError(400, text, code="invalid_http", headers={"Connection": "close"})
        self._refused(error.code)
        await _answer(error, self._max * _READ_OUT, scope, receive, send)


class ApiKey:
    """Lets requests through that carry `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, key: str, max_bytes: int, refused: Refused) -> None:
        self._app = app
        self._max = max_bytes
        self._key = key.encode()
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI side."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            # Always compared, and in constant time: how long it takes tells nothing.
            right = hmac.compare_digest(key.strip().encode(), self._key)
            if not right or scheme.lower() != "bearer":
                given = "the API key is wrong" if key else "there is no API key"
                error = ApiError(
                    401,
                    f"{given}; send the server's as `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                self._refused(error.code)
                await _answer(error, self._max * _READ_OUT, scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """Reads the body of a request, up to a size and within a time, before the endpoint runs."""

    def __init__(self, app: ASGIApp, max_bytes: int, refused: Refused, read_timeout_s: float = READ_TIMEOUT_S) -> None:
        self._app = app
        self._max = max_bytes
        self._refused = refused
        self._timeout_s = read_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI side."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        size, asks_first = _announced(scope)
        try:
            if size > self._max * (1 if asks_first else _READ_OUT):
                raise self._too_large()
            body = await self._read(receive)
        except ApiError as error:
            self._refused(error.code)
            await error.response()(scope, receive, send)
            return
        if body is None:
            return  # the client has gone
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return first.pop() if first else await receive()

        await self._app(scope, again, send)

    async def _read(self, receive: Receive) -> bytes | None:
        parts, size = [], 0
        now = asyncio.get_running_loop().time
        started = now()
        while True:
            latest = started + self._timeout_s + size / READ_BYTES_PER_S
            try:
                async with asyncio.timeout_at(min(now() + self._timeout_s, latest)):
                    message = await receive()
            except TimeoutError:
                text = (
                    f"{size} bytes of the body came in {now() - started:.1f} s; it may take {self._timeout_s:g} s, and "
                    f"one more for each {format_bytes(READ_BYTES_PER_S)}: send it at once"
                    if now() >= latest
                    else f"no more of the body came for {self._timeout_s:g} s, after {size} bytes: send it at once"
                )
                raise ApiError(408, text, code="body_timeout", headers={"Connection": "close"}) from None
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size <= self._max:
                parts.append(part)
            else:
                parts.clear()
            if size > self._max * _READ_OUT:
                raise self._too_large()
            if not message.get("more_body", False):
                if size > self._max:
                    raise self._too_large()
                return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {format_bytes(self._max)}; send less, or raise --max-body-size",
            code="body_too_large",
            headers={"Connection": "close"},
        )
