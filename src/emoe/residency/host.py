"""The host tier: experts in host memory, between the disk and a device that is reached by copies.

It is a residency table like the device's, over slots of the same layout, so that one contiguous copy moves an expert.
Where it holds every expert, it keeps them. Where it is smaller the two tiers are exclusive: what the device gets leaves
the host, and what the device evicts comes back over the link, in the direction that nothing else uses. They then hold
different experts, and over recorded routes the disk is read a third as often or less (`bench/host_tier.py`).
Its memory is taken (and pinned) block by block, when slots are first filled.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import torch

from emoe.checkpoint.index import PartSpec
from emoe.residency.bank import carve
from emoe.residency.budget import PoolPlan
from emoe.residency.devices import Device, HostMemory, Mark
from emoe.residency.eviction import make_eviction
from emoe.residency.table import Key, ResidencyTable

BLOCK_BYTES = 256 << 20
"""Host memory is taken and pinned in blocks of about this size: pinning touches every page, so it takes its time."""


class HostTier:
    """The host slots of one bank. Only the thread that runs layers may call what changes the table."""

    def __init__(
        self, device: Device, parts: Sequence[PartSpec], plan: PoolPlan, experts: Mapping[int, int], keeps: bool = True
    ) -> None:
        """Allocate nothing yet. `keeps` False: it is only for reading through, and nothing is copied back to it."""
        self.slot_nbytes = plan.slot_nbytes
        self.table = ResidencyTable(plan, dict(experts), make_eviction("lru"))
        self.exclusive = keeps and not self.table.all_fit
        self._device = device
        self._parts = tuple(parts)
        self._per_block = max(1, BLOCK_BYTES // plan.slot_nbytes)
        self._blocks: dict[int, HostMemory] = {}
        self._views: dict[int, dict[str, torch.Tensor]] = {}
        self._lock = threading.Lock()
        self._copying: dict[int, dict[bool, Mark]] = {}
        self._filling: dict[int, Mark] = {}
        self.reading = 0

    @property
    def held_bytes(self) -> int:
        """Bytes taken from the machine so far."""
        return sum(block.memory.numel() for block in self._blocks.values())

    @property
    def pinned(self) -> bool:
        """Whether everything taken so far is pinned."""
        return all(block.pinned for block in self._blocks.values())

    @property
    def notice(self) -> str:
        """Why something is not pinned; else empty."""
        return next((block.notice for block in self._blocks.values() if block.notice), "")

    # -- the running thread's ---------------------------------------------------------------------------------

    def room(self, spare: int = 0) -> bool:
        """Whether a read could begin and leave `spare` slots for others."""
        return self.reading + spare < len(self.table.slots)

    def seek(self, key: Key) -> int | None:
        """Note that the device asks for `key`; the slot that holds it, or None."""
        self.table.visit(key[0])
        self.table.use(key, keep=True)
        return self.table.find(key) if self.table.is_resident(key) else None

    def reserve(self, key: Key, *, passing: bool) -> int:
        """Take a slot to read `key` into. One that only passes through takes the place of another such, where it can.

        Raises:
            RuntimeError: there is no room (`room` says so beforehand): a defect in emoe.
        """
        slot = None
        if passing and self.table.occupied == len(self.table.slots):
            slot = self.table.reserve(key, transient=True)
        if slot is None:
            slot = self.table.reserve(key)
        if slot is None:
            raise RuntimeError("no host slot is free for a read: a defect in emoe, please report it.")
        self.reading += 1
        return slot

    def commit(self, slot: int, nbytes: int) -> None:
        """Note that the read into `slot` ended."""
        self.reading -= 1
        self.table.commit(slot, nbytes)

    def abort(self, slot: int) -> None:
        """Note that the read into `slot` failed or was cancelled."""
        self.reading -= 1
        self.table.abort(slot)

    def place_for(self, key: Key, coming: Key, *, passing: bool) -> int | None:
        """Take a slot for what the device evicts to make room for `coming`; None where it is here, or nothing is free.

        What comes keeps its slot: the two copies would wait for each other. The slot counts as filled from `fill` on,
        which says when it will be.
        """
        if not self.exclusive or self.table.find(key) is not None:
            return None
        protect = frozenset((coming,))
        slot = None
        if passing and self.table.occupied == len(self.table.slots):
            slot = self.table.reserve(key, transient=True, protect=protect)
        if slot is None:
            slot = self.table.reserve(key, protect=protect)
        return slot

    def given(self, slot: int) -> None:
        """Note that the device has what lies in `slot`: where the tiers are exclusive, the slot is free."""
        if self.exclusive:
            self.table.evict(slot)

    def mend(self) -> None:
        """Give back what reads and copies held, none of which is under way any more: interrupts lost track of some."""
        self._copying.clear()
        self._filling.clear()
        self.reading = 0
        self.table.mend()

    def close(self) -> None:
        """Give the memory back; nothing can be read or copied afterwards. Safe to call twice."""
        with self._lock:
            blocks, self._blocks = self._blocks, {}
            self._views.clear()
        for block in blocks.values():
            self._device.free_host(block)

    # -- any thread's ------------------------------------------------------------------------------------------

    def memory(self, slot: int) -> torch.Tensor:
        """The bytes of a slot, taken from the machine at its first use.

        Raises:
            BudgetError: the machine has not that much.
        """
        number, place = divmod(slot, self._per_block)
        with self._lock:
            if number not in self._blocks:
                slots = min(self._per_block, len(self.table.slots) - number * self._per_block)
                self._blocks[number] = self._device.host(slots * self.slot_nbytes)
            block = self._blocks[number].memory
        return block[place * self.slot_nbytes : (place + 1) * self.slot_nbytes]

    def views(self, slot: int) -> dict[str, torch.Tensor]:
        """The parts of the expert in a slot."""
        views = self._views.get(slot)
        if views is None:
            views = self._views[slot] = carve(self.memory(slot), self._parts)
        return views

    def for_reading(self, slot: int) -> dict[str, torch.Tensor]:
        """The parts to read into, once the copy out of the slot has ended."""
        for mark in self.busy(slot):
            self._device.finish(mark)
        return self.views(slot)

    def for_computing(self, slot: int) -> dict[str, torch.Tensor]:
        """The parts of the expert in a slot, for the CPU: once a copy into it has ended."""
        filling = self._filling.get(slot)
        if filling is not None:
            self._device.finish(filling)
            del self._filling[slot]  # only now: interrupted before, it is waited for again
        return self.views(slot)

    def busy(self, slot: int) -> list[Mark]:
        """What must have passed before a slot is filled anew; forgotten here."""
        filling = self._filling.pop(slot, None)
        return [*self._copying.pop(slot, {}).values(), *([] if filling is None else [filling])]

    def filled(self, slot: int) -> list[Mark]:
        """What must have passed before a slot is copied from."""
        return [self._filling[slot]] if slot in self._filling else []

    def fill(self, slot: int, arrival: Mark) -> None:
        """Note a copy from the device into a slot that `place_for` took."""
        self._filling[slot] = arrival
        self.table.commit(slot, 0)

    def copied(self, slot: int, arrival: Mark, *, ahead: bool) -> None:
        """Note the latest copy out of a slot, of those ahead of need or of the others: each kind goes in turn."""
        self._copying.setdefault(slot, {})[ahead] = arrival
