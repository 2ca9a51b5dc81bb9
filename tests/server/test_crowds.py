"""More connections than the server takes: idle ones go, and whoever asks how it fares is answered."""

from __future__ import annotations

import socket
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest

from emoe.cli import serve as command
from emoe.server import connections, running
from emoe.server.settings import MAX_CONNECTIONS
from tests.server.conftest import Running, Serve, raw_post, until
from tests.server.stand_ins import ScriptedEngine, finished, tokens
from tests.server.test_connections import HEAD, WORLD, deaf, read_all, there, to_the_end

MOST = 4
GET = "GET {} HTTP/1.1\r\nHost: x\r\n\r\n"


@contextmanager
def opened(server: Running, number: int, text: bytes = b"") -> Iterator[list[socket.socket]]:
    """So many connections on which this was sent."""
    with ExitStack() as stack:
        made = []
        for _ in range(number):
            each = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            each.sendall(text)
            each.settimeout(20)
            made.append(each)
        yield made


def ask(server: Running, text: bytes) -> bytes:
    """The answer on a connection of its own, up to where it stands still."""
    with opened(server, 1, text) as (connection,):
        return connection.recv(65536)


def is_closed(connection: socket.socket) -> bool:
    while connection.recv(4096):
        continue
    return True


def is_open(server: Running, connection: socket.socket) -> bool:
    port = connection.getsockname()[1]
    return any(each.client is not None and each.client[1] == port for each in there(server))


def count(server: Running) -> int:
    return len(server.server.server_state.connections)


def closing(server: Running) -> int:
    return sum(each.transport.is_closing() for each in there(server))


def busy(server: Running) -> bool:
    return all(each._busy for each in there(server))


def engine() -> ScriptedEngine:
    return ScriptedEngine([*tokens(WORLD), 60.0, finished()])


