"""A connection whose client has to say what it wants in time: uvicorn itself waits for ever for the end of a header."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_TIMEOUT_S = 30.0
"""Seconds from a connection's beginning, or from the first byte of its next request, until the header is there."""

_TEXT = b"the request did not come in time"


class TimedProtocol(H11Protocol):
    """uvicorn's protocol, which hangs up (408) on who owes the rest of a request that nobody waits for any more.

    Owed is the header, and what is left of a body that was answered before it was read. A body that an endpoint waits
    for is the business of `emoe.server.limits.BodyLimit`, and a connection on which nothing was begun that of
    uvicorn's `timeout_keep_alive`.
    """

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there: the time for its first header runs."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Some of a request has come; the time it may take is not begun anew."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._stop()
        super().connection_lost(exc)

    def _watch(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering or self.transport.is_closing():
            self._stop()
        elif self._late is None:
            self._late = self.loop.call_later(HEADER_TIMEOUT_S, self._hang_up)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _hang_up(self) -> None:
        """The time is over."""
        if self.transport.is_closing():
            return
        if self.conn.our_state is h11.IDLE:
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
            answer = h11.Response(status_code=408, headers=headers, reason=b"Request Timeout")
            for event in (answer, h11.Data(data=_TEXT), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
