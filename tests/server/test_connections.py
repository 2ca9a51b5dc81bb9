"""Clients that never come to the end of what they ask lose their connection; others do not notice."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import pytest

from emoe.server import connections, limits
from tests.server.conftest import Running, Serve, raw_post, until
from tests.server.stand_ins import ScriptedEngine, finished, tokens

WORLD = 1183
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Headers get 0.4 s until `undo`."""
    monkeypatch.setattr(connections, "HEADER_TIMEOUT_S", 0.4)
    return monkeypatch


def engine() -> ScriptedEngine:
    return ScriptedEngine([*tokens(WORLD), finished()])


def read_all(connection: socket.socket) -> bytes:
    connection.settimeout(20)
    reply = b""
    try:
        while part := connection.recv(4096):
            reply += part
    except ConnectionResetError:
        pass
    return reply


def to_the_end(connection: socket.socket) -> bytes:
    """As `read_all`; a reset is an error."""
    connection.settimeout(20)
    return b"".join(iter(lambda: connection.recv(4096), b""))


def drip(connection: socket.socket, text: bytes, every_s: float = 0.05, times: int = 200) -> None:
    """Send a little again and again, until the server no longer takes it."""
    try:
        for _ in range(times):
            connection.sendall(text)
            time.sleep(every_s)
    except OSError:
        return
    raise AssertionError("the server takes it for ever")


def there(server: Running) -> list[connections.TimedProtocol]:
    return cast(list[connections.TimedProtocol], list(server.server.server_state.connections))


def unsent(server: Running, client: socket.socket) -> int:
    port = client.getsockname()[1]
    own = [each for each in there(server) if each.client is not None and each.client[1] == port]
    return sum(each.transport.get_write_buffer_size() for each in own)


@contextmanager
def deaf(server: Running, last: bytes) -> Iterator[socket.socket]:
    """A client that asks until the server cannot send all of the answers at once, and reads none; `last` follows.

    There are then some bytes that are not sent, fewer than those at which a transport says that its client takes none.
    """
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        for _ in range(1000):
            client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
            time.sleep(0.002)
            if unsent(server, client):
                break
        assert until(lambda: not any(each._busy for each in there(server)))
        assert 0 < unsent(server, client) < 65536
        client.sendall(last)
        yield client


@pytest.mark.parametrize("begun", [b"", b"GET", HEAD])
def test_a_header_that_does_not_end(serve: Serve, impatient: pytest.MonkeyPatch, begun: bytes) -> None:
    server = serve(engine())
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(begun)
        reply = read_all(connection)
    assert reply.startswith(b"HTTP/1.1 408 Request Timeout") and b'"code":"header_timeout"' in reply
    assert (b'refused_total{code="header_timeout"' in server.service.metrics.text()) == bool(begun)
    impatient.undo()
    assert server.chat().status_code == 200


def test_a_header_that_drips(serve: Serve, impatient: pytest.MonkeyPatch) -> None:
    """A byte now and then does not begin the time anew."""
    server = serve(engine())
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(HEAD)
        drip(connection, b"x: y\r\n")
    assert until(lambda: not server.server.server_state.connections)


def test_the_header_of_a_later_request(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(engine())
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(raw_post("/v1/completions", {"prompt": "x"}))
        connection.settimeout(20)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        monkeypatch.setattr(connections, "HEADER_TIMEOUT_S", 0.4)
        connection.sendall(HEAD)
        assert b"HTTP/1.1 408" in read_all(connection)


def test_a_body_that_drips(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part comes in time, and the whole does not."""
    monkeypatch.setattr(limits.BodyLimit.__init__, "__defaults__", (0.5,))
    server = serve(engine())
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(HEAD + b"Content-Length: 100000\r\n\r\n")
        drip(connection, b"{")
    assert until(lambda: not server.server.server_state.connections)


def test_what_is_left_of_a_body_that_was_answered(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key is wrong, so nobody waits for the body."""
    monkeypatch.setattr(limits, "REFUSED_READ_S", 0.1)
    server = serve(engine(), api_key="k")
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(HEAD + b"Content-Length: 100000\r\n\r\n")
        connection.settimeout(20)
        assert connection.recv(4096).startswith(b"HTTP/1.1 401")
        monkeypatch.setattr(connections, "HEADER_TIMEOUT_S", 0.4)
        drip(connection, b"{")
    assert until(lambda: not server.server.server_state.connections)


def test_answers_may_take_longer(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is for what is asked, and not for the answer."""
    monkeypatch.setattr(connections, "HEADER_TIMEOUT_S", 2.0)
    server = serve(ScriptedEngine([*tokens(WORLD), 2.5, *tokens(WORLD), finished()]))
    reply = server.post("/v1/completions", {"prompt": "x", "stream": True})
    assert reply.status_code == 200 and reply.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"hello\r\n\r\n", b"400 Bad Request", b"invalid_http"),
        (b"GET /health HTTP/1.1\r\n\r\n", b"400 Bad Request", b"invalid_http"),
        (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", b"501 Not Implemented", b"invalid_http"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"400 Bad Request", b"invalid_http"),
        (
            HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"400 Bad Request",
            b"invalid_http",
        ),
        (HEAD + b"A: " + b"a" * (4 << 20), b"431 Request Header Fields Too Large", b"header_too_large"),
    ],
)
def test_what_is_no_http_is_answered_and_counted(
    serve: Serve, sent: bytes, status: bytes, code: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where more is on its way than was read: the connection is not reset before the answer is there."""
    server = serve(engine())
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(sent)
        reply = to_the_end(connection)
    assert reply.startswith(b"HTTP/1.1 " + status) and b'"code":"' + code in reply and b"bytearray" not in reply
    assert b'refused_total{code="' + code in server.service.metrics.text()
    assert server.chat().status_code == 200
    assert "Traceback" not in caplog.text


def test_what_is_no_http_after_an_answer_ends_the_connection(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A body goes wrong that was refused before it was read."""
    monkeypatch.setattr(limits, "REFUSED_READ_S", 0.1)
    server = serve(engine(), api_key="right")
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        reply = b""
        while b'"invalid_api_key"}}' not in reply:
            reply += connection.recv(4096)
        connection.sendall(b"zz\r\n")
        assert to_the_end(connection) == b""
    assert "Traceback" not in caplog.text


def test_who_lingers_is_hung_up_on(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LINGER_S", 0.2)
    server = serve(engine())
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"hello\r\n\r\n")
        drip(connection, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert until(lambda: not server.server.server_state.connections)


def test_a_head_request_whose_body_goes_wrong_gets_no_body(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(engine())
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"HEAD /v1/models HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
        reply = to_the_end(connection)
    assert reply.startswith(b"HTTP/1.1 400") and reply.endswith(b"\r\n\r\n")
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("closed_by", ["the client", "the server"])
def test_who_does_not_take_the_last_answers_is_given_up(
    closed_by: str, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not sent yet stays below the mark at which a transport says so."""
    monkeypatch.setattr(connections, "STALLED_S", 0.5)
    server = serve(engine())
    server.server.config.timeout_keep_alive = 1
    with deaf(server, b"") as client:
        if closed_by == "the client":
            client.shutdown(socket.SHUT_WR)
        assert until(lambda: not server.server.server_state.connections)


def test_a_refusal_that_is_not_taken_is_given_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LINGER_S", 0.2)
    server = serve(engine())
    with deaf(server, b"hello\r\n\r\n"):
        assert until(lambda: not server.server.server_state.connections)
