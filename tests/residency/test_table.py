"""The residency table: legal moves only, quotas, what is never evicted, and the bounds of caching theory."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe.residency.budget import LayerNeed, PoolPlan, uniform_quotas
from emoe.residency.eviction import EVICTION_RULES, make_eviction
from emoe.residency.table import LEGAL_MOVES, IllegalMove, ResidencyTable, SlotState

RULES = sorted(EVICTION_RULES)
Visits = list[tuple[int, tuple[int, ...]]]


def make_table(
    layers: int, experts: int, slots: int, rule: str, top_k: int = 2, shared: bool = False
) -> ResidencyTable:
    needs = [LayerNeed(layer, experts, top_k, 64) for layer in range(layers)]
    quotas = {layer: 0 for layer in range(layers)} if shared else uniform_quotas(slots, needs)
    plan = PoolPlan(0, slots, 64, quotas)
    return ResidencyTable(plan, {layer: experts for layer in range(layers)}, make_eviction(rule))


def run(table: ResidencyTable, visits: Visits) -> int:
    """Serve decode visits; return the misses."""
    misses = 0
    for layer, experts in visits:
        if layer == 0:
            table.begin_pass()
        table.visit(layer)
        protect = frozenset((layer, e) for e in experts)
        pinned = []
        for expert in experts:
            key = (layer, expert)
            table.use(key, keep=True)
            slot = table.find(key)
            if slot is None:
                misses += 1
                slot = table.reserve(key, protect=protect)
                assert slot is not None
                table.commit(slot, 64)
            table.pin(slot)
            pinned.append(slot)
        assert all(table.is_resident((layer, e)) for e in experts)
        assert table.occupied <= table.plan.slots
        for slot in pinned:
            table.unpin(slot)
    return misses


@st.composite
def workloads(draw: st.DrawFn, layers: int = 3, experts: int = 6) -> Visits:
    """Cyclic visits of the layers, two experts each."""
    visits: Visits = []
    for _ in range(draw(st.integers(1, 25))):
        for layer in range(layers):
            pair = draw(st.lists(st.integers(0, experts - 1), min_size=2, max_size=2, unique=True))
            visits.append((layer, tuple(pair)))
    return visits


def belady(visits: Visits, slots: int) -> int:
    """Misses of the clairvoyant rule that also keeps the running layer's experts: a lower bound for every rule.

    Demand paging over single keys (the pair of a visit one after the other) can only miss less than serving pairs
    whose members protect each other, so plain MIN is the bound.
    """
    keys = [(layer, e) for layer, experts in visits for e in experts]
    held: set[tuple[int, int]] = set()
    misses = 0
    for i, key in enumerate(keys):
        if key in held:
            continue
        misses += 1
        if len(held) >= slots:

            def next_use(k: tuple[int, int], after: int = i) -> int:
                return next((j for j in range(after + 1, len(keys)) if keys[j] == k), len(keys))

            held.remove(max(held, key=next_use))
        held.add(key)
    return misses


@given(workloads(), st.sampled_from(RULES), st.integers(2, 18), st.booleans())
def test_no_rule_beats_beladys_bound(visits: Visits, rule: str, slots: int, shared: bool) -> None:
    assert run(make_table(3, 6, slots, rule, shared=shared), visits) >= belady(visits, slots)


@given(workloads(), st.integers(2, 17))
def test_misses_of_lru_never_grow_with_capacity(visits: Visits, slots: int) -> None:
    """LRU has the inclusion property over one shared pool (Mattson et al. 1970)."""
    small = run(make_table(3, 6, slots, "lru", shared=True), visits)
    large = run(make_table(3, 6, slots + 1, "lru", shared=True), visits)
    assert large <= small


@given(workloads(), st.integers(1, 3))
def test_misses_of_lru_never_grow_with_quotas(visits: Visits, quota: int) -> None:
    small = run(make_table(3, 6, 3 * (quota + 1), "lru"), visits)
    large = run(make_table(3, 6, 3 * (quota + 2), "lru"), visits)
    assert large <= small


@given(workloads(), st.sampled_from(RULES), st.integers(6, 18))
def test_a_layer_keeps_its_quota_under_decode(visits: Visits, rule: str, slots: int) -> None:
    table = make_table(3, 6, slots, rule)
    run(table, visits)
    for layer in range(3):
        assert len(table.resident(layer)) <= table.plan.quotas[layer]


def test_least_stale_keeps_what_lru_throws_away_below_the_working_set() -> None:
    """Layers are visited cyclically: below one pass LRU hits nothing, least-stale most of what fits."""
    visits: Visits = [(layer, (0, 1)) for _ in range(50) for layer in range(3)]
    total = sum(len(experts) for _, experts in visits)
    assert run(make_table(3, 6, 4, "lru", shared=True), visits) == total
    assert run(make_table(3, 6, 4, "least-stale", shared=True), visits) < 0.6 * total


def test_illegal_moves_are_refused() -> None:
    legal = set(LEGAL_MOVES)
    for start in SlotState:
        for to in SlotState:
            table = make_table(1, 4, 2, "lru")
            table.slots[0].state = start
            if (start, to) in legal:
                table._move(0, to)
                assert table.slots[0].state is to
            else:
                with pytest.raises(IllegalMove):
                    table._move(0, to)


@given(workloads(), st.sampled_from(RULES), st.data())
@settings(max_examples=50)
def test_a_prefill_costs_decode_at_most_its_transient_slots(visits: Visits, rule: str, data: st.DataObject) -> None:
    table = make_table(3, 6, 9, rule)
    table.max_transient = data.draw(st.integers(1, 3))
    run(table, visits)
    full = table.occupied == table.plan.slots
    before = {key for key in table._where}
    table.begin_pass()
    for layer in range(3):
        table.visit(layer)
        for expert in range(6):
            key = (layer, expert)
            table.use(key, keep=False)
            if table.find(key) is None:
                slot = table.reserve(key, transient=not table.below_quota(layer))
                assert slot is not None
                table.commit(slot, 64)
    if full:
        assert len(before - set(table._where)) <= table.max_transient


def test_pinned_and_loading_slots_are_never_taken() -> None:
    table = make_table(1, 6, 2, "lru")
    first = table.reserve((0, 0))
    second = table.reserve((0, 1))
    assert first is not None and second is not None
    table.commit(first, 1)
    table.pin(first)
    assert table.reserve((0, 2)) is None
    table.commit(second, 1)
    assert table.reserve((0, 2), protect=frozenset({(0, 1)})) is None
    assert table.reserve((0, 2)) == second


def test_an_aborted_load_leaves_the_slot_empty() -> None:
    table = make_table(1, 6, 2, "lru")
    slot = table.reserve((0, 0))
    assert slot is not None
    table.abort(slot)
    assert table.find((0, 0)) is None and table.occupied == 0
    assert table.counters[0].loads == 0


@given(workloads(), st.sampled_from(RULES), st.integers(2, 18), st.booleans(), st.data())
def test_every_prefetch_ends_as_used_unused_or_cancelled(
    visits: Visits, rule: str, slots: int, shared: bool, data: st.DataObject
) -> None:
    """Invariant 3, with prefetches that end at any time, in any way."""
    table = make_table(3, 6, slots, rule, shared=shared)
    flying: list[int] = []
    ends = {"committed": 0, "aborted": 0}
    first_runs = 0
    unseen: set[tuple[int, int]] = set()
    misses = 0

    def end(slot: int, well: bool) -> None:
        flying.remove(slot)
        if well:
            table.commit(slot, 64)
        else:
            unseen.discard(table.slots[slot].key or (-1, -1))
            table.abort(slot)
        ends["committed" if well else "aborted"] += 1

    for layer, experts in visits:
        table.visit(layer)
        for key in data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), max_size=2)):
            if table.find(key) is None and len(flying) < 2:
                slot = table.reserve(key, prefetch=True)
                if slot is not None:
                    flying.append(slot)
                    unseen.add(key)
        for slot in list(flying):
            fate = data.draw(st.sampled_from(["flies", "ends", "fails"]))
            if fate != "flies":
                end(slot, fate == "ends")
        for key in [(layer, e) for e in experts]:
            where = table.find(key)
            if where in flying:
                end(where, True)  # the layer waits for it
            if table.is_resident(key):
                first_runs += key in unseen
                unseen.discard(key)
            else:
                misses += 1
                for slot in list(flying):
                    end(slot, False)  # demand first
                where = table.reserve(key)
                assert where is not None
                unseen.discard(key)
                table.commit(where, 64)
            table.use(key, keep=True)
    counters = table.counters.values()
    total = {
        name: sum(getattr(c, name) for c in counters)
        for name in ("prefetches", "prefetches_used", "prefetches_unused", "prefetches_cancelled", "loads")
    }
    waiting = sum(slot.prefetched for slot in table.slots)
    assert sum(c.prefetches_waiting for c in counters) == waiting
    assert total["prefetches_cancelled"] == ends["aborted"]
    assert total["prefetches_used"] == first_runs
    assert total["prefetches"] == ends["committed"] + ends["aborted"] + len(flying)
    assert total["loads"] == misses + ends["committed"]
    assert sum(c.bytes_read for c in counters) == 64 * total["loads"]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_remembering_each_layers_first_to_go_changes_no_eviction(data: st.DataObject) -> None:
    """The oracle looks at every slot for every miss."""
    layers, experts, slots = 4, 6, data.draw(st.integers(5, 20), "slots")
    rule, shared = data.draw(st.sampled_from(RULES), "rule"), data.draw(st.booleans(), "shared")
    tables = [make_table(layers, experts, slots, rule, shared=shared) for _ in range(2)]
    tables[1].eviction.steady = False
    keys = st.tuples(st.integers(0, layers - 1), st.integers(0, experts - 1))
    for _ in range(data.draw(st.integers(1, 12), "passes")):
        for table in tables:
            table.begin_pass()
        for layer in range(layers):
            used = data.draw(st.lists(st.integers(0, experts - 1), min_size=1, max_size=2, unique=True))
            protect = data.draw(st.frozensets(keys, max_size=3)) | {(layer, e) for e in used}
            transient, prefetch = data.draw(st.booleans()), data.draw(st.booleans())
            gone: list[list[object]] = []
            for table in tables:
                table.visit(layer)
                gone.append([])
                for expert in used:
                    table.use((layer, expert), keep=not transient)
                    if (slot := table.find((layer, expert))) is None:
                        slot = table.reserve((layer, expert), transient=transient, protect=protect, prefetch=prefetch)
                        gone[-1].append((slot is None, table.evicted))
                        if slot is not None:
                            table.commit(slot, 64)
            assert gone[0] == gone[1]
            assert tables[0].resident(layer) == tables[1].resident(layer)
