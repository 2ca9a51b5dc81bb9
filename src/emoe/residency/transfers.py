"""How experts reach a device that is not the machine's memory: from the host tier, by copies that nothing waits for.

A load is a read from disk into a host slot (where the host has not the expert already), then a copy into the device
slot, issued as soon as the bytes are there. What the device evicts may be copied back before that. The running thread
waits for reads, never for copies: what computes waits, on the device, for the arrival of the slots it uses; a copy
waits, on the device, for the last use of the slot it fills.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch

from emoe.residency.bank import Bank
from emoe.residency.budget import SPARE_SLOTS
from emoe.residency.devices import Device, Mark
from emoe.residency.host import HostTier
from emoe.residency.loader import DEMAND, Load, Loader
from emoe.residency.table import Key, LayerCounters

Read = Callable[[Key, dict[str, torch.Tensor]], int]
"""Reads an expert from disk into host memory; returns the bytes read."""


@dataclass(slots=True)
class _Fetch:
    """One expert on its way to a device slot."""

    key: Key
    host_slot: int
    hit: bool
    arrival: Mark | None = None


class Transfers:
    """The copies into one bank. Only the thread that runs layers may call its methods."""

    def __init__(self, device: Device, bank: Bank, host: HostTier, loader: Loader, read: Read, link_s: float) -> None:
        """Wire the parts; `link_s` is what one copy takes, for the account of prefetches."""
        self.device = device
        self.host = host
        self.link_s = link_s
        self.bytes_back = 0
        self._bank = bank
        self._loader = loader
        self._read = read
        self._fetches: dict[int, _Fetch] = {}
        self._arriving: dict[int, Mark] = {}
        self._last: dict[int, Mark] = {}

    def room(self, key: Key, *, ahead: bool = False) -> bool:
        """Whether a load of `key` could begin now; what is ahead of need leaves room for a token's experts."""
        if self.host.table.is_resident(key):
            return True
        return self.host.room(len(self.host.table.slots) - SPARE_SLOTS if ahead else 0)

    def start(self, key: Key, slot: int, priority: int, what: str, *, passing: bool, evicted: Key | None) -> Load:
        """Begin to load `key` into `slot`, which the device's table has set to loading.

        `passing` says that it only passes through, `evicted` what had to go for it.
        """
        host = self.host
        held = host.seek(key)
        hit = held is not None
        fetch = self._fetches[slot] = _Fetch(key, held if held is not None else host.reserve(key, passing=passing), hit)
        ahead = priority != DEMAND
        try:
            if evicted is not None:
                self._save(evicted, slot, key, passing=passing)
            if hit:
                self._copy(fetch, slot, ahead)
                host.given(fetch.host_slot)
                return Load.ended(what, self.link_s)
            return self._loader.submit(partial(self._bring, fetch, slot, ahead), what, priority, owner=self)
        except Exception:  # there is no load; interrupted, there may be one
            self.lost(slot)
            raise

    def landed(self, slot: int, nbytes: int, counters: LayerCounters) -> None:
        """Note that a load ended: what uses the slot will wait for its copy."""
        fetch = self._fetches.pop(slot)
        if not fetch.hit:
            self.host.commit(fetch.host_slot, nbytes)
            self.host.given(fetch.host_slot)
        if fetch.arrival is not None:
            self._arriving[slot] = self._last[slot] = fetch.arrival
        counters.host_hits += fetch.hit
        counters.bytes_copied += self._bank.slot_nbytes

    def lost(self, slot: int) -> None:
        """Note that a load failed or was cancelled; if its copy is under way the next one comes after it."""
        fetch = self._fetches.pop(slot)
        if not fetch.hit:
            self.host.abort(fetch.host_slot)
        if fetch.arrival is not None:
            self._last[slot] = fetch.arrival

    def use(self, slot: int) -> None:
        """Make what is computed from now on wait until `slot` is filled."""
        arrival = self._arriving.get(slot)
        if arrival is not None:
            self.device.wait(arrival)
            del self._arriving[slot]  # only now: interrupted before, it is waited for again

    def mend(self) -> None:
        """End every load and every copy, and give back what is held for them: interrupts left some that are lost."""
        self._loader.abandon(self)
        self.device.drain()
        self._fetches.clear()
        self.host.mend()

    def settle(self) -> None:
        """Wait for every copy: nothing will be copied any more, so uses need no marks."""
        for arrival in self._arriving.values():
            self.device.finish(arrival)
        self._arriving.clear()

    def release(self, slots: Collection[int]) -> None:
        """Note the last use of some slots for now."""
        self._last.update(dict.fromkeys(slots, self.device.used([self._bank.memories[slot] for slot in slots])))

    def _save(self, key: Key, slot: int, coming: Key, *, passing: bool) -> None:
        """Copy what `slot` held to the host, before it is overwritten, if the host wants it."""
        place = self.host.place_for(key, coming, passing=passing)
        if place is None:
            return
        try:
            memory = self.host.memory(place)  # its block may be taken only now, and there may be no room for it
            after = [*self._after(slot), *self.host.busy(place)]
            back = self.device.copy(self._bank.memories[slot], memory, after, ahead=False)
        except Exception:
            self.host.table.abort(place)
            raise
        self.host.fill(place, back)
        self._last[slot] = back
        self.bytes_back += self._bank.slot_nbytes

    def _after(self, slot: int) -> list[Mark]:
        last = self._last.get(slot)
        return [] if last is None else [last]

    def _bring(self, fetch: _Fetch, slot: int, ahead: bool) -> int:
        """Read, then begin the copy: a loader thread's work, or that of who waits for the load."""
        nbytes = self._read(fetch.key, self.host.for_reading(fetch.host_slot))
        self._copy(fetch, slot, ahead)
        return nbytes

    def _copy(self, fetch: _Fetch, slot: int, ahead: bool) -> None:
        after = [*self._after(slot), *self.host.filled(fetch.host_slot)]
        source, target = self.host.memory(fetch.host_slot), self._bank.memories[slot]
        fetch.arrival = self.device.copy(source, target, after, ahead=ahead)
        self.host.copied(fetch.host_slot, fetch.arrival, ahead=ahead)


def copy_seconds(device: Device, source: torch.Tensor, target: torch.Tensor, times: int = 3) -> float:
    """Seconds that one copy takes when nothing else is under way: the fastest of some, after one that warms up.

    The target's content is undefined afterwards.
    """
    found = []
    last: Mark | None = None
    for _ in range(times + 1):
        start = device.clock()
        last = device.copy(source, target, () if last is None else (last,), ahead=False)
        device.finish(last)
        found.append(device.clock() - start)
    return min(found[1:])