@pytest.mark.parametrize("said", [b"", b"GET /hea", GET.format("/health").encode()])
def test_the_longest_idle_connection_goes(serve: Serve, said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it never said anything, began to, or was answered before."""
    monkeypatch.setattr(connections, "YOUNG_S", 0.0)
    server = serve(engine(), max_connections=MOST)
    with opened(server, MOST, said) as idle:
        if said.endswith(b"\r\n\r\n"):
            assert all(each.recv(4096).startswith(b"HTTP/1.1 200") for each in idle)
        assert until(lambda: count(server) == MOST)
        for path in ("/health", "/metrics", "/v1/models"):
            assert ask(server, GET.format(path).encode()).startswith(b"HTTP/1.1 200")
        assert is_closed(idle[0])
        assert is_open(server, idle[-1])  # it came last


def test_a_burst_is_answered_or_refused_and_never_cut(serve: Serve) -> None:
    """Clients that connect at once have asked before the server has read anything of theirs."""
    server = serve(engine(), max_connections=MOST)
    with opened(server, 8 * MOST, raw_post("/v1/completions", {"prompt": "x", "stream": True})) as clients:
        answers = [client.recv(65536) for client in clients]
    assert sum(answer.startswith(b"HTTP/1.1 200") for answer in answers) == MOST
    assert sum(answer.startswith(b"HTTP/1.1 503") for answer in answers) == 7 * MOST


def test_who_does_not_take_an_answer_is_given_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "STALLED_S", 0.2)
    server = serve(engine(), max_connections=MOST)
    asked = GET.format("/metrics").encode() * 2000
    with opened(server, 1) as (client,):
        client.setblocking(False)
        sent = client.send(asked)
        assert sent > 0 and until(lambda: count(server) == 0)


@pytest.mark.parametrize("body", [True, False])
def test_where_all_are_busy_only_probes_are_answered(serve: Serve, body: bool) -> None:
    """Streams under way, or bodies that do not come, are not cut for others."""
    server = serve(engine(), max_connections=MOST, cors_origins=("https://a.example",))
    stream = raw_post("/v1/completions", {"prompt": "x", "stream": True})
    text = HEAD + b"Content-Length: 9\r\n\r\n{" if body else stream
    with opened(server, MOST, text) as clients:
        assert until(lambda: count(server) == MOST and busy(server))
        for path in ("/health", "/metrics"):
            assert ask(server, GET.format(path).encode()).startswith(b"HTTP/1.1 200")
        with opened(server, 1, stream.replace(b"Host: x", b"Host: x\r\nOrigin: https://a.example")) as (refused,):
            reply = read_all(refused)
        assert b"access-control-allow-origin: https://a.example" in reply  # a page may read why
        assert reply.startswith(b"HTTP/1.1 503") and b'"code":"too_many_connections"' in reply
        assert b"retry-after: 1" in reply.lower() and b"connection: close" in reply.lower()
        assert b'requests_refused_total{code="too_many_connections"' in server.service.metrics.text()
        with opened(server, 1, raw_post("/v1/completions", {"prompt": "x" * 3_000_000})) as (refused,):
            assert to_the_end(refused).startswith(b"HTTP/1.1 503")  # not a reset while it still sends
        clients[0].close()
        assert until(lambda: count(server) == MOST - 1)
        assert ask(server, stream).startswith(b"HTTP/1.1 200")


def test_beyond_the_reserve_nobody_is_heard(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Busy connections are bounded too, whatever they ask for."""
    monkeypatch.setattr(connections, "RESERVE", 16)
    server = serve(engine(), max_connections=1)
    half = HEAD.replace(b"/v1/completions", b"/health") + b"Content-Length: 9\r\n\r\n{"
    with ExitStack() as stack:
        for number in range(1 + connections.RESERVE):
            stack.enter_context(opened(server, 1, half))
            assert until(lambda most=number + 1: count(server) == most and busy(server))  # type: ignore[misc]
        for lingering in (connections.LINGERING, 0):
            monkeypatch.setattr(connections, "LINGERING", lingering)
            with opened(server, 1) as (one,):
                reply = to_the_end(one)
            assert reply.startswith(b"HTTP/1.1 503 Service Unavailable") and b"retry-after: 1" in reply.lower()
            assert reply.endswith(b'"code":"too_many_connections"}}')
        monkeypatch.undo()
        monkeypatch.setattr(connections, "RESERVE", 16)
        for _ in range(5):  # a request that was on its way resets nothing
            with opened(server, 1, raw_post("/v1/completions", {"prompt": "x" * 200_000})) as (one,):
                assert to_the_end(one).startswith(b"HTTP/1.1 503 Service Unavailable")
    assert b'refused_total{code="too_many_connections",model_name="emoe-nano"} 7.0' in server.service.metrics.text()


def test_a_body_that_does_not_come_does_not_hold_up_the_end(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    server = serve(engine())
    with opened(server, 1, HEAD + b"Content-Length: 9\r\n\r\n{") as (connection,):
        assert until(lambda: count(server) == 1 and busy(server))
        server.server.should_exit = True
        assert is_closed(connection)
        assert until(lambda: not server.server.server_state.tasks)
    assert not caplog.records


def test_the_option() -> None:
    """By default there is room for all that may wait and run."""
    generation = SimpleNamespace(do_sample=False, max_new_tokens=None)
    numbers = dict.fromkeys(("max_body_size", "keep_alive", "write_timeout", "shutdown_timeout", "status_interval"), 1)
    args = Namespace(api_key=None, cors_origin=None, request_timeout=0, max_num_seqs=5, **numbers)
    most = []
    for args.max_connections, args.max_queue in ((None, 10), (None, 1000), (7, 1000)):
        most.append(command.server_settings(args, generation, None).max_connections)
    assert most == [MAX_CONNECTIONS, 2010, 7]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits")
def test_files_are_allowed_or_it_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import resource

    limits = [100, 500]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.__setitem__(slice(None), list(new)))
    running.allow_files(50)
    assert limits == [100, 500]
    running.allow_files(300)
    assert limits == [300, 500] and not caplog.records
    running.allow_files(900)
    assert limits == [500, 500]
    assert "lets this process open 500 files" in caplog.text


def test_closed_connections_that_take_nothing_keep_no_place(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of them so many are kept; the eldest is cut."""
    monkeypatch.setattr(connections, "CLOSING", 2)
    monkeypatch.setattr(connections, "RESERVE", 0)
    server = serve(engine(), max_connections=3)
    with ExitStack() as stack:
        for number in range(3):
            stack.enter_context(deaf(server, b"")).shutdown(socket.SHUT_WR)
            assert until(lambda wanted=number + 1: closing(server) == wanted)  # type: ignore[misc]
        assert ask(server, GET.format("/v1/models").encode()).startswith(b"HTTP/1.1 200")
        assert until(lambda: count(server) <= 3)
