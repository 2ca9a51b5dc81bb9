"""Pools on a virtual device: copies hide behind computing, slots are never read early or overwritten in use."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe.checkpoint.index import PartSpec
from emoe.config import ExpertMemory, parse_host_memory
from emoe.errors import BudgetError, ReadError, UsageError
from emoe.model.placement import make_pool
from emoe.residency import host as host_tier
from emoe.residency.bank import Bank
from emoe.residency.budget import HostPlan, LayerNeed, PoolPlan, plan_host, plan_slots, uniform_quotas
from emoe.residency.devices import Device
from emoe.residency.eviction import make_eviction
from emoe.residency.loader import Loader
from emoe.residency.pool import ExpertPool
from emoe.residency.table import Key, ResidencyTable, SlotState
from emoe.residency.transfers import copy_seconds
from emoe.residency.virtual import VirtualDevice, VirtualMark
from tests.interrupting import Interrupts

PARTS = (PartSpec("w", (64, 8), "float32"),)
SLOT = 64 * 8 * 4
LINK = 1e9
COPY_S = SLOT / LINK


class Disk:
    """A reader whose experts are filled with their own number; it fails where it is told to."""

    def __init__(self) -> None:
        self.fails: set[Key] = set()
        self.reads: list[Key] = []

    def read_into(self, pieces: Sequence[Key], parts: dict[str, torch.Tensor], *_: object) -> int:
        key = pieces[0]
        self.reads.append(key)
        if key in self.fails:
            raise ReadError(f"{key} cannot be read")
        parts["w"].fill_(number(key))
        return 100


def number(key: Key) -> int:
    return 1 + 100 * key[0] + key[1]


def make_on(
    device: Device, slots: int, host_slots: int, *, layers: int = 2, experts: int = 8, threads: int = 0, floor: int = 0
) -> tuple[ExpertPool, Disk]:
    """A pool of `slots` on `device` behind `host_slots`, and the disk it reads from."""
    needs = [LayerNeed(layer, experts, 2, SLOT) for layer in range(layers)]
    plan = PoolPlan(0, slots, SLOT, uniform_quotas(slots, needs))
    table = ResidencyTable(plan, dict.fromkeys(range(layers), experts), make_eviction("least-stale"))
    host = HostPlan(0, 0, {0: PoolPlan(0, host_slots, SLOT, dict.fromkeys(range(layers), 0))}, {0: floor})
    index = cast(Any, SimpleNamespace(path="none", pieces=lambda layer, expert: [(layer, expert)]))
    disk = Disk()
    bank = Bank(PARTS, slots, device)
    return make_pool(table, bank, device, host, index, cast(Any, disk), Loader(threads)), disk


def make(slots: int, host_slots: int, **options: int) -> tuple[ExpertPool, VirtualDevice, Disk]:
    """The same on a virtual device whose clock begins when the pool is there."""
    device = VirtualDevice(LINK)
    pool, disk = make_on(device, slots, host_slots, **options)
    device.program_s = device.link_s = device.busy_s = 0.0
    device.synchronisations = device.copied_bytes = 0
    return pool, device, disk


def warm(pool: ExpertPool, keys: Sequence[Key]) -> None:
    """Bring these into host memory."""
    for layer, expert in keys:
        for _ in pool.stream(layer, [expert], prefill=True):
            pass


def holds(pool: ExpertPool, slot: int, key: Key) -> bool:
    return bool((pool.bank.views[slot]["w"] == number(key)).all())


@pytest.mark.parametrize("compute", [0.25, 1.0, 4.0])
def test_a_prefill_takes_the_longer_of_copying_and_computing_and_one_more(compute: float) -> None:
    """Double buffering, on the virtual clock: not the sum, although every expert has to be copied."""
    experts = 32
    pool, device, _ = make(6, experts * 2, experts=experts)
    warm(pool, [(1, e) for e in range(experts)])
    warm(pool, [(0, e) for e in range(experts)] * 2)  # these evict the other layer's
    begun = max(device.compute_s, device.link_s)
    device.program_s = begun
    missing = [e for e in range(experts) if not pool.table.is_resident((1, e))]
    for ((expert, slot),) in pool.stream(1, missing, prefill=True):
        assert holds(pool, slot, (1, expert))
        device.compute(compute * COPY_S)
    took = device.compute_s - begun
    longer, shorter = max(1.0, compute) * len(missing), min(1.0, compute)
    assert took <= (longer + shorter + 0.01) * COPY_S
    assert took >= longer * COPY_S


def test_the_running_thread_never_waits_for_a_copy() -> None:
    pool, device, disk = make(4, 16)
    warm(pool, [(layer, e) for layer in range(2) for e in range(8)])
    reads = len(disk.reads)
    device.synchronisations, program = 0, device.program_s
    for turn in range(20):
        for layer in range(2):
            experts = random.Random(turn).sample(range(8), 2)
            slots = pool.take(layer, experts)
            assert all(holds(pool, slot, (layer, e)) for slot, e in zip(slots, experts, strict=True))
            device.compute(COPY_S / 3)
            pool.release(slots)
    assert device.synchronisations == 0 and device.program_s == program and len(disk.reads) == reads


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@settings(max_examples=60, deadline=None)
@given(
    sizes=st.sampled_from([(6, 8), (4, 16), (10, 6)]),
    line=st.integers(1, 6000),
    then=st.integers(0, 40),
    threads=st.integers(0, 2),
    seed=st.integers(0, 10**6),
)
def test_interrupts_at_any_line_leave_both_tiers_in_order(
    sizes: tuple[int, int], line: int, then: int, threads: int, seed: int
) -> None:
    pool, device, _ = make(*sizes, threads=threads)
    assert pool.transfers is not None

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for turn in range(8):
            pool.table.begin_pass()
            for layer in range(2):
                pool.prefetches.poll()
                if turn == 3:
                    pool.prefetches.plan([(1 - layer, e) for e in rng.sample(range(8), 3)])
                experts = rng.sample(range(8), 7 if turn == 1 else 2)
                stream = cast(Any, pool.stream(layer, experts, prefill=turn == 1))
                try:
                    for ((expert, slot),) in stream:
                        assert holds(pool, slot, (layer, expert))
                        device.compute(COPY_S / 2)
                finally:
                    stream.close()

    interrupts = Interrupts(line, then)
    work(seed)
    interrupts.during(lambda: work(seed + 1))
    try:
        work(seed + 2)
        work(seed + 3)
        pool.prefetches.stop()
        pool.prefetches.cancel()
        pool.table.begin_pass()
        assert pool.transfers.host.reading == 0
        for tier in (pool.table, pool.transfers.host.table):
            assert all(slot.state.value in ("empty", "ready") for slot in tier.slots)
            assert len(tier._free) + tier.occupied == len(tier.slots)
    except BaseException as error:
        error.add_note(f"after interrupts at {interrupts.raised}")
        raise
    finally:
        pool._loader.close()


@settings(max_examples=60)
@given(
    slots=st.integers(2, 16),
    host_slots=st.integers(4, 16),
    threads=st.integers(0, 2),
    seed=st.integers(0, 10**6),
    faults=st.booleans(),
    keeps=st.booleans(),
)
def test_any_order_of_work_is_sound(
    slots: int, host_slots: int, threads: int, seed: int, faults: bool, keeps: bool
) -> None:
    """Takes, streams, prefetches, plans and faults at random: every slot holds its expert when it is used."""
    pool, device, disk = make(slots, host_slots, threads=threads, floor=0 if keeps else host_slots)
    rng = random.Random(seed)
    for _ in range(40):
        disk.fails = {(rng.randrange(2), rng.randrange(8))} if faults else set()
        pool.table.begin_pass()
        for layer in range(2):
            pool.prefetches.poll()
            other = [(1 - layer, e) for e in rng.sample(range(8), rng.randint(1, 4))]
            if rng.random() < 0.3:
                pool.prefetches.ask(other, 2)
            if rng.random() < 0.1:
                pool.prefetches.plan(other[:slots])
            try:
                if rng.random() < 0.5:
                    experts = rng.sample(range(8), 2)
                    held = pool.take(layer, experts)
                    assert all(holds(pool, slot, (layer, e)) for slot, e in zip(held, experts, strict=True))
                    device.compute(rng.random() * COPY_S)
                    pool.release(held)
                else:
                    experts = rng.sample(range(8), rng.randint(1, 8))
                    for ((expert, slot),) in pool.stream(layer, experts, prefill=rng.random() < 0.5):
                        assert holds(pool, slot, (layer, expert))
                        device.compute(rng.random() * COPY_S)
                        if rng.random() < 0.1:
                            break
            except ReadError:
                assert faults
    pool.prefetches.stop()
    pool.prefetches.cancel()
    assert pool.transfers is not None and pool.transfers.host.reading == 0
    counters = list(pool.table.counters.values())
    loads, hits = sum(c.loads for c in counters), sum(c.host_hits for c in counters)
    assert sum(c.bytes_read for c in counters) == 100 * (loads - hits)
    assert sum(c.bytes_copied for c in counters) == loads * SLOT
    for tier in (pool.table, pool.transfers.host.table):
        assert all(slot.state.value in ("empty", "ready") for slot in tier.slots)
    on_device = {slot.key for slot in pool.table.slots} - {None}
    on_host = {slot.key for slot in pool.transfers.host.table.slots} - {None}
    if pool.transfers.host.exclusive:
        assert not on_device & on_host
    else:
        assert pool.transfers.bytes_back == 0


def test_a_slot_that_nothing_waited_for_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: without the wait for arrivals, or for last uses, they do."""
    from emoe.residency import transfers
    from emoe.residency.virtual import OrderError

    pool, _, _ = make(4, 16)
    with monkeypatch.context() as patch:
        patch.setattr(transfers.Transfers, "use", lambda self, slot: None)
        with pytest.raises(OrderError, match="nothing had waited"):
            pool.release(pool.take(0, [0, 1]))
    pool, device, _ = make(2, 16)
    with monkeypatch.context() as patch:
        patch.setattr(
            transfers.Transfers,
            "release",
            lambda self, slots: device.used([pool.bank.memories[slot] for slot in slots]) and None,
        )
        with pytest.raises(OrderError, match="used until"):
            for turn in range(8):
                held = pool.take(0, [turn % 8, (turn + 1) % 8])
                device.compute(1.0)
                pool.release(held)


