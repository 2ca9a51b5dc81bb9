"""Ctrl-C at any point, and again while that is put right: the next pass has all its slots, and the right bytes."""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe.checkpoint.crew import Crew
from emoe.residency.budget import PoolPlan
from emoe.residency.eviction import make_eviction
from emoe.residency.loader import Load, Loader
from emoe.residency.pool import ExpertPool
from emoe.residency.table import Key, ResidencyTable, SlotState
from tests.interrupting import Interrupts
from tests.residency.test_transfers import COPY_S, holds, make

LAYERS, EXPERTS, PARTS = 2, 6, 3


class World:
    """A pool whose slots hold their expert's number, read in parts by several threads, a little late."""

    def __init__(self, slots: int, lane: int, shared: bool, threads: int, seed: int = 0) -> None:
        quota = 0 if shared else (slots - lane) // LAYERS
        plan = PoolPlan(0, slots, 1, dict.fromkeys(range(LAYERS), quota), lane)
        self.table = ResidencyTable(plan, dict.fromkeys(range(LAYERS), EXPERTS), make_eviction("lru"))
        self.memory = torch.zeros(slots, PARTS)
        views = [{"gate_up_proj": memory} for memory in self.memory]
        bank = SimpleNamespace(device=SimpleNamespace(type="cpu"), slot_nbytes=1, views=views)
        index = SimpleNamespace(path="none", pieces=lambda layer, expert: (layer, expert))
        self.draw = random.Random(seed)
        self.crew, self.loader = Crew(3, "test-interrupts"), Loader(threads)
        reader = SimpleNamespace(read_into=self.read)
        self.pool = ExpertPool(self.table, *cast(tuple[Any, Any, Any], (bank, index, reader)), self.loader, 2)

    def read(self, key: Key, parts: dict[str, torch.Tensor], *_: Any) -> int:
        memory, delays = parts["gate_up_proj"], [self.draw.choice([0.0, 0.0, 0.0002]) for _ in range(PARTS)]

        def one(part: int) -> None:
            memory[part] = -1
            time.sleep(delays[part])
            memory[part] = self.number(key)

        self.crew.run([partial(one, part) for part in range(PARTS)])
        return 1

    @staticmethod
    def number(key: Key) -> int:
        return key[0] * EXPERTS + key[1] + 1

    def holds(self, layer: int, expert: int, slot: int) -> None:
        assert self.memory[slot].tolist() == [self.number((layer, expert))] * PARTS
        assert self.table.slots[slot].state is SlotState.PINNED

    def run(self, seed: int) -> None:
        """A prompt, some tokens and a plan, as the runtime runs them."""
        draw, pool = random.Random(seed), self.pool
        for number in range(4):
            self.table.begin_pass()
            if number == 0:
                pool.early.open(EXPERTS * 2)
            for layer in range(LAYERS):
                pool.prefetches.poll()
                if number == 0:
                    stream = pool.stream(layer, draw.sample(range(EXPERTS), EXPERTS - 1), prefill=True, ahead=True)
                    try:
                        for wave in stream:
                            for expert, slot in wave:
                                self.holds(layer, expert, slot)
                    finally:
                        cast(Any, stream).close()
                    continue
                if number == 2 and layer == 0:
                    pool.prefetches.plan([(at, e) for at in range(LAYERS) for e in draw.sample(range(EXPERTS), 2)])
                taking = pool.begin(layer, draw.sample(range(EXPERTS), 2))
                try:
                    while taking.flights:
                        pool.arrive(taking)
                    for expert, slot in zip(taking.experts, taking.slots, strict=True):
                        self.holds(layer, expert, slot)
                finally:
                    pool.end(taking)

    def in_order(self) -> None:
        """No slot is held by what has ended, and the books say what the slots say."""
        table = self.table
        loading = {number for number, slot in enumerate(table.slots) if slot.state is SlotState.LOADING}
        assert loading == self.pool.prefetches.slots
        assert all(slot.state is not SlotState.PINNED for slot in table.slots)
        full = {number: slot.key for number, slot in enumerate(table.slots) if slot.key is not None}
        assert all((slot.state is SlotState.EMPTY) == (slot.key is None) for slot in table.slots)
        assert sorted(table._free) == [number for number in range(len(table.slots)) if number not in full]
        assert {key: number for number, key in full.items()} == table._where
        assert {number for number in full if table.slots[number].transient} == table._passing
        kept = Counter(key[0] for number, key in full.items() if not table.slots[number].transient)
        assert {layer: kept[layer] for layer in range(LAYERS)} == table._kept
        for layer in range(LAYERS):
            assert table._by_layer[layer] == {number for number, key in full.items() if key[0] == layer}
            ready = {key[1] for number, key in full.items() if key[0] == layer and number not in loading}
            assert {e for e, is_ready in enumerate(table.ready(layer)) if is_ready} == ready
            waiting = sum(table.slots[number].prefetched for number, key in full.items() if key[0] == layer)
            assert table.counters[layer].prefetches_waiting == waiting

    def check(self) -> None:
        self.table.begin_pass()
        self.in_order()
        self.run(seed=1)
        self.run(seed=2)
        self.pool.prefetches.cancel()
        self.table.begin_pass()
        self.in_order()
        assert not self.pool.prefetches.flying

    def close(self) -> None:
        self.loader.close()
        self.crew.close()


