"""Two eviction orders on trial: each bank misses what the slot table would miss, and the better one leads."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.residency.budget import PoolPlan
from emoe.residency.contest import HALF_LIFE_TOKENS, MARGIN, RECENCY, SCORES, Contest
from emoe.residency.eviction import LRU, Eviction, Scored
from emoe.residency.table import ResidencyTable


def misses_of_table(routes: np.ndarray, slots: int, experts: int, rule: Eviction) -> int:
    layers = routes.shape[1]
    plan = PoolPlan(0, slots * layers, 1, dict.fromkeys(range(layers), slots))
    table = ResidencyTable(plan, dict.fromkeys(range(layers), experts), rule)
    misses = 0
    for token in routes:
        table.begin_pass()
        for layer in range(layers):
            table.visit(layer)
            keys = [(layer, int(e)) for e in token[layer]]
            for key in keys:
                table.use(key, keep=True)
                if table.find(key) is None:
                    misses += 1
                    slot = table.reserve(key, protect=frozenset(keys))
                    assert slot is not None
                    table.commit(slot, 1)
    return misses


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(2, 6), st.booleans())
def test_both_banks_miss_what_the_slot_table_misses(seed: int, layers: int, slots: int, at_once: bool) -> None:
    rng = np.random.default_rng(seed)
    experts, k = 8, 2
    routes = np.argsort(rng.random((40, layers, experts)), axis=2)[:, :, :k]
    values = rng.permutation(layers * experts).reshape(layers, experts).astype(np.float32)
    contest = Contest([slots] * layers, experts)
    contest._keep = 1.0
    for token in routes:
        contest.begin_token()
        used = np.zeros((layers, experts), dtype=bool)
        used[np.arange(layers)[:, None], token] = True
        if at_once:
            contest.visit(np.arange(layers), used, lambda: values)
        else:
            for layer in range(layers):
                part = slice(layer, layer + 1)
                contest.visit(np.array([layer]), used[part], partial(values.__getitem__, part))
    rule = Scored("fixed", layers * experts)
    rule.values = values.reshape(-1)
    assert contest.loads[SCORES] == misses_of_table(routes, slots, experts, rule)
    assert contest.loads[RECENCY] == misses_of_table(routes, slots, experts, LRU())
    assert contest.made == contest.loads.tolist()


def test_the_better_order_leads_and_the_lead_comes_back() -> None:
    contest = Contest([3], 8)
    good = np.arange(8, dtype=np.float32)[None]
    leads = []
    for t in range(6000):
        # First three experts in turn, which scores want gone; then four, of which LRU keeps none.
        values = -good if t < 3000 else good
        contest.begin_token()
        used = np.zeros((1, 8), dtype=bool)
        used[0, 5 + t % 3 if t < 3000 and t % 10 else 4 + t % 4] = True
        contest.visit(np.array([0]), used, partial(np.asarray, values))
        leads.append(contest.lead)
    assert leads[0] == SCORES
    assert leads[2999] == RECENCY
    assert leads[5999] == SCORES
    assert contest.switches == 2


def test_the_other_order_must_be_clearly_better_to_lead() -> None:
    """By a hundredth and a load for each layer: noise alone must not change it."""
    for more, lead in ((0.0, SCORES), (1.0, RECENCY)):
        contest = Contest([2, 2, 2], 8)
        contest._keep = 1.0
        contest.loads[:] = 1000 + MARGIN * 1000 + 3 + more, 1000
        contest.begin_token()
        assert (contest.lead, contest.switches) == (lead, int(lead == RECENCY))


def test_a_load_counts_half_after_its_half_life() -> None:
    contest = Contest([9] * 9, 16)
    contest.loads[:] = 12, 8
    for _ in range(int(HALF_LIFE_TOKENS)):
        contest.begin_token()
    assert contest.loads.tolist() == pytest.approx([6, 4])
