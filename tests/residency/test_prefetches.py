"""Loads ahead of need, planned, asked for or begun early: no slot is given away while a thread may still fill it."""

from __future__ import annotations

from collections import deque
from random import Random
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe.errors import ReadError
from emoe.residency.budget import LayerNeed, PoolPlan, uniform_quotas
from emoe.residency.early import Early
from emoe.residency.eviction import make_eviction
from emoe.residency.loader import Load
from emoe.residency.prefetches import NEXT_GATE, PLAN, PLAN_DEPTH, Flight, Prefetches
from emoe.residency.table import Key, ResidencyTable, SlotState

LAYERS, EXPERTS = 3, 6
KEYS = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]


class Threads:
    """A loader whose threads do only what the test lets them do."""

    def __init__(self, table: ResidencyTable) -> None:
        self.table = table
        self.begun: list[tuple[Key, int, int, Load]] = []
        self.fails: set[Key] = set()
        self.ended_well = 0

    def submit(self, key: Key, slot: int, priority: int) -> Load:
        load = Load(lambda: 1, str(key))
        self.begun.append((key, slot, priority, load))
        return load

    def under_way(self, *, started: bool | None = None) -> list[tuple[Key, int, int, Load]]:
        return [each for each in self.begun if not each[3].done.is_set() and started in (None, each[3].claimed)]

    def finish(self, load: Load) -> None:
        load.claimed = True
        key = next(key for key, _, _, other in self.begun if other is load)
        load.seconds = 0.01
        if key in self.fails:
            load.error = ReadError(f"{key} is broken")
        else:
            load.nbytes = 64
        load.done.set()

    def drop(self, load: Load) -> bool:
        if load.claimed:
            return False
        load.claimed, load.error = True, ReadError("cancelled")
        load.done.set()
        return True

    def cancel(self, load: Load) -> None:
        if not self.drop(load) and not load.done.is_set():
            self.finish(load)

    def wait(self, load: Load) -> int:
        if not load.done.is_set():
            self.finish(load)
        if load.error is not None:
            raise load.error
        return load.nbytes

    def check(self, claimed: list[Flight]) -> None:
        """Whatever a thread may fill is a loading slot of that expert, and every loading slot is somebody's."""
        for key, number, _, _ in self.under_way():
            slot = self.table.slots[number]
            assert (slot.key, slot.state) == (key, SlotState.LOADING)
        owned = {slot for _, slot, _, load in self.begun if load.error is None or load.error.args != ("cancelled",)}
        loading = {number for number, slot in enumerate(self.table.slots) if slot.state is SlotState.LOADING}
        assert loading <= owned
        assert all(self.table.slots[flight.slot].key == flight.key for flight in claimed)


class World:
    """A table, its prefetches and early loads, over threads that the test drives."""

    def __init__(self, slots: int, lane: int = 0, shared: bool = False) -> None:
        needs = [LayerNeed(layer, EXPERTS, 2, 64) for layer in range(LAYERS)]
        quotas = dict.fromkeys(range(LAYERS), 0) if shared else uniform_quotas(slots - lane, needs)
        plan = PoolPlan(0, slots, 64, quotas, lane)
        self.table = ResidencyTable(plan, dict.fromkeys(range(LAYERS), EXPERTS), make_eviction("lru"))
        self.threads = Threads(self.table)
        loader = cast(Any, self.threads)
        self.ahead = Prefetches(self.table, loader, self.threads.submit)
        self.early = Early(self.table, loader, self.threads.submit, self.table.commit, self.table.abort)

    def quiet(self) -> None:
        """Threads and polls until nothing is left to do."""
        while True:
            for _, _, _, load in self.threads.under_way():
                self.threads.finish(load)
            self.ahead.poll()
            if not self.threads.under_way():
                return

    def serve(self, layer: int, experts: list[int]) -> None:
        """One layer of a token: claims what is under way, reads what is missing, uses all."""
        table = self.table
        table.visit(layer)
        flights = [*self.early.claim(layer, set(experts))]
        flights += [flight for e in experts if (flight := self.ahead.claim((layer, e))) is not None]
        self.threads.check(flights)
        for flight in flights:
            try:
                nbytes = self.threads.wait(flight.load)
            except ReadError:
                table.abort(flight.slot)
                continue
            table.commit(flight.slot, nbytes)
            if flight.ahead:
                self.ahead.landed(flight, 0.0)
            table.count_used(flight.slot)
        for key in [(layer, e) for e in experts]:
            slot = table.find(key)
            if slot is not None and table.slots[slot].prefetched:
                self.ahead.used(key)
            if slot is None:
                protect = frozenset((layer, e) for e in experts)
                slot = table.reserve(key, protect=protect)
                if slot is None:
                    self.ahead.cancel()
                    slot = table.reserve(key, protect=protect)
                assert slot is not None
                table.commit(slot, 64)
            table.use(key, keep=True)

    def counted(self) -> None:
        """Invariant 3: every prefetch ends as used, evicted unused or cancelled, or waits in a slot."""
        counters = self.table.counters.values()
        waiting = sum(slot.prefetched for slot in self.table.slots)
        assert sum(c.prefetches_waiting for c in counters) == waiting
        assert sum(c.prefetches for c in counters) == len(self.threads.begun)


