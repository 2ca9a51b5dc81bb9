"""Runs the application until it is told to stop, and stops so that nobody is left without an answer."""

from __future__ import annotations

import asyncio
import signal
import socket
from contextlib import suppress
from types import FrameType

import uvicorn
from fastapi import FastAPI

from emoe.errors import UsageError
from emoe.server.connections import HEADER_BYTES, limited
from emoe.server.log import LOGGER
from emoe.server.service import Service

KEEP_ALIVE_S = 30
"""Seconds after which a connection on which nothing has been asked any more is closed."""

FILES_BESIDE = 256
"""Files that a process has open beside its connections, at most: checkpoints, libraries, sockets of its own."""

FLUSH_S = 5
"""Seconds that connections get for their last bytes once every request has ended."""


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address (port 0: a free one), so that a port in use is found before the model is loaded.

    Raises:
        UsageError: the address cannot be bound.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot listen on {host}:{port}: {error}; choose another --host or --port") from error
    return bound


def address_of(bound: socket.socket) -> str:
    """The URL under which a bound socket is reached."""
    host, port = bound.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{port}"


def serve(app: FastAPI, bound: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM. The engine is drained and stopped then."""
    allow_files(app.state.service.settings.max_connections + FILES_BESIDE)
    GracefulServer(config_of(app), app.state.service).run([bound])


def allow_files(wanted: int) -> None:
    """Let this process open so many files, where the system limits them to fewer and lets it; else say so."""
    try:
        import resource
    except ImportError:  # not a Unix
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= wanted:
        return
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == unlimited else min(wanted, hard), hard))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft != unlimited and soft < wanted:
        LOGGER.warning(
            f"the system lets this process open {soft} files, and --max-connections may need {wanted}: raise "
            "`ulimit -n`, or lower --max-connections"
        )


def config_of(app: FastAPI, flush_s: int = FLUSH_S) -> uvicorn.Config:
    """How uvicorn runs the application."""
    service = app.state.service
    return uvicorn.Config(
        app,
        http=limited(service.settings.max_connections, service.metrics.refused),
        loop="asyncio",
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="on",
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=flush_s,
    )


class GracefulServer(uvicorn.Server):
    """On the first signal: refuse new requests, finish what runs, cancel the rest. The second one ends at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._leaving: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Remember the loop for the signal handler."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal; uvicorn would close the connections of waiting requests."""
        # The next one ends the process, whatever it is doing.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self.leave)

    def leave(self) -> None:
        """Begin to stop. On the event loop."""
        if self._leaving is None:
            self._leaving = asyncio.create_task(self._leave())

    async def _leave(self) -> None:
        service = self._service
        seconds = service.settings.shutdown_timeout_s
        service.draining = True
        stats = service.engine.stats()
        LOGGER.info(
            f"stopping: {stats.running} running and {stats.waiting} waiting requests get {seconds:g} s; a second "
            "signal ends at once"
        )
        try:
            if not await asyncio.to_thread(service.engine.drain, seconds):
                LOGGER.warning("stopping: the requests that are left are cancelled")
            await asyncio.to_thread(service.engine.stop)
        finally:
            self.should_exit = True
