"""What the limits let through to the application behind them, which clients cannot see."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest

from emoe.server import limits
from emoe.server.limits import CROWDED, OPEN_PATHS, PROBES, ApiKey, BodyLimit, CrowdLimit, OneLength

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


def never(code: str | None) -> None:
    raise AssertionError(f"refused: {code}")


def parts(*bodies: bytes) -> list[Sent]:
    return [
        {"type": "http.request", "body": body, "more_body": number < len(bodies)}
        for number, body in enumerate(bodies, 1)
    ]


@pytest.mark.parametrize("given", [None, b"Bearer wrong", b"Bearer", b"Basic right", b"right", b"Bearer right x"])
def test_without_the_key_nothing_runs_behind_it(given: bytes | None) -> None:
    behind = Behind()
    headers = [] if given is None else [(b"authorization", given)]
    codes: list[str | None] = []
    limit = ApiKey(behind, "right", 10, codes.append)
    sent, _ = drive(limit, [], headers=headers)
    assert sent[0]["status"] == 401 and behind.called == 0
    drive(limit, [], headers=[(b"authorization", b"bearer right")])
    assert behind.called == 1 and codes == ["invalid_api_key"]


def test_open_paths_and_the_servers_own_events_need_no_key() -> None:
    for scope in [*({"path": path} for path in OPEN_PATHS), {"type": "lifespan"}]:
        behind = Behind()
        assert drive(ApiKey(behind, "right", 10, never), [], **scope)[0] == [] and behind.called == 1


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
    codes: list[str | None] = []
    sent, left = drive(BodyLimit(behind, 10, codes.append), parts(*bodies), headers=headers)
    assert sent[0]["status"] == 413 and behind.called == 0 and codes == ["body_too_large"]
    assert len(left) == unread


@pytest.mark.parametrize("length", [None, b"10", b"none", b"-81", b"\xb2", b""])
def test_a_body_that_fits_comes_whole_and_then_what_follows(length: bytes | None) -> None:
    behind = Behind()
    headers = [] if length is None else [(b"content-length", length)]
    gone = {"type": "http.disconnect"}
    sent, _ = drive(BodyLimit(behind, 10, never), [*parts(b"abc", b"", b"defghij"), gone], headers=headers)
    assert sent == [] and behind.called == 1
    assert behind.read == [{"type": "http.request", "body": b"abcdefghij", "more_body": False}, gone]


def test_events_that_are_no_requests_pass_unread() -> None:
    behind = Behind()
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}, {"type": "more"}]
    assert drive(BodyLimit(behind, 10, never), messages, type="lifespan") == ([], messages[2:])
    assert behind.called == 1 and behind.read == messages[:2]


def test_on_a_connection_too_many_only_probes_and_events_pass() -> None:
    codes: list[str | None] = []
    behind, crowd = Behind(), [True]

    def called(**scope: Any) -> list[Sent]:
        return drive(CrowdLimit(behind, 10, codes.append), [], state={CROWDED: lambda: crowd[0]}, **scope)[0]

    assert called()[0]["status"] == 503 and behind.called == 0 and codes == ["too_many_connections"]
    for scope in [*({"path": path} for path in sorted(PROBES)), {"type": "lifespan"}]:
        before = behind.called
        assert called(**scope) == [] and behind.called == before + 1
    crowd[0] = False
    before = behind.called
    assert called() == [] and behind.called == before + 1
    drive(CrowdLimit(behind, 10, never), [])  # nothing says how many there are
    assert behind.called == before + 2 and len(codes) == 1


@pytest.mark.parametrize(
    ("headers", "bodies", "unread"),
    [
        ({}, [b"x" * 10, b"x" * 70], 0),
        ({"content-length": "80"}, [b"x" * 10, b"x" * 70], 0),
        ({"content-length": "81"}, [b"x" * 81], 1),
        ({}, [b"x" * 81, b"x"], 1),
        ({"content-length": "11", "expect": "100-Continue"}, [b"x" * 11], 1),  # who asks first has sent nothing
    ],
)
@pytest.mark.parametrize("limit", [CrowdLimit, BodyLimit, partial(ApiKey, key="right"), OneLength])
def test_a_refused_body_is_read_out(limit: Any, headers: dict[str, str], bodies: list[bytes], unread: int) -> None:
    """Else the client, which still sends, sees a reset in the place of the answer."""
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    if limit is OneLength:
        raw = [
            (b"transfer-encoding", b"chunked"),
            *(raw if b"content-length" in dict(raw) else [(b"content-length", b"4")]),
        ]
    made = limit(Behind(), max_bytes=10, refused=lambda code: None)
    sent, left = drive(made, parts(*bodies), headers=raw, state={CROWDED: lambda: True})
    assert sent[0]["status"] in {400, 401, 413, 503} and len(left) == unread


def test_a_refused_body_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REFUSED_READ_S", 0.05)
    sent: list[Sent] = []

    async def receive() -> Sent:
        await asyncio.sleep(60)
        raise AssertionError("it came")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "state": {CROWDED: lambda: True}}
    asyncio.run(CrowdLimit(Behind(), 10, lambda code: None)(scope, receive, send))
    assert sent[0]["status"] == 503