@given(
    slots=st.integers(8, 17),
    lane=st.sampled_from([0, 0, 2]),
    shared=st.booleans(),
    moves=st.lists(st.sampled_from("pppaaaeessssffffoouuuxcd"), min_size=10, max_size=50),
    random=st.randoms(use_true_random=False),
)
@settings(max_examples=60)
def test_no_slot_is_reused_while_a_thread_may_fill_it(
    slots: int, lane: int, shared: bool, moves: list[str], random: Random
) -> None:
    world = World(slots, lane, shared)
    table, threads, ahead = world.table, world.threads, world.ahead
    threads.fails = set(random.sample(KEYS, random.choice((0, 0, 3))))
    for move in moves:
        flying = len(ahead._flying)
        if move == "p":
            ahead.plan(random.sample(KEYS, random.randint(0, 8)))
        elif move == "a":
            limit = random.randint(0, 3)
            ahead.ask(random.sample(KEYS, 3), limit)
            assert len(ahead._flying) <= max(flying, limit)
        elif move == "e":
            layer = random.randrange(LAYERS)
            world.early.begin(world.early.guess(layer, random.sample(range(EXPERTS), random.choice((3, 5, 6)))))
        elif move == "s" and (queued := threads.under_way(started=False)):
            min(queued, key=lambda each: each[2])[3].claimed = True
        elif move == "f" and (running := threads.under_way(started=True)):
            threads.finish(random.choice(running)[3])
        elif move == "o":
            ahead.poll()
        elif move == "u":
            world.serve(random.randrange(LAYERS), random.sample(range(EXPERTS), 2))
        elif move == "x":
            ahead.stop()
            assert not ahead.queued and all(load.claimed for _, _, p, load in threads.under_way() if p == PLAN)
        elif move == "c":
            queued_before = ahead.queued
            ahead.cancel()
            assert ahead.queued <= queued_before
        elif move == "d":
            ahead.drop_unstarted(random.sample(KEYS, 9))
        threads.check([])
        world.counted()
        planned = [each for each in threads.under_way() if each[2] == PLAN]
        assert len(planned) <= PLAN_DEPTH
    ahead.stop()
    world.quiet()
    for layer in range(LAYERS):
        world.early.claim(layer, set())
    assert not ahead.flying
    assert all(slot.state in (SlotState.EMPTY, SlotState.READY) for slot in table.slots)
    broken = [load for _, _, _, load in threads.begun if load.error is not None and "broken" in str(load.error)]
    assert ahead.failed <= len(broken) and bool(ahead.last_error) == bool(ahead.failed)


@given(st.permutations(KEYS), st.integers(0, 9), st.booleans(), st.lists(st.sampled_from(KEYS), max_size=20))
@settings(max_examples=50)
def test_what_is_planned_ends_resident_and_is_begun_in_its_order(
    keys: list[Key], count: int, laned: bool, used: list[Key]
) -> None:
    """Layer after layer, at most so many at a time, and none of the plan goes for another of it."""
    world = World(11 if laned else 9, 2 if laned else 0)
    for layer, expert in used:
        world.serve(layer, [expert])
    wanted = [key for layer in range(LAYERS) for key in keys[:count] if key[0] == layer][:9]
    wanted = [key for key in wanted if sum(key[0] == other[0] for other in wanted[: wanted.index(key)]) < 3]
    missing = [key for key in wanted if not world.table.is_resident(key)]
    world.ahead.plan(wanted)
    while world.threads.under_way():
        under_way = world.threads.under_way()
        assert len({key[0] for key, *_ in under_way}) == 1 and len(under_way) <= PLAN_DEPTH
        assert all(priority == PLAN for _, _, priority, _ in under_way)
        world.threads.finish(under_way[0][3])
        world.ahead.poll()
    assert [key for key, *_ in world.threads.begun] == missing
    assert all(world.table.is_resident(key) for key in wanted)
    if laned:  # they are residents, and what they replaced passes through
        assert not [slot.key for slot in world.table.slots if slot.transient and slot.key in wanted]


