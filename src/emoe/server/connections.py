"""Connections whose clients have to say what they want in time, and of which there are so many at most.

uvicorn itself waits for ever for the end of a header, and its own limit counts connections on which nothing is asked: a
few hundred that lie idle would keep everybody out, the probes of /health too.
"""

from __future__ import annotations

import asyncio
import sys
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from emoe.config import format_bytes
from emoe.server.errors import ApiError
from emoe.server.limits import CROWDED, Refused, too_many_connections

HEADER_TIMEOUT_S = 30.0
"""Seconds from a connection's beginning, or from the first byte of its next request, until the header is there."""

HEADER_BYTES = 16 << 10
"""A header is no larger."""

RESERVE = 128
"""Connections beyond the limit, while nobody else can go: there only /health and /metrics are answered."""

YOUNG_S = 1.0
"""A connection on which nothing has been asked is left alone for so long: its request may be on its way already."""

STALLED_S = 120.0
"""A client that takes nothing of an answer for so long is given up."""

_CLOSE = {"Connection": "close"}

LINGER_S = 1.0
"""Who was refused before all was read may send on for so long: what comes to a closed socket resets the connection, and
the client would see that in the place of the answer."""

LINGERING = 64
"""So many connections beyond `RESERVE` may do so; further ones are closed at once."""

CLOSING = 64
"""So many closed connections whose clients have not taken all of their answers are kept; then the eldest is cut."""