NEEDS = [LayerNeed(layer, 8, 2, SLOT, group=layer % 2) for layer in range(4)]


@pytest.mark.parametrize(
    ("asked", "available", "slots"),
    [
        ("0", 10**9, {0: 4, 1: 4}),
        (None, 10**9, {0: 16, 1: 16}),
        ("auto", 0, {0: 4, 1: 4}),
        ("auto", 20 * SLOT, {0: 8, 1: 8}),
        (ExpertMemory("share", 0.5), 0, {0: 8, 1: 8}),
        (ExpertMemory("bytes", 20 * SLOT), 0, {0: 10, 1: 10}),
        (ExpertMemory("bytes", 1), 0, {0: 4, 1: 4}),
    ],
)
def test_host_memory_becomes_slots(asked: Any, available: int, slots: dict[int, int]) -> None:
    plan = plan_slots(ExpertMemory("share", 0.5), NEEDS)
    made = plan_host(asked, plan, NEEDS, available)
    assert {group: pool.slots for group, pool in made.pools.items()} == slots
    assert made.floor_bytes == 8 * SLOT and made.nbytes == sum(slots.values()) * SLOT


def test_where_everything_is_on_the_device_the_host_only_passes_on() -> None:
    made = plan_host("auto", plan_slots(None, NEEDS), NEEDS, 10**12)
    assert made.nbytes == made.floor_bytes


