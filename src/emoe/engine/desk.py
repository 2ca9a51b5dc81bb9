"""Where requests are handed over: any thread puts them here, the engine's thread takes them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from emoe.engine.interface import EngineStoppedError, QueueFullError
from emoe.engine.tickets import Ticket
from emoe.errors import EmoeError


class Desk:
    """The requests there are, behind one lock. Only the engine's thread moves them once they are there."""

    def __init__(self, max_waiting: int) -> None:
        """Start open and empty."""
        self._changed = threading.Condition()
        self._max_waiting = max_waiting
        self._tickets: dict[str, Ticket] = {}
        self._waiting: list[Ticket] = []
        self.running: list[Ticket] = []
        """In order of admission; the engine's thread's own."""
        self._draining = self.stopping = False
        self.failure: EmoeError | None = None

    # -- for any thread -------------------------------------------------------------------------------------

    def put(self, make: Callable[[], Ticket], retry_after_s: float) -> Ticket:
        """Queue the request that `make` gives, which is called only if there is room: quick, and asks nothing of here.

        Raises:
            EngineStoppedError: no more are taken.
            QueueFullError: too many wait; the caller says when there is likely room.
        """
        with self._changed:
            if self._draining or self.stopping:
                why = f": {self.failure}" if self.failure is not None else "."
                raise EngineStoppedError(f"the engine takes no more requests, it is stopping or has stopped{why}")
            waiting = sum(1 for each in self._waiting if not each.request.resumed)
            if waiting >= self._max_waiting:
                raise QueueFullError(
                    f"{waiting} requests wait already, and no more than {self._max_waiting} may. Try again in about "
                    f"{retry_after_s:.0f} s.",
                    retry_after_s=retry_after_s,
                )
            ticket = make()
            self._tickets[ticket.id] = ticket
            self._waiting.append(ticket)
            self._changed.notify_all()
            return ticket

    def cancel(self, request: str) -> None:
        """Mark a request, if it is there."""
        with self._changed:
            if (ticket := self._tickets.get(request)) is not None:
                ticket.cancelled = True
                self._changed.notify_all()

    def drain(self, timeout_s: float) -> bool:
        """Take no more, and wait until all have ended; whether they have."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._tickets, timeout_s)

    def stop(self, failure: EmoeError | None = None) -> None:
        """Take no more, and let the engine's thread end."""
        with self._changed:
            self.stopping = True
            self.failure = failure or self.failure
            self._changed.notify_all()

    def counts(self) -> tuple[int, int]:
        """How many run and how many wait."""
        with self._changed:
            return len(self.running), len(self._waiting)

    # -- for the engine's thread ----------------------------------------------------------------------------

    def wait_for_work(self) -> bool:
        """Sleep until there is a request; False if it is time to end."""
        with self._changed:
            self._changed.wait_for(lambda: self.stopping or bool(self._tickets))
            return not self.stopping

    def __getitem__(self, request: str) -> Ticket:
        return self._tickets[request]

    def all(self) -> list[Ticket]:
        """Every request that has not ended."""
        with self._changed:
            return list(self._tickets.values())

    def waiting(self) -> list[Ticket]:
        """Those that wait, preempted ones first."""
        with self._changed:
            return sorted(self._waiting, key=lambda ticket: not ticket.request.resumed)

    def admit(self, ticket: Ticket) -> None:
        """A waiting request runs."""
        with self._changed:
            self._waiting.remove(ticket)
            self.running.append(ticket)

    def take_back(self, tickets: Sequence[Ticket]) -> None:
        """Running requests wait again, in this order, before all others."""
        with self._changed:
            for ticket in tickets:
                self.running.remove(ticket)
            self._waiting[:0] = tickets

    def leave(self, ticket: Ticket) -> None:
        """A request has ended."""
        with self._changed:
            self._tickets.pop(ticket.id, None)
            for those in (self.running, self._waiting):
                if ticket in those:
                    those.remove(ticket)

    def tell_left(self) -> None:
        """Wake who waits for requests to end, after they have been told."""
        with self._changed:
            self._changed.notify_all()
