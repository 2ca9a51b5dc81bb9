"""One bank at work: it hands the running layer the slots of the experts it routed to, loading what is missing."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from emoe.checkpoint.index import ExpertIndex
from emoe.checkpoint.pieces import Piece
from emoe.checkpoint.readers import Reader
from emoe.errors import BudgetError
from emoe.residency.bank import Bank, carve
from emoe.residency.loader import DEMAND, Load, Loader
from emoe.residency.prefetches import Flight, Prefetches
from emoe.residency.table import Key, ResidencyTable, SlotState

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


class ExpertPool:
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
        self.table = table
        self.bank = bank
        self.load_wait_s = 0.0
        self.peak_occupied = 0
        self._index = index
        self._reader = reader
        self._loader = loader
        self._depth = depth
        self._local = threading.local()
        self._cuda = bank.device.type == "cuda"
        self._last_use: dict[int, torch.cuda.Event] = {}
        self.prefetches = Prefetches(table, loader, self._submit)

    # -- what a layer asks for ------------------------------------------------------------------------------

    def take(self, layer: int, experts: Sequence[int], *, count: bool = True) -> list[int]:
        """Return the pinned slots of `experts`, in their order, having loaded and waited for the missing ones.

        All of them are resident at once, so there must be room for them (the floor of the budget for one token).
        Give the slots back with `release`. `count` says whether hits and misses are counted.

        Raises:
            BudgetError: there are more experts than slots.
            ReadError: an expert could not be read; no slot stays pinned or loading.
        """
        table = self.table
        table.visit(layer)
        counters = table.counters[layer]
        slots: list[int] = []
        missing: list[int] = []
        for expert in experts:
            key = (layer, expert)
            slot = table.find(key)
            if slot is not None and table.slots[slot].prefetched:
                self._note_use(key, slot)
            table.use(key, keep=True)
            if slot is None or table.slots[slot].state is SlotState.LOADING:
                missing.append(expert)
                counters.misses += count
                slots.append(-1)
            else:
                if table.slots[slot].state is SlotState.READY:  # a duplicate is pinned already
                    table.pin(slot)
                counters.hits += count
                slots.append(slot)
        if missing:
            held = [slot for slot in slots if slot >= 0]
            self._load_missing(layer, experts, missing, held)
            for i, expert in enumerate(experts):
                if slots[i] < 0:
                    slots[i] = self._slot_of(layer, expert)
        return slots

    def release(self, slots: Iterable[int]) -> None:
        """Unpin the slots that `take` returned."""
        for slot in set(slots):
            self._unpin(slot)

    def _load_missing(self, layer: int, experts: Sequence[int], missing: list[int], held: list[int]) -> None:
        protect = frozenset((layer, expert) for expert in experts)
        beside = self.prefetches.flying
        before = self.load_wait_s
        flights: deque[Flight] = deque()
        taken: list[int] = []
        try:
            flights.extend(self._claim(layer, missing))
            begun = {flight.key for flight in flights}
            for expert in dict.fromkeys(missing):
                key = (layer, expert)
                if key in begun:
                    continue
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
            demanded = [flight.key for flight in flights if not flight.ahead]
            while flights:
                flight = flights.popleft()
                self._finish(flight)
                taken.append(flight.slot)
            self.prefetches.demanded(demanded, self.load_wait_s - before, beside=beside, prefill=False)
        except BaseException:
            self._drain(flights)
            for slot in {*held, *taken}:
                self._unpin(slot)
            raise

    def stream(
        self,
        layer: int,
        experts: Sequence[int],
        *,
        prefill: bool,
        wanted: frozenset[int] | None = None,
        count: bool = True,
    ) -> Iterator[tuple[int, int]]:
        """Yield (expert, slot) for every one of `experts`, each read at most once, however few slots there are.

        Residents come first, while the first loads are under way; each slot is pinned until the next is asked for.

        Args:
            layer: the running layer.
            experts: what it routed to, most tokens first; no duplicates.
            prefill: missing experts pass through transient slots, so that residents stay (unless there is room).
            count: whether hits and misses are counted.
            wanted: when given, exactly these (at most the layer's quota) become residents; others pass through.

        Raises:
            ReadError: an expert could not be read; no slot stays pinned or loading.
        """
        table = self.table
        table.visit(layer)
        beside = self.prefetches.flying
        before = self.load_wait_s
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
            missing = deque(sorted(missing, key=lambda e: e not in wanted))
        protect = frozenset((layer, e) for e in wanted) if wanted is not None else frozenset()
        flights = self._claim(layer, missing)
        begun = {flight.key[1] for flight in flights}
        missing = deque(e for e in missing if e not in begun)
        demanded: list[Key] = []
        pinned: set[int] = set()

        def fill() -> None:
            while missing and len(flights) < self._depth:
                expert = missing[0]
                passing = expert not in wanted if wanted is not None else prefill and not table.below_quota(layer)
                slot = table.reserve((layer, expert), transient=passing, protect=protect)
                if slot is None:
                    return
                missing.popleft()
                demanded.append((layer, expert))
                flights.append(self._start(layer, expert, slot))

        def done(slot: int) -> None:
            pinned.discard(slot)
            self._unpin(slot)

        try:
            for expert in hits:
                slot = self._slot_of(layer, expert)
                table.pin(slot)
                pinned.add(slot)
                if wanted is not None and expert in wanted:
                    table.adopt((layer, expert), protect)
            fill()
            for expert in hits:
                slot = self._slot_of(layer, expert)
                yield expert, slot
                done(slot)
                fill()
            while missing or flights:
                if not flights and self.prefetches.flying:  # they hold the slots that this layer needs
                    self.prefetches.cancel()
                    fill()
                if not flights:
                    raise BudgetError(
                        f"no slot could be freed for layer {layer}, which is a defect in emoe: please report it with "
                        "the output of emoe.stats."
                    )
                flight = flights.popleft()
                self._finish(flight)
                pinned.add(flight.slot)
                fill()
                yield flight.key[1], flight.slot
                done(flight.slot)
                fill()
            self.prefetches.demanded(demanded, self.load_wait_s - before, beside=beside, prefill=prefill)
        finally:
            self._drain(flights)
            for slot in pinned:
                self._unpin(slot)

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
                    layer, expert = todo.popleft()
                    slot = self.table.reserve((layer, expert))
                    if slot is None:
                        raise BudgetError(f"no slot is left for expert {expert} of layer {layer}.")
                    flights.append(self._start(layer, expert, slot))
                flight = flights.popleft()
                self._finish(flight)
                self._unpin(flight.slot)
                finished += 1
                if progress is not None:
                    progress(finished * self.bank.slot_nbytes, total)
        finally:
            self._drain(flights)

    # -- loads ----------------------------------------------------------------------------------------------

    def _slot_of(self, layer: int, expert: int) -> int:
        slot = self.table.find((layer, expert))
        if slot is None:
            raise BudgetError(f"expert {expert} of layer {layer} left its slot while in use: a defect in emoe.")
        return slot

    def _claim(self, layer: int, experts: Iterable[int]) -> deque[Flight]:
        """The prefetches under way of these experts: what a layer needs now is no prefetch any more."""
        claimed = (self.prefetches.claim((layer, expert)) for expert in dict.fromkeys(experts))
        return deque(flight for flight in claimed if flight is not None)

    def _note_use(self, key: Key, slot: int) -> None:
        if self.table.slots[slot].state is not SlotState.LOADING:
            self.prefetches.used(key)

    def _submit(self, key: Key, slot: int, priority: int) -> Load:
        layer, expert = key
        self.peak_occupied = max(self.peak_occupied, self.table.occupied)
        return self._loader.submit(
            lambda: self._read(layer, expert, slot), f"expert {expert} of layer {layer} of {self._index.path}", priority
        )

    def _start(self, layer: int, expert: int, slot: int) -> Flight:
        key = (layer, expert)
        return Flight(key, slot, self._submit(key, slot, DEMAND))

    def _finish(self, flight: Flight) -> None:
        """Wait for a load; its slot is then pinned, or empty if the load failed."""
        start = time.perf_counter()
        try:
            nbytes = self._loader.wait(flight.load)
        except BaseException:
            flight.load.done.wait()  # interrupted here, the slot must not be reused while a thread still fills it
            self.table.abort(flight.slot)
            raise
        finally:
            waited_s = time.perf_counter() - start
            self.load_wait_s += waited_s
        self.table.commit(flight.slot, nbytes)
        if flight.ahead:
            self.prefetches.landed(flight, waited_s)
        self.table.pin(flight.slot)

    def _drain(self, flights: Iterable[Flight]) -> None:
        """Give back the slots of loads that nobody will wait for."""
        for flight in flights:
            self._loader.cancel(flight.load)
            self.table.abort(flight.slot)

    def _unpin(self, slot: int) -> None:
        if self._cuda:
            event = self._last_use.get(slot) or torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self.bank.device))
            self._last_use[slot] = event
        self.table.unpin(slot)

    def _read(self, layer: int, expert: int, slot: int) -> int:
        pieces = self._index.pieces(layer, expert)
        if not self._cuda:
            return self._reader.read_into(pieces, self.bank.views[slot])
        return self._read_cuda(pieces, slot)

    def _read_cuda(self, pieces: Sequence[Piece], slot: int) -> int:
        """Read into pinned host memory, then copy on this thread's stream once the slot's last use has ended."""
        local = self._local
        if not hasattr(local, "stream"):
            local.stream = torch.cuda.Stream(self.bank.device)  # type: ignore[no-untyped-call]
            pinned = torch.empty(self.bank.slot_nbytes, dtype=torch.uint8, pin_memory=True)
            local.staging = carve(pinned, self.bank.parts)
        nbytes = self._reader.read_into(pieces, local.staging)
        with torch.cuda.stream(local.stream):
            if (event := self._last_use.get(slot)) is not None:
                local.stream.wait_event(event)
            for name, view in self.bank.views[slot].items():
                view.copy_(local.staging[name], non_blocking=True)
        local.stream.synchronize()
        return nbytes