def test_a_plan_floods_no_link() -> None:
    world = World(18)
    world.ahead.plan(KEYS[:6] + KEYS[6:8])
    assert len(world.threads.under_way()) == PLAN_DEPTH and world.ahead.queued == 8 - PLAN_DEPTH
    world.threads.finish(world.threads.begun[0][3])
    world.ahead.poll()
    assert len(world.threads.under_way()) == PLAN_DEPTH and world.ahead.queued == 7 - PLAN_DEPTH


def test_a_new_plan_replaces_the_old_but_for_what_has_started() -> None:
    world = World(9)
    world.ahead.plan([(0, 0), (0, 1), (0, 2), (1, 0)])
    assert world.ahead.queued == 1
    world.threads.begun[0][3].claimed = True
    world.ahead.plan([(0, 2), (2, 5)])
    assert sorted(key for key, *_ in world.threads.under_way()) == [(0, 0), (0, 2)]
    world.quiet()
    assert sorted(key for key in KEYS if world.table.is_resident(key)) == [(0, 0), (0, 2), (2, 5)]
    assert world.table.counters[0].prefetches_cancelled == 1


def test_what_a_prompt_wants_keeps_its_slot_as_long_as_the_prompt_is_read() -> None:
    world = World(LAYERS * 2 + 2, lane=2)
    table, ahead = world.table, world.ahead
    table.begin_pass()
    for expert in (0, 1):
        slot = table.reserve((0, expert))
        assert slot is not None
        table.commit(slot, 64)

    def residents() -> set[Key]:
        return {slot.key for slot in table.slots if slot.key is not None and slot.key[0] == 0 and not slot.transient}

    ahead.plan([(0, 4), (0, 5)])
    table.visit(0)
    table.make_way(0, 0, frozenset((0, 1)))
    world.quiet()  # the plan's loads land while the prompt is read: they pass through
    assert table.is_resident((0, 4)) and table.is_resident((0, 5))
    assert residents() == {(0, 0), (0, 1)}
    table.begin_pass()
    ahead.plan([(0, 4), (0, 5)])
    world.quiet()
    assert residents() == {(0, 4), (0, 5)}


def test_a_load_that_failed_is_told_and_leaves_its_slot() -> None:
    world = World(9)
    world.threads.fails = {(0, 1)}
    world.ahead.ask([(0, 1), (0, 2)], 2)
    assert all(priority == NEXT_GATE for _, _, priority, _ in world.threads.begun)
    world.quiet()
    assert world.ahead.failed == 1 and world.ahead.last_error == "(0, 1) is broken"
    assert world.table.find((0, 1)) is None and world.table.is_resident((0, 2))


def test_what_was_evicted_for_a_useless_prefetch_costs_its_load_when_it_is_missed() -> None:
    world = World(6)  # two of each layer
    ahead, table = world.ahead, world.table
    ahead.demanded([(0, 0), (0, 5)], 0.5, beside=False, prefill=False)  # alone, a load takes 0.25 s
    for key in ((0, 0), (0, 5)):
        table.commit(cast(int, table.reserve(key)), 64)
    ahead.ask([(0, 1)], 1)
    assert table.find((0, 0)) is None
    world.quiet()
    ahead.demanded([(0, 0), (0, 5)], 0.0, beside=False, prefill=True)  # of prompts nothing is known yet
    assert ahead.worth.delayed_s == 0
    table.evict(cast(int, table.find((0, 1))))
    table.commit(cast(int, table.reserve((0, 0))), 64)
    ahead.ask([(0, 1)], 1)
    assert table.find((0, 0)) is None
    world.quiet()
    ahead.demanded([(0, 0), (0, 4)], 0.5, beside=False, prefill=False)
    assert ahead.worth.delayed_s == pytest.approx(0.25)
    ahead.demanded([(0, 0)], 0.25, beside=False, prefill=False)  # once
    assert ahead.worth.delayed_s == pytest.approx(0.25)


def test_early_loads_of_a_layer_that_does_not_come_are_ended_before_their_slots_are_free() -> None:
    world = World(9)
    for layer in range(LAYERS):
        world.serve(layer, [0, 1, 2])
    world.early.begin(deque([(1, 4)]))
    load = world.threads.begun[0][3]
    load.claimed = True  # a thread reads it
    assert world.early.claim(2, {4}) == []
    assert load.done.is_set() and world.table.find((1, 4)) is None
    assert world.table.counters[1].prefetches_cancelled == 1