def interrupted(interrupts: Interrupts, make: Callable[[], World]) -> bool:
    """Whether an interrupt came; whatever one leaves behind, the passes after it must find nothing amiss."""
    world = make()
    try:
        world.run(seed=5)
        came = interrupts.during(partial(world.run, seed=0))
        world.check()
    except BaseException as error:
        error.add_note(f"after interrupts at {interrupts.raised}")
        raise
    finally:
        world.close()
    return came


# Python loses an interrupt that comes while it ends a generator that nobody holds any more, and warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@settings(max_examples=60, deadline=None)
@given(
    line=st.integers(1, 5000),
    then=st.integers(0, 40),
    kind=st.sampled_from([(5, 0, True, 2), (6, 0, False, 2), (8, 2, False, 1), (6, 0, True, 0)]),
    seed=st.integers(0, 10**6),
)
def test_interrupts_at_any_line_leave_nothing_behind(
    line: int, then: int, kind: tuple[int, int, bool, int], seed: int
) -> None:
    interrupted(Interrupts(line, then), lambda: World(*kind, seed=seed))


@pytest.mark.parametrize("when", range(1, 9))
def test_an_interrupted_load_keeps_its_slots_while_its_copy_is_under_way(
    when: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, device, _ = make(4, 3)  # few host slots: each is soon read into again; the device tells if that is too soon
    assert pool.transfers is not None
    bring, begun = pool.transfers._bring, 0

    def interrupted(*arguments: Any) -> int:
        nonlocal begun
        nbytes, begun = bring(*arguments), begun + 1
        if begun == when:
            raise KeyboardInterrupt
        return nbytes

    monkeypatch.setattr(pool.transfers, "_bring", interrupted)
    draw, interrupts = random.Random(when), 0
    for _ in range(20):
        pool.table.begin_pass()
        for layer in range(LAYERS):
            experts = draw.sample(range(EXPERTS), 2)
            try:
                slots = pool.take(layer, experts)
            except KeyboardInterrupt:
                interrupts += 1
                assert SlotState.LOADING in {slot.state for slot in pool.table.slots}
                break
            assert all(holds(pool, slot, (layer, expert)) for slot, expert in zip(slots, experts, strict=True))
            device.compute(COPY_S / 2)
            pool.release(slots)
    assert interrupts == 1


def test_an_interrupted_early_load_keeps_its_slot_until_the_next_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(6, 0, False, 0)
    world.table.begin_pass()
    world.pool.early.begin(deque([(0, 0)]))

    def interrupted(load: Load) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(world.loader, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            world.pool.early.claim(0, ())  # its layer needs none of them
    assert world.table.slots[world.pool._slot_of(0, 0)].state is SlotState.LOADING
    world.check()
    world.close()


@pytest.mark.parametrize("streamed", [True, False])
def test_what_a_pass_held_before_a_mend_gives_nothing_back_after_it(streamed: bool) -> None:
    """A generator lives on in an interrupt's traceback, and is closed as the next pass runs."""
    world = World(6, 0, True, 0)
    pool, table = world.pool, world.table
    table.begin_pass()
    if streamed:
        stream = cast(Any, pool.stream(0, range(EXPERTS), prefill=True))
        next(stream)
        late = stream.close
    else:
        held = pool.begin(0, [0, 1])
        pool.arrive(held)
        late = partial(pool.end, held)
    table.begin_pass()
    taking = pool.begin(1, [0, 1, 2])
    pool.arrive(taking)
    before = [(slot.key, slot.state) for slot in table.slots]
    late()
    assert [(slot.key, slot.state) for slot in table.slots] == before
    while taking.flights:
        pool.arrive(taking)
    for expert, slot in zip(taking.experts, taking.slots, strict=True):
        world.holds(1, expert, slot)
    pool.end(taking)
    world.check()
    world.close()
