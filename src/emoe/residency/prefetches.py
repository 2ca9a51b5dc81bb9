"""Loads that nothing waits for yet: issued ahead of need, and committed by the thread that runs layers.

Loader threads only fill slots that the table has set to `loading`. What they have finished is noted at the next visit
of a layer; a layer that needs a prefetch still under way waits for it instead of reading the expert again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from emoe.residency.loader import Load, Loader
from emoe.residency.table import Key, ResidencyTable
from emoe.residency.worth import Worth

NEXT_GATE, PLAN = 1, 2
"""Loader priorities of prefetches; demand loads (0) go before both."""

PLAN_DEPTH = 4
"""Plan loads under way at once, all of one layer: the link is not flooded (paper, section 2.7)."""

Start = Callable[[Key, int, int], Load]
"""Starts the load of (key, slot, priority)."""


@dataclass(slots=True)
class Flight:
    """A load under way; `ahead` says that it began as a prefetch."""

    key: Key
    slot: int
    load: Load
    ahead: bool = False


@dataclass(slots=True)
class Taking:
    """The experts that one token needs of a layer: those that are there, and the loads of the others, all begun.

    Attributes:
        layer, experts: what is asked for.
        slots: the pinned slot of each of `experts`, -1 while it is not there.
        flights: the loads under way.
        demanded: the keys whose loads began for this, `beside` prefetches or not.
        waited_s: what had been waited for loads before.
        mends: how often the pool had been mended when these slots were taken.
    """

    layer: int
    experts: Sequence[int]
    slots: list[int] = field(default_factory=list)
    flights: deque[Flight] = field(default_factory=deque)
    demanded: list[Key] = field(default_factory=list)
    beside: bool = False
    waited_s: float = 0.0
    mends: int = 0


@dataclass(slots=True)
class _Alone:
    """What a demand load takes when no prefetch is under way: mean wait per load, recent ones counting most."""

    loads: float = 0.0
    seconds: float = 0.0

    def add(self, loads: int, seconds: float) -> None:
        self.loads, self.seconds = 0.98 * self.loads + loads, 0.98 * self.seconds + seconds


class Prefetches:
    """The prefetches of one bank. Only the thread that runs layers may call its methods."""

    def __init__(
        self,
        table: ResidencyTable,
        loader: Loader,
        start: Start,
        commit: Callable[[int, int], None] | None = None,
        abort: Callable[[int], None] | None = None,
        room: Callable[[Key, bool], bool] = lambda key, ahead: True,
    ) -> None:
        """Start with none.

        `start` submits a load, `commit` (slot, bytes read) and `abort` note its end (None: the table alone does), and
        `room` says whether one of a key could begin now, ahead of need.
        """
        self.worth = Worth()
        self.failed = 0
        self.last_error = ""
        self._table = table
        self._loader = loader
        self._start = start
        self._commit = commit or table.commit
        self._abort = abort or table.abort
        self._room = room
        self._flying: dict[Key, Flight] = {}
        self._queue: deque[Key] = deque()
        self._planned: frozenset[Key] = frozenset()
        self._seconds: dict[Key, float] = {}  # load time of prefetches that wait to be used
        self._displaced: dict[Key, Key] = {}  # evicted key -> the prefetch it was evicted for
        self._alone = {False: _Alone(), True: _Alone()}

    @property
    def flying(self) -> bool:
        """Whether a prefetch is under way."""
        return bool(self._flying)

    @property
    def slots(self) -> set[int]:
        """The slots that prefetches under way fill."""
        return {flight.slot for flight in self._flying.values()}

    @property
    def queued(self) -> int:
        """Keys of the plan whose loads have not been issued yet."""
        return len(self._queue)

    # -- issuing --------------------------------------------------------------------------------------------

    def plan(self, keys: Sequence[Key]) -> None:
        """Load what is missing of `keys`, in their order, in place of whatever was planned before.

        None of `keys` is evicted for another of them. Loads of the older plan that have not started are cancelled.
        """
        self._planned = frozenset(keys)
        self._queue = deque(key for key in keys if self._table.find(key) is None)
        for key in keys:
            if self._table.is_resident(key):
                self._adopt(key)
        self.drop_unstarted(key for key in self._flying if key not in self._planned)
        self.poll()

    def ask(self, keys: Sequence[Key], limit: int) -> None:
        """Load what is missing of `keys` while fewer than `limit` prefetches are under way; the rest is forgotten."""
        protect = frozenset(keys)
        for key in keys:
            if len(self._flying) >= limit:
                return
            if self._table.find(key) is None:
                self._issue(key, protect, NEXT_GATE)

    def poll(self) -> None:
        """Note which prefetches have ended, and issue the next loads of the plan."""
        if self._flying:
            for flight in [flight for flight in self._flying.values() if flight.load.done.is_set()]:
                del self._flying[flight.key]
                if flight.load.error is None:
                    self._commit(flight.slot, flight.load.nbytes)
                    self._seconds[flight.key] = flight.load.seconds
                    self._adopt(flight.key)
                else:  # no request needed it: the layer that does will read it again, and raise
                    self._abort(flight.slot)
                    self.failed += 1
                    self.last_error = str(flight.load.error)
        while self._queue and len(self._flying) < PLAN_DEPTH:
            key = self._queue[0]
            if self._table.find(key) is None:
                if any(other[0] != key[0] for other in self._flying):
                    return  # the layer before is still loading
                if not self._issue(key, self._planned, PLAN):
                    return
            self._queue.popleft()

    def _issue(self, key: Key, protect: frozenset[Key], priority: int) -> bool:
        if not self._room(key, True):
            return False
        # With a lane, residents stay until what replaces them is there: no layer runs short of experts meanwhile.
        slot = self._table.reserve(key, transient=bool(self._table.plan.lane), protect=protect, prefetch=True)
        if slot is None:
            return False
        if self._table.evicted is not None:
            self._displaced[self._table.evicted] = key
        self._flying[key] = Flight(key, slot, self._start(key, slot, priority), ahead=True)
        return True

    def _adopt(self, key: Key) -> None:
        if self._table.plan.lane:
            wished = self._table.wished.get(key[0], ())
            self._table.adopt(key, self._planned.union((key[0], expert) for expert in wished))

    # -- use ------------------------------------------------------------------------------------------------

    def claim(self, key: Key) -> Flight | None:
        """Hand over the prefetch of `key` that is under way to a layer that needs it now; None if there is none."""
        return self._flying.pop(key, None)

    def landed(self, flight: Flight, waited_s: float) -> None:
        """Note that a layer waited for a claimed prefetch and has it."""
        self._table.count_used(flight.slot)
        self._adopt(flight.key)
        self._seconds[flight.key] = flight.load.seconds
        self.used(flight.key, waited_s)

    def used(self, key: Key, waited_s: float = 0.0) -> None:
        """Note the first use of a prefetch."""
        self.worth.hide(max(0.0, self._seconds.pop(key, 0.0) - waited_s))
        for victim in [v for v, winner in self._displaced.items() if winner == key]:
            del self._displaced[victim]

    def demanded(self, keys: Iterable[Key], waited_s: float, *, beside: bool, prefill: bool) -> None:
        """Account for demand loads: what they waited, `beside` prefetches or alone.

        A key that was evicted for a prefetch nobody has used yet costs its whole load.
        """
        loads = 0
        alone = self._alone[prefill]
        for key in keys:
            loads += 1
            if self._displaced and self._displaced.pop(key, None) is not None and alone.loads:
                self.worth.delay(alone.seconds / alone.loads)
        if not loads:
            return
        if not beside:
            alone.add(loads, waited_s)
        elif alone.loads:
            self.worth.delay(waited_s - loads * alone.seconds / alone.loads)
        else:
            self.worth.need_baseline()

    # -- ending ---------------------------------------------------------------------------------------------

    def drop_unstarted(self, keys: Iterable[Key]) -> None:
        """Cancel those prefetches of `keys` that no loader thread has started."""
        for key in list(keys):
            flight = self._flying.get(key)
            if flight is not None and self._loader.drop(flight.load):
                del self._flying[key]
                self._abort(flight.slot)

    def stop(self) -> None:
        """Forget the plan and cancel what has not started; what has will end by itself."""
        self._queue.clear()
        self.drop_unstarted(self._flying)

    def forget(self) -> None:
        """Forget the plan and every prefetch under way, whose loads somebody else has ended."""
        self._queue.clear()
        self._flying.clear()

    def cancel(self) -> None:
        """End every prefetch under way now, so that their slots are free for a demand load."""
        self.drop_unstarted(self._flying)
        for flight in self._flying.values():
            self._loader.cancel(flight.load)  # waits: it has started
        waiting, self._queue = self._queue, deque()
        self.poll()
        self._queue = waiting