class TimedProtocol(H11Protocol):
    """uvicorn's protocol, which hangs up (408) on who owes the rest of a request that nobody waits for any more.

    What it refuses itself is answered as everywhere (`emoe.server.errors`), and counted (`refused`).

    Owed is the header, and what is left of a body that was answered before it was read. A body that an endpoint waits
    for is the business of `emoe.server.limits.BodyLimit`, and a connection on which nothing was begun that of
    uvicorn's `timeout_keep_alive`.

    Of more than `max_connections` the one goes on which nothing has been asked for the longest time. Where something
    is under way on all of them, what is asked on one more is refused (`emoe.server.limits.CrowdLimit`), also in a burst
    of connections that come at once. Closed ones whose clients still have to take something are not counted.
    """

    max_connections: int | None = None
    _late: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _idle_since = 0.0
    _closed_at: float | None = None
    _beyond = False
    _refusal: asyncio.TimerHandle | None = None

    @staticmethod
    def refused(code: str | None) -> None:
        """Is told of every refusal (`limited` says who listens)."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there: the time for its first header runs."""
        self._idle_since = self.loop.time()
        self.app_state = {**self.app_state, CROWDED: self._turned_away}
        super().connection_made(transport)
        self._watch()
        self._beyond = not self._has_place()
        more = len(self._there()) + 1 - (self.max_connections or 0) - RESERVE
        if self._beyond and more > 0:
            self._refuse(too_many_connections(), linger=more <= LINGERING)

    def data_received(self, data: bytes) -> None:
        """Some of a request has come; the time it may take is not begun anew."""
        if self._refusal is not None:
            return
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._stop()
        self._go_on()
        if self._refusal is not None:
            self._refusal.cancel()
        super().connection_lost(exc)

    def eof_received(self) -> None:
        """The client says nothing more; what calls this closes the connection."""
        super().eof_received()
        self._close()

    def pause_writing(self) -> None:
        """The client takes nothing."""
        super().pause_writing()
        self._wait_for_client()

    def resume_writing(self) -> None:
        """It does again."""
        self._go_on()
        super().resume_writing()
        if self.transport.is_closing():
            self._close()

    def on_response_complete(self) -> None:
        """From here on nothing is asked."""
        self._idle_since = self.loop.time()
        super().on_response_complete()
        if self.transport.is_closing():
            self._close()

    def timeout_keep_alive_handler(self) -> None:
        """Nothing more is asked."""
        super().timeout_keep_alive_handler()
        self._close()

    def shutdown(self) -> None:
        """The server ends: who still sends a body would wait for a refusal, and is not waited for."""
        if self._refusal is not None or (self._busy and self.cycle.more_body and not self.cycle.response_started):
            self._close()
        else:
            super().shutdown()
            if self.transport.is_closing():
                self._close()

    @property
    def _busy(self) -> bool:
        """Whether a request is under way."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _may_go(self) -> bool:
        """Whether it can be closed without anybody missing something."""
        if self._busy or self.transport.is_closing() or self.transport.get_write_buffer_size():
            return False
        return self.cycle is not None or self.loop.time() - self._idle_since >= YOUNG_S

    def _has_place(self) -> bool:
        """Whether it is one of those that there may be, perhaps because another one goes."""
        others = [each for each in self._there() if not each._beyond]
        if self.max_connections is None or len(others) < self.max_connections:
            return True
        idle = [each for each in others if each._may_go]
        if not idle:
            return False
        gone = min(idle, key=lambda each: each._idle_since)
        self.connections.discard(gone)  # the loop tells it later
        gone._close()
        return True

    def _there(self) -> list[TimedProtocol]:
        """The others, but for those that are closed and wait for their clients; of these the eldest may have to go."""
        others = [each for each in self.connections if each is not self and isinstance(each, TimedProtocol)]
        waiting = [each for each in others if each.transport.is_closing()]
        for each in sorted(waiting, key=lambda each: each._closed_at or 0.0)[: max(0, len(waiting) - CLOSING)]:
            each.transport.abort()
        return [each for each in others if not each.transport.is_closing()]

    def _close(self) -> None:
        """Close, and wait for the client to take what is left of its answers, but not for ever as asyncio would."""
        if self._closed_at is None:
            self._closed_at = self.loop.time()
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self._wait_for_client()

    def _turned_away(self) -> bool:
        """Whether there was no place when it came, nor is now."""
        self._beyond = self._beyond and not self._has_place()
        return self._beyond

    def _wait_for_client(self) -> None:
        if self._stalled is None:
            self._stalled = self.loop.call_later(STALLED_S, self.transport.abort)

    def _go_on(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _watch(self) -> None:
        if self._busy or self._refusal is not None or self.transport.is_closing():
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
        text = f"the header did not come within {HEADER_TIMEOUT_S:g} s; send it at once"
        asked = bool(self.conn.trailing_data[0])  # a browser that connects ahead has asked for nothing
        self._refuse(ApiError(408, text, code="header_timeout", headers=_CLOSE), counted=asked)

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP: uvicorn would say 400 to everything, also in the middle of an answer."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        if status == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            text, code = f"the header is too large; send less than {format_bytes(HEADER_BYTES)}", "header_too_large"
        else:
            reason = str(error).partition(": bytearray(")[0]  # h11 quotes what came
            text, code = f"this is no HTTP request that can be read: {reason}", "invalid_http"
        self._refuse(ApiError(status, text, code=code, headers=_CLOSE))

    def _refuse(self, error: ApiError, *, counted: bool = True, linger: bool = True) -> None:
        """Say why, where nothing has been said, and hang up."""
        if self.conn.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            self._close()
            return
        if counted:
            self.refused(error.code)
        reply = error.response()
        reason = HTTPStatus(reply.status_code).phrase.encode()
        answer = h11.Response(status_code=reply.status_code, headers=reply.raw_headers, reason=reason)
        to_head = self.conn.our_state is h11.SEND_RESPONSE and self.cycle.scope["method"] == "HEAD"
        body = () if to_head else (h11.Data(data=bytes(reply.body)),)
        for event in (answer, *body, h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:  # an endpoint that waits for the rest of a body
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._stop()
        self._unset_keepalive_if_required()
        if linger and self.transport.can_write_eof():
            self.transport.write_eof()
            self._refusal = self.loop.call_later(LINGER_S, self._end_of_linger)
        else:
            self._close()

    def _end_of_linger(self) -> None:
        """Who has not taken the refusal by now is not waited for."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self._close()


def limited(max_connections: int, refused: Refused) -> type[TimedProtocol]:
    """The protocol of a server that has so many connections at most, and counts what it refuses with `refused`."""
    own = {"max_connections": max_connections, "refused": staticmethod(refused)}
    return type("LimitedProtocol", (TimedProtocol,), own)
