"""The host tier alone: what it keeps and gives up, against plain lists; its memory; what a slot has to wait for."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.checkpoint.index import PartSpec
from emoe.residency import host as host_module
from emoe.residency.budget import PoolPlan
from emoe.residency.host import HostTier
from emoe.residency.table import Key
from emoe.residency.virtual import POISON, VirtualDevice, VirtualMark

PARTS = (PartSpec("w", (4, 4), "float32"),)
SLOT = 64


def make(slots: int, keeps: bool = True, pinning: bool = True) -> tuple[HostTier, VirtualDevice]:
    device = VirtualDevice(pinning=pinning)
    plan = PoolPlan(0, slots, SLOT, {0: 0, 1: 0})
    return HostTier(device, PARTS, plan, {0: 6, 1: 6}, keeps), device


class Plain:
    """The same choices by plain lists: the keys that are held, those of them that only pass, all in the order asked."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.held: list[Key] = []
        self.passing: set[Key] = set()
        self.asked: list[Key] = []

    def seek(self, key: Key) -> None:
        self.asked = [each for each in self.asked if each != key] + [key]
        self.passing.discard(key)

    def take(self, key: Key, passing: bool, protect: Iterable[Key] = ()) -> bool:
        """Whether there is room: of what passes the one asked for longest ago goes first, else of all."""
        full = len(self.held) == self.slots
        if full:
            free = [each for each in self.held if each not in protect]
            free = [each for each in free if each in self.passing] or free
            if not free:
                return False
            self.drop(min(free, key=lambda each: (self.asked.index(each) if each in self.asked else -1, each)))
        self.held.append(key)
        if full and passing:
            self.passing.add(key)
        return True

    def drop(self, key: Key) -> None:
        self.held.remove(key)
        self.passing.discard(key)


@given(st.integers(1, 9), st.booleans(), st.integers(0, 10**6))
def test_what_stays_is_what_was_asked_for_last(slots: int, keeps: bool, seed: int) -> None:
    """What passes through goes before; what the device has leaves, and comes back when it must go there."""
    rng = random.Random(seed)
    tier, device = make(slots, keeps)
    plain = Plain(slots)
    assert tier.exclusive == keeps
    for _ in range(40):
        key, coming = (rng.randrange(2), rng.randrange(6)), (rng.randrange(2), rng.randrange(6))
        passing = rng.random() < 0.4
        if rng.random() < 0.4:
            slot = tier.place_for(key, coming, passing=passing)
            wanted = keeps and key not in plain.held
            assert (slot is not None) == (wanted and plain.take(key, passing, {coming}))
            if slot is not None and rng.random() < 0.2:  # the copy could not begin
                tier.table.abort(slot)
                plain.drop(key)
            elif slot is not None:
                tier.fill(slot, VirtualMark(device, 0.0))
        else:
            slot = tier.seek(key)
            assert (slot is not None) == (key in plain.held)
            plain.seek(key)
            if slot is None:
                assert tier.room() and tier.reading == 0
                slot = tier.reserve(key, passing=passing)
                assert tier.reading == 1
                if rng.random() < 0.2:  # the read fails, and leaves nothing behind but what had to go for it
                    tier.abort(slot)
                    plain.take(key, passing)
                    plain.drop(key)
                    continue
                tier.commit(slot, 10)
                plain.take(key, passing)
            tier.given(slot)
            if keeps:
                plain.drop(key)
        held = {slot.key for slot in tier.table.slots} - {None}
        assert held == set(plain.held)
        assert {key for key in held if key in plain.passing} == {s.key for s in tier.table.slots if s.transient}


def test_a_tier_that_holds_all_is_not_exclusive() -> None:
    tier, _ = make(12)
    assert not tier.exclusive
    slot = tier.reserve((0, 1), passing=False)
    tier.commit(slot, 1)
    tier.given(slot)
    assert tier.seek((0, 1)) == slot and tier.place_for((0, 2), (0, 1), passing=False) is None


def test_reads_take_no_more_slots_than_there_are() -> None:
    tier, _ = make(3)
    slots = [tier.reserve((0, expert), passing=False) for expert in range(2)]
    assert tier.room() and not tier.room(1) and tier.seek((0, 0)) is None, "it is not there yet"
    tier.reserve((0, 2), passing=True)
    assert not tier.room() and tier.place_for((1, 1), (1, 2), passing=True) is None
    with pytest.raises(RuntimeError, match="a defect in emoe"):
        tier.reserve((0, 3), passing=True)
    tier.commit(slots[0], 1)
    tier.abort(slots[1])
    assert tier.reading == 1 and tier.room(1) and tier.seek((0, 0)) == slots[0]


def test_memory_is_taken_block_by_block_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "BLOCK_BYTES", 2 * SLOT + 1)
    tier, device = make(5, pinning=False)
    assert tier.held_bytes == 0 and tier.pinned and tier.notice == ""
    assert tier.memory(4).numel() == SLOT and tier.held_bytes == SLOT, "the last block is as small as what is left"
    assert not tier.pinned and "cannot pin" in tier.notice
    for slot in range(5):
        tier.views(slot)["w"].fill_(slot)
    assert tier.held_bytes == 5 * SLOT
    assert [tier.views(slot)["w"].unique().tolist() for slot in range(5)] == [[slot] for slot in range(5)]
    memories = [tier.memory(slot) for slot in range(5)]
    tier.close()
    tier.close()
    assert all((memory == POISON).all() for memory in memories) and tier.held_bytes == 0
    assert make(5)[0].pinned and device.synchronisations == 0


def test_what_must_pass_before_a_slot_is_used() -> None:
    tier, device = make(3)

    def take(expert: int) -> int:
        slot = tier.place_for((0, expert), (1, 5), passing=False)
        assert slot is not None
        return slot

    slot, other, third = take(0), take(1), take(2)
    first, second, ahead, filling = (VirtualMark(device, time) for time in (1.0, 2.0, 3.0, 9.0))
    assert tier.busy(slot) == [] and tier.filled(slot) == []
    tier.copied(slot, first, ahead=False)
    tier.copied(slot, second, ahead=False)
    tier.copied(slot, ahead, ahead=True)
    tier.fill(slot, filling)
    assert tier.filled(slot) == [filling] and tier.filled(other) == []
    assert tier.busy(slot) == [second, ahead, filling], "of each kind the latest: those come in turn"
    assert tier.busy(slot) == [] and tier.filled(slot) == []
    tier.copied(slot, ahead, ahead=True)
    tier.for_computing(slot)
    assert device.program_s == 0, "computing does not write"
    tier.for_reading(slot)
    assert device.program_s == 3
    tier.fill(other, filling)
    assert tier.for_computing(other) is tier.views(other)
    assert device.program_s == 9 and tier.filled(other) == []
    tier.fill(third, VirtualMark(device, 12.0))
    tier.for_reading(third)
    assert device.program_s == 12
