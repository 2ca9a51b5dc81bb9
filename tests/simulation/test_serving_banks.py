"""Simulated banks against the engine's own: a shared pool against `ExpertPool`, quotas against `ResidencyTable`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from emoe.prediction.protocol import RoutingShape
from emoe.residency.budget import PoolPlan
from emoe.residency.eviction import EVICTION_RULES, make_eviction
from emoe.residency.loader import Loader
from emoe.residency.pool import ExpertPool
from emoe.residency.table import ResidencyTable
from emoe.scheduling.costs import Array
from emoe.simulation.serving_banks import Banks

RULES = sorted(EVICTION_RULES)


@st.composite
def passes(draw: Any) -> tuple[RoutingShape, list[tuple[Array, bool]]]:
    """A shape, and passes of 1 to 6 tokens: counts [layers * experts], and whether input was read."""
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    top_k = draw(st.integers(1, min(2, experts)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    found = []
    for _ in range(draw(st.integers(1, 25))):
        tokens = int(rng.integers(1, 7))
        counts = np.zeros((layers, experts), dtype=np.int64)
        for layer in range(layers):
            for _ in range(tokens):
                counts[layer, rng.choice(experts, top_k, replace=False)] += 1
        found.append((counts.reshape(-1), bool(rng.random() < 0.3)))
    return RoutingShape(layers, experts, top_k), found


def ordered(row: Array) -> list[int]:
    """Experts of a layer's pass, most tokens first."""
    order = np.argsort(-row, kind="stable")
    return [int(e) for e in order[: np.count_nonzero(row)]]


def make_pool(shape: RoutingShape, plan: PoolPlan, rule: str) -> ExpertPool:
    bank = SimpleNamespace(device=SimpleNamespace(type="cpu"), slot_nbytes=1, views=[{} for _ in range(plan.slots)])
    index = SimpleNamespace(path="none", pieces=lambda layer, expert: ())
    reader = SimpleNamespace(read_into=lambda *_: 1)
    table = ResidencyTable(plan, dict.fromkeys(range(shape.layers), shape.experts), make_eviction(rule))
    return ExpertPool(table, *cast(tuple[Any, Any, Any], (bank, index, reader)), Loader(threads=0))


@pytest.mark.parametrize("rule", RULES)
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_a_shared_pool_misses_what_the_engines_pool_misses(rule: str, data: Any) -> None:
    shape, run = data.draw(passes())
    keys = shape.layers * shape.experts
    slots = data.draw(st.integers(min(keys, shape.top_k), keys))
    plan = PoolPlan(0, slots, 1, dict.fromkeys(range(shape.layers), 0))
    banks, pool = Banks(shape, plan, make_eviction(rule)), make_pool(shape, plan, rule)
    for counts, prefill in run:
        before = sum(each.loads for each in pool.table.counters.values())
        pool.table.begin_pass()
        rows = counts.reshape(shape.layers, shape.experts)
        for layer in range(shape.layers):
            if rows[layer].sum() == shape.top_k:  # one token
                pool.release(pool.take(layer, ordered(rows[layer])))
            else:
                for _ in pool.stream(layer, ordered(rows[layer]), prefill=prefill):
                    pass
        after = sum(each.loads for each in pool.table.counters.values())
        assert banks.run(counts, prefill=prefill) == after - before
        for layer in range(shape.layers):
            assert np.flatnonzero(banks.resident[layer]).tolist() == pool.table.resident(layer)


@pytest.mark.parametrize("rule", RULES)
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_quotas_miss_what_the_table_misses(rule: str, data: Any) -> None:
    shape, run = data.draw(passes())
    quota = data.draw(st.integers(shape.top_k, shape.experts))
    assume(quota * shape.layers + 1 < shape.layers * shape.experts)
    quotas = dict.fromkeys(range(shape.layers), quota)
    banks = Banks(shape, PoolPlan(0, quota * shape.layers, 1, quotas), make_eviction(rule))
    lane = PoolPlan(0, quota * shape.layers + 1, 1, quotas, lane=1)
    table = ResidencyTable(lane, dict.fromkeys(range(shape.layers), shape.experts), make_eviction(rule))
    for counts, prefill in run:
        table.begin_pass()
        rows = counts.reshape(shape.layers, shape.experts)
        alone = rows[0].sum() == shape.top_k
        loads = 0
        for layer in range(shape.layers):
            chosen = ordered(rows[layer])
            table.visit(layer)
            missing = [e for e in chosen if table.find((layer, e)) is None]
            for expert in chosen:
                table.use((layer, expert), keep=True)
            protect = frozenset((layer, e) for e in chosen) if alone else frozenset()
            for expert in missing:
                passing = prefill and not alone and len(held(table, layer)) >= quota
                slot = table.reserve((layer, expert), transient=passing, protect=protect)
                assert slot is not None
                table.commit(slot, 1)
                loads += 1
        for number, slot_now in enumerate(table.slots):
            if slot_now.transient:  # what passed through is gone
                table.evict(number)
        assert banks.run(counts, prefill=prefill) == loads
        for layer in range(shape.layers):
            assert np.flatnonzero(banks.resident[layer]).tolist() == held(table, layer)


def held(table: ResidencyTable, layer: int) -> list[int]:
    """A layer's residents, without what passes through the lane."""
    return [e for e in table.resident(layer) if not table.slots[cast(int, table.find((layer, e)))].transient]