def test_host_memory_is_read_as_a_size_a_share_or_auto() -> None:
    assert parse_host_memory("2MiB") == ExpertMemory("bytes", 2 << 20)
    assert parse_host_memory("40%") == ExpertMemory("share", 0.4)
    assert [parse_host_memory(value) for value in (None, 0, "0", "auto")] == [None, "0", "0", "auto"]
    for wrong in ("12/layer", "lots", "-1"):
        with pytest.raises(UsageError, match="host memory"):
            parse_host_memory(wrong)


def test_two_small_tiers_hold_different_experts_and_a_floor_keeps_nothing() -> None:
    """8 slots here and 8 there, and two to pass through, hold all 16 experts: each is read from disk once."""
    pool, device, disk = make(8, 10)
    for _ in range(6):
        for layer in range(2):
            for e in range(0, 8, 2):
                pool.release(pool.take(layer, [e, e + 1]))
    assert pool.transfers is not None and pool.transfers.bytes_back > 0
    assert len(disk.reads) == 16 and device.copied_bytes > 0
    pool, _, _ = make(8, 4, floor=4)
    for _ in range(6):
        for e in range(0, 8, 2):
            pool.release(pool.take(0, [e, e + 1]))
    assert pool.transfers is not None and pool.transfers.bytes_back == 0


