"""What the limits let through to the application behind them, which clients cannot see."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from emoe.server.limits import OPEN_PATHS, ApiKey, BodyLimit

Sent = dict[str, Any]


class Behind:
    """An application that notes how often it was called and what it read."""

    def __init__(self) -> None:
        self.called = 0
        self.read: list[Sent] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.called += 1
        while not self.read or self.read[-1].get("more_body"):
            self.read.append(await receive())
        self.read.append(await receive())


def drive(limit: Any, messages: list[Sent], **scope: Any) -> tuple[list[Sent], list[Sent]]:
    """What was sent, and what was left unread."""
    left, sent = list(messages), []

    async def receive() -> Sent:
        return left.pop(0) if left else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    full = {"type": "http", "method": "POST", "path": "/v1/models", "headers": []} | scope
    asyncio.run(limit(full, receive, send))
    return sent, left


def parts(*bodies: bytes) -> list[Sent]:
    return [
        {"type": "http.request", "body": body, "more_body": number < len(bodies)}
        for number, body in enumerate(bodies, 1)
    ]


@pytest.mark.parametrize("given", [None, b"Bearer wrong", b"Bearer", b"Basic right", b"right", b"Bearer right x"])
def test_without_the_key_nothing_runs_behind_it(given: bytes | None) -> None:
    behind = Behind()
    headers = [] if given is None else [(b"authorization", given)]
    sent, _ = drive(ApiKey(behind, "right"), [], headers=headers)
    assert sent[0]["status"] == 401 and behind.called == 0
    drive(ApiKey(behind, "right"), [], headers=[(b"authorization", b"bearer right")])
    assert behind.called == 1


def test_open_paths_and_the_servers_own_events_need_no_key() -> None:
    for scope in [*({"path": path} for path in OPEN_PATHS), {"type": "lifespan"}]:
        behind = Behind()
        assert drive(ApiKey(behind, "right"), [], **scope)[0] == [] and behind.called == 1


@pytest.mark.parametrize(
    ("length", "bodies", "unread"),
    [
        (None, [b"x" * 11], 0),  # told at its end: a client that still sends hears nothing
        (None, [b"x" * 10, b"x"], 0),
        (b"11", [b"x" * 11], 0),
        (b"81", [b"x" * 81], 1),  # so large that it is not read
        (None, [b"x" * 40, b"x" * 40, b"x", b"x"], 1),
    ],
)
def test_nothing_runs_behind_a_body_that_is_too_large(length: bytes | None, bodies: list[bytes], unread: int) -> None:
    behind = Behind()
    headers = [] if length is None else [(b"content-length", length)]
    sent, left = drive(BodyLimit(behind, 10), parts(*bodies), headers=headers)
    assert sent[0]["status"] == 413 and behind.called == 0
    assert len(left) == unread


@pytest.mark.parametrize("length", [None, b"10", b"none", b"-81", b"\xb2", b""])
def test_a_body_that_fits_comes_whole_and_then_what_follows(length: bytes | None) -> None:
    behind = Behind()
    headers = [] if length is None else [(b"content-length", length)]
    gone = {"type": "http.disconnect"}
    sent, _ = drive(BodyLimit(behind, 10), [*parts(b"abc", b"", b"defghij"), gone], headers=headers)
    assert sent == [] and behind.called == 1
    assert behind.read == [{"type": "http.request", "body": b"abcdefghij", "more_body": False}, gone]


def test_events_that_are_no_requests_pass_unread() -> None:
    behind = Behind()
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}, {"type": "more"}]
    assert drive(BodyLimit(behind, 10), messages, type="lifespan") == ([], messages[2:])
    assert behind.called == 1 and behind.read == messages[:2]
