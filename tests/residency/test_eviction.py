"""Eviction rules: what each orders by, and that a key's score is its own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.errors import UsageError
from emoe.residency.eviction import EVICTION_RULES, Eviction, Now, Scored, Uses, make_eviction

KEYS = 12
FLOATS = st.floats(width=32, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0])


def rules(values: list[float]) -> list[Eviction]:
    scored = Scored("scored", KEYS)
    scored.values[:] = values
    return [*(make_eviction(name) for name in sorted(EVICTION_RULES)), scored]


@st.composite
def pasts(draw: st.DrawFn) -> Uses:
    def column(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=KEYS, max_size=KEYS))

    ranks = np.repeat(np.arange(3), KEYS // 3)
    return Uses(np.array(column(-1, 50)), np.array(column(-1, 9)), np.array(column(0, 30)), ranks, np.arange(KEYS))


@given(pasts(), st.lists(FLOATS, min_size=KEYS, max_size=KEYS), st.sets(st.integers(0, KEYS - 1), min_size=1))
def test_a_keys_score_does_not_depend_on_the_other_candidates(past: Uses, values: list[float], some: set[int]) -> None:
    """What lets the simulator score every key of all layers at once."""
    chosen = np.array(sorted(some))
    now = Now(51, 10, 1, 3)
    for rule in rules(values):
        every = rule.score(past, now)
        part = rule.score(Uses(*(getattr(past, name)[chosen] for name in Uses.__slots__)), now)
        assert np.array_equal(every[chosen], part), rule.name
        grid = rule.score(Uses(*(getattr(past, name).reshape(3, -1) for name in Uses.__slots__)), now)
        assert np.array_equal(grid.ravel(), every), rule.name


@given(pasts(), st.lists(FLOATS, min_size=KEYS, max_size=KEYS))
def test_scored_orders_by_value_then_by_recency(past: Uses, values: list[float]) -> None:
    scored = Scored("scored", KEYS)
    scored.values[:] = values
    score = scored.score(past, Now(51, 10, 1, 3))
    expected = np.lexsort((past.last_tick, scored.values))
    assert np.array_equal(np.argsort(score, kind="stable"), expected)


@given(pasts(), st.integers(0, 2))
def test_each_rule_orders_by_what_it_says(past: Uses, running: int) -> None:
    now = Now(51, 10, running, 3)
    missed = [9 - p + (r < running) for p, r in zip(past.last_pass.tolist(), past.rank.tolist(), strict=True)]
    ahead = [(r - running - 1) % 3 for r in past.rank.tolist()]
    orders = {
        "lru": (past.last_tick,),
        "lfu": (past.last_tick, past.uses),
        "least-stale": (past.uses, -np.array(ahead), -np.array(missed)),
    }
    assert sorted(orders) == sorted(EVICTION_RULES)
    for name, by in orders.items():
        score = make_eviction(name).score(past, now)
        assert np.array_equal(np.argsort(score, kind="stable"), np.lexsort(by)), name


def test_an_unknown_rule_is_refused_with_the_choices() -> None:
    with pytest.raises(UsageError, match="choose one of lru, lfu, least-stale"):
        make_eviction("fifo")
