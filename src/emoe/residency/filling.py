"""How experts come into the slots of a bank: loads that are begun, waited for and given up."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable

import torch

from emoe.checkpoint.index import ExpertIndex
from emoe.checkpoint.readers import Reader
from emoe.errors import BudgetError
from emoe.residency.bank import Bank, used_first
from emoe.residency.early import Early
from emoe.residency.loader import DEMAND, Load, Loader
from emoe.residency.prefetches import Flight, Prefetches
from emoe.residency.table import Key, ResidencyTable, SlotState
from emoe.residency.transfers import Transfers


class Filling:
    """The loads of one bank, those ahead of need among them; what a layer asks for is `emoe.residency.pool`'s."""

    def __init__(self, table: ResidencyTable, bank: Bank, index: ExpertIndex, reader: Reader, loader: Loader) -> None:
        """Bind the parts.

        `transfers`, where set, bring experts to a device that is reached by copies; else readers fill the slots.
        """
        self.table = table
        self.bank = bank
        self.load_wait_s = 0.0
        self.peak_occupied = 0
        self._index = index
        self._reader = reader
        self._loader = loader
        self.transfers: Transfers | None = None
        self._mends = 0
        self._first_parts = used_first(bank.views[0] if bank.views else ())
        table.mender = self._mend
        self.prefetches = Prefetches(table, loader, self._submit, self._commit, self._abort, self._room)
        self.early = Early(table, loader, self._submit, self._commit, self._abort)

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

    def _submit(self, key: Key, slot: int, priority: int, passing: bool | None = None) -> Load:
        layer, expert = key
        table = self.table
        self.peak_occupied = max(self.peak_occupied, table.occupied)
        what = f"expert {expert} of layer {layer} of {self._index.path}"
        try:
            if self.transfers is not None:
                passing = table.slots[slot].transient if passing is None else passing
                return self.transfers.start(key, slot, priority, what, passing=passing, evicted=table.evicted)
            views, first = self.bank.views[slot], threading.Event() if self._first_parts else None
            reached = None if first is None else first.set
            return self._loader.submit(
                lambda: self.read(key, views, priority, reached), what, priority, first, owner=self
            )
        except Exception:  # there is no load that somebody could wait for or cancel; interrupted, there may be one
            table.abort(slot)
            raise

    def _room(self, key: Key, ahead: bool) -> bool:
        """Whether a load could begin now: on the way to a device it passes through host memory."""
        return self.transfers is None or self.transfers.room(key, ahead=ahead)

    def _commit(self, slot: int, nbytes: int) -> None:
        """Note that a load ended well."""
        key = self.table.slots[slot].key
        if self.transfers is not None and key is not None:
            self.transfers.landed(slot, nbytes, self.table.counters[key[0]])
        self.table.commit(slot, nbytes)  # last: until then `_mend` knows that something was under way

    def _abort(self, slot: int) -> None:
        """Note that a load failed or was cancelled."""
        if self.transfers is not None:
            self.transfers.lost(slot)
        self.table.abort(slot)

    def _mend(self) -> None:
        """As a pass begins: give back what interrupts left pinned or loading for good.

        Whatever runs a layer gives back all that it holds as it ends. An interrupt that comes while it does so, or
        between two steps of the books, can leave slots that nobody knows of: then every load of the bank is ended, and
        only what had arrived stays. Nothing is lost but loads ahead of need. What still believes that it holds slots (a
        generator that lives on in a traceback) knows by the count of mends that they are no longer its own.
        """
        self.early.claim(-1, ())  # of a pass that failed
        if self.table.settled(self.prefetches.slots):
            return
        self._mends += 1  # first: nothing that was held gives anything back from here on
        self._loader.abandon(self)
        self.prefetches.forget()
        if self.transfers is not None:
            self.transfers.mend()
        self.table.mend()

    def _start(self, layer: int, expert: int, slot: int, *, passing: bool | None = None) -> Flight:
        key = (layer, expert)
        return Flight(key, slot, self._submit(key, slot, DEMAND, passing))

    def _finish(self, flight: Flight) -> None:
        """Wait for a load; its slot is then pinned, or empty if the load failed; if interrupted, still loading."""
        start = time.perf_counter()
        try:
            nbytes = self._loader.wait(flight.load)
        except Exception:  # interrupted, the slot stays loading: its copy may be under way, `_mend` waits for that
            self._loader.cancel(flight.load)
            self._abort(flight.slot)
            raise
        finally:
            waited_s = time.perf_counter() - start
            self.load_wait_s += waited_s
        self._commit(flight.slot, nbytes)
        if self.transfers is not None:
            self.transfers.use(flight.slot)
        if flight.ahead:
            self.prefetches.landed(flight, waited_s)
        self.table.count_used(flight.slot)
        self.table.pin(flight.slot)

    def _drain(self, flights: Iterable[Flight]) -> None:
        """Give back the slots of loads that nobody will wait for."""
        for flight in flights:
            self._loader.cancel(flight.load)
            self._abort(flight.slot)

    def _unpin(self, slots: Collection[int]) -> None:
        if self.transfers is not None and slots:
            self.transfers.release(slots)
        for slot in slots:
            self.table.unpin(slot)

    def read(
        self,
        key: Key,
        parts: dict[str, torch.Tensor],
        priority: int = DEMAND,
        reached: Callable[[], None] | None = None,
    ) -> int:
        """Read an expert from disk into memory laid out as a slot; return the bytes read. For any thread.

        `reached` is called when what its first projection needs is there, where reading can tell.
        """
        return self._reader.read_into(self._index.pieces(*key), parts, priority, self._first_parts, reached)

    def close(self) -> None:
        """Give the host tier's memory back; nothing can be loaded afterwards. Safe to call twice."""
        if self.transfers is not None:
            self.transfers.host.close()