def test_where_host_memory_runs_out_nothing_is_lost_and_nothing_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new block of host memory cannot be had while an expert moves there: the request fails, the next ones do not."""
    monkeypatch.setattr(host_tier, "BLOCK_BYTES", SLOT)
    pool, _, _ = make(8, 10)
    transfers = pool.transfers
    assert transfers is not None

    def run(layer: int, experts: Sequence[int]) -> None:
        slots = pool.take(layer, experts)
        assert all(holds(pool, slot, (layer, expert)) for expert, slot in zip(experts, slots, strict=True))
        pool.release(slots)

    for experts in ([0, 1], [2, 3]):
        run(0, experts)
        run(1, experts)
    memory, calls = transfers.host.memory, []

    def refused(place: int) -> Any:
        calls.append(place)
        raise BudgetError("no memory")

    monkeypatch.setattr(transfers.host, "memory", refused)
    for layer in (0, 1, 0, 1):
        with pytest.raises(BudgetError, match="no memory"):
            run(layer, [4, 5])
    monkeypatch.setattr(transfers.host, "memory", memory)
    assert calls and transfers.host.reading == 0
    for table in (pool.table, transfers.host.table):
        assert {slot.state for slot in table.slots} <= {SlotState.EMPTY, SlotState.READY}
    for expert in range(8):
        run(0, [expert])
        run(1, [expert])


def test_only_what_nobody_waits_for_goes_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device has lanes of its own for copies ahead of need; what is wanted now, and what goes back, is not among
    them."""
    pool, _, _ = make(8, 10)
    assert pool.transfers is not None
    host = pool.transfers.host
    copies: list[tuple[str, bool]] = []
    copy, copied = VirtualDevice.copy, host_tier.HostTier.copied

    def watched(self: VirtualDevice, source: torch.Tensor, target: torch.Tensor, after: Any, *, ahead: bool) -> Any:
        copies.append(("back" if target.data_ptr() in places else "in", ahead))
        return copy(self, source, target, after, ahead=ahead)

    def noted(self: host_tier.HostTier, slot: int, arrival: Any, *, ahead: bool) -> None:
        assert ahead == copies[-1][1]
        copied(self, slot, arrival, ahead=ahead)

    places = {host.memory(slot).data_ptr() for slot in range(10)}
    monkeypatch.setattr(VirtualDevice, "copy", watched)
    monkeypatch.setattr(host_tier.HostTier, "copied", noted)
    for expert in range(0, 8, 2):
        pool.release(pool.take(0, [expert, expert + 1]))
    pool.release(pool.take(1, [0, 1]))
    assert set(copies) == {("in", False), ("back", False)}
    copies.clear()
    pool.prefetches.ask([slot.key for slot in host.table.slots if slot.key is not None], 1)
    assert ("in", True) in copies and set(copies) <= {("in", True), ("back", False)}


def test_where_all_is_there_no_use_waits() -> None:
    pool, device, _ = make(16, 4)
    pool.preload([(layer, expert) for layer in range(2) for expert in range(8)])
    assert max(device.program_s, device.compute_s) >= device.link_s > 0
    waits = device.synchronisations
    for expert in range(8):
        slots = pool.take(0, [expert])
        assert holds(pool, slots[0], (0, expert))
        pool.release(slots)
    assert device.synchronisations == waits


def test_a_copy_takes_the_least_of_some_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    device = VirtualDevice()
    took = iter([0.5, 9.0, 4.0, 6.0])
    begun: list[VirtualMark] = []

    def copy(
        self: VirtualDevice, source: torch.Tensor, target: torch.Tensor, after: Any, *, ahead: bool
    ) -> VirtualMark:
        assert not ahead and list(after) == begun[-1:]
        begun.append(VirtualMark(self, self.program_s + next(took)))
        return begun[-1]

    monkeypatch.setattr(VirtualDevice, "copy", copy)
    assert copy_seconds(device, torch.zeros(8), torch.zeros(8)) == 4.0 and len(begun) == 4
