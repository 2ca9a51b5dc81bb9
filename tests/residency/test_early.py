"""Early loads of a prompt's next layer: nothing depends on how long they take, all are counted, none is left behind."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe.errors import ReadError
from emoe.residency.budget import PoolPlan
from emoe.residency.early import MOST_OF, SURELY_MOST, turns
from emoe.residency.eviction import make_eviction
from emoe.residency.loader import Loader
from emoe.residency.pool import ExpertPool
from emoe.residency.table import ResidencyTable, SlotState

LAYERS, EXPERTS = 3, 8
Pass = list[list[int]]
"""The experts of each layer, most tokens first; one or two of a layer are a token's."""


@given(here=st.integers(0, 30), coming=st.integers(0, 30), begun=st.booleans())
def test_turns_are_spread_evenly(here: int, coming: int, begun: bool) -> None:
    order = list(turns(here, coming, begun))
    assert (order.count(True), order.count(False)) == (here, coming)
    if here and coming:
        assert order[0] is not begun
        ends = [-1, *(at for at, mine in enumerate(order) if mine), len(order)]
        gaps = [after - before - 1 for before, after in pairwise(ends)]
        assert max(gaps) <= -(-coming // here) + 1


def a_pool(slots: int, shared: bool, loader: Loader, read: Callable[..., int], lane: int = 0) -> ExpertPool:
    quota = 0 if shared else (slots - lane) // LAYERS
    plan = PoolPlan(0, slots, 1, dict.fromkeys(range(LAYERS), quota), lane)
    bank = SimpleNamespace(device=SimpleNamespace(type="cpu"), slot_nbytes=1, views=[{} for _ in range(slots)])
    index = SimpleNamespace(path="none", pieces=lambda layer, expert: (layer, expert))
    table = ResidencyTable(plan, dict.fromkeys(range(LAYERS), EXPERTS), make_eviction("least-stale"))
    return ExpertPool(table, *cast(tuple[Any, Any, Any], (bank, index, SimpleNamespace(read_into=read))), loader)


def tokens_of(each: Pass) -> int:
    """As many as would choose so many experts."""
    return SURELY_MOST * EXPERTS if len(each[0]) > MOST_OF * EXPERTS else len(each[0])


def serve(pool: ExpertPool, passes: list[Pass], *, ahead: bool = True) -> None:
    for each in passes:
        pool.table.begin_pass()
        if ahead and len(each[0]) > 2:
            pool.early.open(tokens_of(each))
        for layer, experts in enumerate(each):
            if len(experts) <= 2:
                pool.release(pool.take(layer, experts))
                continue
            found = [wave for wave in pool.stream(layer, experts, prefill=True, ahead=ahead)]
            assert sorted(expert for ((expert, _),) in found) == sorted(experts)


def nothing_is_left(pool: ExpertPool) -> None:
    assert all(slot.state in (SlotState.EMPTY, SlotState.READY) for slot in pool.table.slots)


def counts_of(pool: ExpertPool) -> list[Any]:
    table = pool.table
    nothing_is_left(pool)
    for counters in table.counters.values():
        early = counters.prefetches - counters.prefetches_cancelled
        # One that is used is a miss of the layer that it was begun for, or, where that did not need it, a hit later on.
        most = counters.misses + early
        assert most - counters.prefetches_used <= counters.loads == counters.bytes_read <= most
        assert counters.prefetches_waiting >= 0
    return [*table.counters.values(), [slot.key for slot in table.slots]]


@st.composite
def runs(draw: Any) -> tuple[int, bool, list[Pass]]:
    some = st.lists(st.permutations(range(EXPERTS)), min_size=LAYERS, max_size=LAYERS)
    passes = []
    for _ in range(draw(st.integers(1, 6))):
        used = draw(st.sampled_from([2, EXPERTS, EXPERTS - 1, 4]))
        passes.append([order[:used] for order in draw(some)])
    shared = draw(st.booleans())
    return draw(st.integers(2 if shared else 2 * LAYERS, LAYERS * EXPERTS - 1)), shared, passes


@settings(max_examples=40, deadline=None)
@given(run=runs(), seed=st.integers(0, 10**6))
def test_how_long_loads_take_changes_neither_hits_nor_residents(run: tuple[int, bool, list[Pass]], seed: int) -> None:
    slots, shared, passes = run
    draw = random.Random(seed)

    def late(*_: Any) -> int:
        time.sleep(draw.choice([0, 0, 0.0002, 0.001]))
        return 1

    alone, several = Loader(threads=0), Loader(threads=3)
    try:
        one, other = a_pool(slots, shared, alone, lambda *_: 1), a_pool(slots, shared, several, late)
        serve(one, passes)
        serve(other, passes)
        assert counts_of(one) == counts_of(other)
    finally:
        alone.close()
        several.close()


EVERYTHING: Pass = [list(range(EXPERTS))] * LAYERS


@pytest.fixture
def loader() -> Iterator[Loader]:
    made = Loader(threads=2)
    yield made
    made.close()


def test_a_layers_loads_begin_before_it_runs(loader: Loader) -> None:
    pool = a_pool(12, False, loader, lambda *_: 1)
    serve(pool, [EVERYTHING] * 2)
    assert all(counters.prefetches_used == counters.prefetches > 0 for counters in pool.table.counters.values())
    plain = a_pool(12, False, loader, lambda *_: 1)
    serve(plain, [EVERYTHING] * 2, ahead=False)
    for layer, counters in plain.table.counters.items():  # a load begun early is still a miss
        found = pool.table.counters[layer]
        assert (counters.hits, counters.misses, counters.loads) == (found.hits, found.misses, found.loads)


def test_few_tokens_load_nothing_early(loader: Loader) -> None:
    pool = a_pool(12, False, loader, lambda *_: 1)
    serve(pool, [EVERYTHING, [list(range(5))] * LAYERS, EVERYTHING])
    before = sum(counters.prefetches for counters in pool.table.counters.values())
    serve(pool, [[list(range(5))] * LAYERS, [[1, 2]] * LAYERS])
    assert sum(counters.prefetches for counters in pool.table.counters.values()) == before


@given(
    quota=st.integers(1, EXPERTS - 1),
    lane=st.integers(1, 4),
    orders=st.lists(
        st.lists(st.permutations(range(EXPERTS)), min_size=LAYERS, max_size=LAYERS), min_size=1, max_size=4
    ),
    used=st.sampled_from([EXPERTS, EXPERTS - 1, 6, 4]),
)
@settings(max_examples=60, deadline=None)
def test_what_a_prompt_wants_becomes_resident_early_or_not(
    quota: int, lane: int, orders: list[Pass], used: int
) -> None:
    """With a lane, as in mode resident: what the prompt used most stays, and no more misses than the lane explains."""
    loader = Loader(threads=0)
    try:
        found = []
        for ahead in (True, False):
            pool = a_pool(quota * LAYERS + lane, False, loader, lambda *_: 1, lane)
            for each in orders:
                pool.table.begin_pass()
                if ahead:
                    pool.early.open(tokens_of([order[:used] for order in each]))
                for layer, order in enumerate(each):
                    wanted = frozenset(order[:quota])
                    stream = pool.stream(layer, order[:used], prefill=True, wanted=wanted, ahead=ahead)
                    assert sorted(e for ((e, _),) in stream) == sorted(order[:used])
                    table = pool.table
                    stays = {table.slots[s].key[1] for s in table._by_layer[layer] - table._passing}  # type: ignore[index]
                    assert stays & set(order[:used]) == wanted & set(order[:used])
                    assert len(table._passing) <= lane
            nothing_is_left(pool)
            found.append({layer: (c.hits, c.misses) for layer, c in pool.table.counters.items()})
        for layer, (hits, misses) in found[0].items():  # what lies in the lane between two prompts may differ
            assert hits + misses == sum(found[1][layer]) and abs(hits - found[1][layer][0]) <= lane * len(orders)
    finally:
        loader.close()


@pytest.mark.parametrize(("layer", "which"), [(0, 0), (1, 0), (1, -1), (2, 2)])
def test_a_pass_that_fails_leaves_nothing_behind(loader: Loader, layer: int, which: int) -> None:
    faulty, broken = False, (-1, -1)

    def read(key: tuple[int, int], *_: Any) -> int:
        if faulty and key == broken:
            raise ReadError("broken")
        return 1

    pool = a_pool(12, False, loader, read)
    serve(pool, [EVERYTHING] * 2)
    broken = [(layer, e) for e in range(EXPERTS) if pool.table.find((layer, e)) is None][which]
    faulty = True
    with pytest.raises(ReadError, match="broken"):
        serve(pool, [EVERYTHING])
    faulty = False
    serve(pool, [EVERYTHING, [[0, 1]] * LAYERS])
    nothing_is_left(pool)


def test_an_early_load_that_nobody_needs_may_fail(loader: Loader) -> None:
    unneeded = -1

    def read(key: tuple[int, int], *_: Any) -> int:
        if key == (1, unneeded):
            raise ReadError("broken")
        return 1

    pool = a_pool(12, False, loader, read)
    for unneeded in (-1, *range(EXPERTS)):
        serve(pool, [[[e for e in range(EXPERTS) if layer != 1 or e != unneeded] for layer in range(LAYERS)]])
        nothing_is_left(pool)
    assert pool.table.counters[1].prefetches_cancelled > 0
