"""One bank at work: it hands the running layer the slots of the experts it routed to, loading what is missing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from emoe.checkpoint.index import ExpertIndex
from emoe.checkpoint.readers import Reader
from emoe.errors import BudgetError
from emoe.residency.bank import Bank
from emoe.residency.early import evenly, turns
from emoe.residency.filling import Filling
from emoe.residency.loader import Loader
from emoe.residency.prefetches import Flight, Taking
from emoe.residency.table import Key, ResidencyTable, SlotState

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


class ExpertPool(Filling):
    """A bank, the table of what is in it, and the way experts get there.

    One thread at a time runs layers (the caller holds the model's lock); loader threads only fill slots that the
    table has set to `loading`, and never change the table.
    """

    def __init__(
        self,
        table: ResidencyTable,
        bank: Bank,
        index: ExpertIndex,
        reader: Reader,
        loader: Loader,
        depth: int = 4,
    ) -> None:
        """Bind the parts; `depth` loads are in flight at most."""
        super().__init__(table, bank, index, reader, loader)
        self._depth = depth
        # Every expert is there for good: nothing is pinned, evicted or scored, which took 14 us a layer of 8 experts.
        self._settled = False

    def take(self, layer: int, experts: Sequence[int], *, count: bool = True) -> list[int]:
        """Return the pinned slots of `experts`, in their order, having loaded and waited for the missing ones.

        Give the slots back with `release`.

        Raises:
            BudgetError, ReadError: as `begin` and `arrive`; no slot stays pinned or loading.
        """
        taking = self.begin(layer, experts, count=count)
        try:
            while taking.flights:
                self.arrive(taking)
        except BaseException:
            self.end(taking)
            raise
        return taking.slots

    def release(self, slots: Iterable[int]) -> None:
        """Unpin the slots that `take` returned."""
        if not self._settled:
            self._unpin(set(slots))

    def begin(self, layer: int, experts: Sequence[int], *, count: bool = True) -> Taking:
        """Pin those of `experts` that are there and begin the loads of all others at once; end it with `end`.

        All of them are resident at once, so there must be room for them (the floor of the budget for one token).
        `count` says whether hits and misses are counted.

        Raises:
            BudgetError: there are more experts than slots; no slot stays pinned or loading.
        """
        table = self.table
        table.visit(layer)
        counters = table.counters[layer]
        taking = Taking(layer, experts, mends=self._mends)
        if self._settled:
            counters.hits += count * len(experts)
            taking.slots = [self._slot_of(layer, expert) for expert in experts]
            return taking
        missing: list[int] = []
        taking.flights.extend(self.early.claim(layer, set(experts)))
        for expert in experts:
            key = (layer, expert)
            slot = table.find(key)
            if slot is not None and table.slots[slot].prefetched:
                self._note_use(key, slot)
            table.use(key, keep=True)
            if slot is None or table.slots[slot].state is SlotState.LOADING:
                missing.append(expert)
                counters.misses += count
                taking.slots.append(-1)
            else:
                if table.slots[slot].state is SlotState.READY:  # a duplicate is pinned already
                    table.pin(slot)
                if self.transfers is not None:
                    self.transfers.use(slot)
                counters.hits += count
                taking.slots.append(slot)
        if missing:
            try:
                self._begin_loads(taking, missing)
            except BaseException:
                self.end(taking)
                raise
        return taking

    def _begin_loads(self, taking: Taking, missing: list[int]) -> None:
        layer, protect = taking.layer, frozenset((taking.layer, expert) for expert in taking.experts)
        taking.beside, taking.waited_s = self.prefetches.flying, self.load_wait_s
        flights = taking.flights
        flights.extend(self._claim(layer, missing))
        begun = {flight.key for flight in flights}
        for expert in dict.fromkeys(missing):
            key = (layer, expert)
            if key in begun:
                continue
            if not self._room(key, False):
                self.prefetches.cancel()
            slot = self.table.reserve(key, protect=protect)
            if slot is None and self.prefetches.flying:
                self.prefetches.cancel()
                slot = self.table.reserve(key, protect=protect)
            if slot is None:
                raise BudgetError(
                    f"layer {layer} needs {len(protect)} experts at once and the budget has "
                    f"{self.table.plan.slots} slots. Give at least "
                    f"{len(protect) * self.bank.slot_nbytes} bytes of expert memory."
                )
            flights.append(self._start(layer, expert, slot))
        taking.demanded = [flight.key for flight in flights if not flight.ahead]

    def arrive_first(self, taking: Taking) -> tuple[list[int], int] | None:
        """Wait for the first projection of the last load of `taking`, while its second is read.

        Returns the places in `taking.slots` that it will fill and its slot; None where there is nothing to be gained.
        """
        if len(taking.flights) != 1 or self.transfers is not None:
            return None
        flight = taking.flights[0]
        start = time.perf_counter()
        there = self._loader.wait_first(flight.load)
        self.load_wait_s += time.perf_counter() - start
        places = [place for place, expert in enumerate(taking.experts) if expert == flight.key[1]]
        return (places, flight.slot) if there else None

    def arrive(self, taking: Taking) -> list[int]:
        """Wait for the next load of `taking` to end; return the places in `taking.slots` that it filled.

        Raises:
            ReadError: the expert could not be read.
        """
        flights = taking.flights
        flight = next((flight for flight in flights if flight.load.done.is_set()), flights[0])
        flights.remove(flight)
        self._finish(flight)
        places = [place for place, expert in enumerate(taking.experts) if expert == flight.key[1]]
        for place in places:
            taking.slots[place] = flight.slot
        if not flights:
            waited_s = self.load_wait_s - taking.waited_s
            self.prefetches.demanded(taking.demanded, waited_s, beside=taking.beside, prefill=False)
        return places

    def end(self, taking: Taking) -> None:
        """Give the slots of `taking` back, and those of loads that nobody waited for; after a mend it has none."""
        if taking.mends != self._mends:
            return
        self._drain(taking.flights)
        taking.flights.clear()
        self.release(slot for slot in taking.slots if slot >= 0)

    def stream(
        self,
        layer: int,
        experts: Sequence[int],
        *,
        prefill: bool,
        wanted: frozenset[int] | None = None,
        keep: frozenset[int] = frozenset(),
        count: bool = True,
        together: bool = False,
        ahead: bool = False,
    ) -> Iterator[list[tuple[int, int]]]:
        """Yield waves of (expert, slot), in all every one of `experts`, each read at most once, however few slots.

        Residents come first, while the first loads are under way (but see `ahead`); slots are pinned until the next
        wave is asked for.

        Args:
            layer: the running layer.
            experts: what it routed to, most tokens first; no duplicates.
            prefill: missing experts pass through transient slots, so that residents stay (unless there is room).
            count: whether hits and misses are counted.
            together: residents make one wave; else every wave is one expert.
            ahead: while it reads a prompt, spread the residents among what is loaded, and begin loads of the next
                layer at the end (`Early`).
            keep: these stay after a prompt (at most the layer's quota) in place of residents that are not among them.
            wanted: when given, exactly these (at most the layer's quota) become residents; others pass through, and
                residents that are not among them leave, first of all, so that loading need not wait for slots.

        Raises:
            ReadError: an expert could not be read; no slot stays pinned or loading.
        """
        table = self.table
        table.visit(layer)
        if self._settled:
            table.counters[layer].hits += count * len(experts)
            ready = [(expert, self._slot_of(layer, expert)) for expert in experts]
            yield from [ready] if together else ([one] for one in ready)
            return
        mends, beside = self._mends, self.prefetches.flying
        before = self.load_wait_s
        ahead = ahead and prefill and self.transfers is None
        if ahead:
            experts = evenly(experts)
        early = self.early.claim(layer, set(experts))
        hits = [e for e in experts if table.is_resident((layer, e))]
        resident = set(hits)
        missing = deque(e for e in experts if e not in resident)
        for expert in experts:
            slot = table.find((layer, expert))
            if slot is not None and table.slots[slot].prefetched:
                self._note_use((layer, expert), slot)
            table.use((layer, expert), keep=not prefill)
        if count:
            table.counters[layer].hits += len(hits)
            table.counters[layer].misses += len(missing)
        if wanted is not None:
            hits.sort(key=lambda e: e in wanted)
            table.make_way(layer, sum(expert in wanted for expert in missing), wanted)
            keep = wanted
        protect = frozenset((layer, e) for e in keep)
        flights = deque([*early, *self._claim(layer, missing)])
        begun = {flight.key[1] for flight in flights}
        following: deque[Key] = self.early.guess(layer, list(experts)) if ahead else deque()
        missing = deque(e for e in missing if e not in begun)
        demanded: list[Key] = []
        pinned: set[int] = set()

        def fill() -> None:
            while missing and len(flights) < self._depth:
                expert = missing[0]
                if not self._room((layer, expert), False):
                    return
                passing = wanted is not None or (prefill and not table.below_quota(layer))
                slot = table.reserve((layer, expert), transient=passing)
                if slot is None:
                    return
                missing.popleft()
                demanded.append((layer, expert))
                flights.append(self._start(layer, expert, slot, passing=passing and expert not in keep))
            if not missing:
                self.early.begin(following)

        def done(slots: Collection[int]) -> None:
            pinned.difference_update(slots)
            self._unpin(slots)

        try:
            for expert in hits:
                slot = self._slot_of(layer, expert)
                table.pin(slot)
                pinned.add(slot)
                if self.transfers is not None:
                    self.transfers.use(slot)
                if expert in keep:
                    table.adopt((layer, expert), protect)
            fill()
            found = deque((expert, self._slot_of(layer, expert)) for expert in hits)
            here = turns(len(found), len(missing) + len(flights) if ahead else 0, len(early))
            while found or missing or flights:
                turn = next(here, True)
                if found and (turn or not flights):
                    wave = [found.popleft() for _ in range(len(found) if together else 1)]
                    yield wave
                    done([slot for _, slot in wave])
                    fill()
                    continue
                if not flights and self.prefetches.flying:  # they hold the slots that this layer needs
                    self.prefetches.cancel()
                    fill()
                if not flights:
                    raise BudgetError(f"no slot could be freed for layer {layer}: a defect in emoe, please report it.")
                flight = flights.popleft()
                self._finish(flight)
                pinned.add(flight.slot)
                if flight.key[1] in keep:
                    table.adopt(flight.key, protect)
                fill()
                yield [(flight.key[1], flight.slot)]
                done((flight.slot,))
                fill()
            self.prefetches.demanded(demanded, self.load_wait_s - before, beside=beside, prefill=prefill)
        finally:
            if mends == self._mends:  # else its slots are others' now
                self._drain(flights)
                self._unpin(pinned)

    def fill(self, layer: int, experts: Collection[int], wanted: frozenset[int] | None = None) -> None:
        """Load what is missing of `experts`, to stay: a layer that runs few of a prompt's tokens is filled for others.

        `wanted`: as for `stream`.

        Raises:
            ReadError: an expert could not be read.
        """
        keep = frozenset(experts)
        missing = sum(not self.table.is_resident((layer, expert)) for expert in keep)
        self.table.counters[layer].misses += missing  # no look-ups: what is there counts for nothing
        for _ in self.stream(layer, sorted(keep), prefill=True, wanted=wanted, keep=keep, count=False):
            pass

    def preload(self, keys: Iterable[tuple[int, int]], progress: Progress | None = None) -> None:
        """Load `keys` into empty slots, reporting progress in bytes of slots.

        Raises:
            ReadError: an expert could not be read.
            BudgetError: there are more keys than slots.
        """
        todo = deque(key for key in keys if self.table.find(key) is None)
        total = len(todo) * self.bank.slot_nbytes
        flights: deque[Flight] = deque()
        finished = 0
        try:
            while todo or flights:
                while todo and len(flights) < self._depth:
                    if not self._room(todo[0], False) and flights:
                        break
                    layer, expert = todo.popleft()
                    slot = self.table.reserve((layer, expert))
                    if slot is None:
                        raise BudgetError(f"no slot is left for expert {expert} of layer {layer}.")
                    flights.append(self._start(layer, expert, slot))
                flight = flights.popleft()
                self._finish(flight)
                self._unpin((flight.slot,))
                finished += 1
                if progress is not None:
                    progress(finished * self.bank.slot_nbytes, total)
        finally:
            self._drain(flights)
        states = {slot.state for slot in self.table.slots if slot.key is not None}
        everything = self.table.occupied == sum(self.table.experts.values())
        self._settled = everything and states == {SlotState.READY}
        if self._settled and self.transfers is not None:
            self.transfers.settle()
