"""Clients that never come to the end of what they ask lose their connection; others do not notice."""

from __future__ import annotations

import socket
import time

import pytest

from emoe.server import connections, limits
from tests.server.conftest import Serve, raw_post, until
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


def drip(connection: socket.socket, text: bytes, every_s: float = 0.05, times: int = 200) -> None:
    """Send a little again and again, until the server no longer takes it."""
    try:
        for _ in range(times):
            connection.sendall(text)
            time.sleep(every_s)
    except OSError:
        return
    raise AssertionError("the server takes it for ever")


@pytest.mark.parametrize("begun", [b"", b"GET", HEAD])
def test_a_header_that_does_not_end(serve: Serve, impatient: pytest.MonkeyPatch, begun: bytes) -> None:
    server = serve(engine())
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(begun)
        assert read_all(connection).startswith(b"HTTP/1.1 408 Request Timeout")
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
    """The key is wrong, so nobody reads the body."""
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
