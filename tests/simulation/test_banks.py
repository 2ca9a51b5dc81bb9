"""The fast banks against the engine's slot table, token for token; Belady's rule against every choice there is."""

from __future__ import annotations

from functools import cache, partial
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe.errors import UsageError
from emoe.prediction.protocol import Array, RoutingShape
from emoe.prediction.registry import SCORERS
from emoe.residency.budget import LayerNeed, PoolPlan, uniform_quotas
from emoe.residency.contest import RECENCY, Contest
from emoe.residency.eviction import Eviction, Now, Scored, Scores, Uses
from emoe.residency.table import ResidencyTable
from emoe.routing.trace import Trace
from emoe.simulation.banks import REPORT_TOKENS, Policy, serve, slots_for
from emoe.simulation.lookups import Lookups
from emoe.simulation.policies import Settings, make_policy
from emoe.simulation.shared import serve_shared
from tests.simulation.stand_ins import RecentScorer, make_trace, traces

RULES = ("lru", "lfu", "least-stale", "recent", "belady")


@pytest.fixture(autouse=True)
def _scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCORERS, "recent", RecentScorer)


def policy_for(name: str, lookups: Lookups) -> Policy:
    return make_policy(name, lookups.shape, Settings())


class Following:
    """The policy's order while scores lead the contest, else the last use: as the engine's `LiveScored` does it."""

    name = "following"
    steady = False
    shared_from = np.inf

    def __init__(self, policy: Policy, contest: Contest) -> None:
        self.policy, self.contest = policy, contest

    def score(self, past: Uses, now: Now) -> Scores:
        return past.last_tick if self.contest.lead == RECENCY else self.policy.rule.score(past, now)


def by_table(lookups: Lookups, slots: int, policy: Policy, contest: Contest | None = None) -> Array:
    """[tokens, layers] misses of the engine's table with a quota for each layer, driven look-up by look-up."""
    shape = lookups.shape
    needs = [LayerNeed(rank, shape.experts, shape.top_k, 64) for rank in range(shape.layers)]
    quotas = uniform_quotas(slots * shape.layers, needs)
    policy.start(lookups)
    plan = PoolPlan(0, slots * shape.layers, 64, quotas)
    rule: Eviction = policy.rule if contest is None else Following(policy, contest)
    table = ResidencyTable(plan, dict.fromkeys(range(shape.layers), shape.experts), rule)
    missed = np.zeros((len(lookups), shape.layers), dtype=np.int64)
    rows = lookups.keys.reshape(len(lookups), shape.layers, -1)
    for token in range(len(lookups)):
        policy.before(token)
        table.begin_pass()
        if contest is not None:
            contest.begin_token()
        for rank in range(shape.layers):
            table.visit(rank)
            keys = [divmod(key, shape.experts) for key in rows[token, rank].tolist() if key != lookups.nowhere]
            if contest is not None:
                assert isinstance(policy.rule, Scored)
                values = policy.rule.values.reshape(shape.layers, shape.experts)[rank : rank + 1]
                used = np.zeros((1, shape.experts), dtype=bool)
                used[0, [expert for _, expert in keys]] = True
                contest.visit(np.array([rank]), used, partial(np.asarray, values))
            for key in keys:
                table.use(key, keep=True)
                if table.find(key) is None:
                    missed[token, rank] += 1
                    slot = table.reserve(key, protect=frozenset(keys))
                    assert slot is not None
                    table.commit(slot, 64)
    assert sum(c.loads for c in table.counters.values()) == missed.sum()
    return missed


@given(traces(), st.sampled_from(RULES), st.integers(1, 3))
def test_misses_are_those_of_the_engines_table_token_for_token(trace: Trace, name: str, lanes: int) -> None:
    lookups = Lookups.of(trace, interleave=lanes)
    sizes = [2, 3, 4, 5, 6]
    for size, tally in zip(sizes, serve(lookups, sizes, policy_for(name, lookups)), strict=True):
        expected = by_table(lookups, size, policy_for(name, lookups))
        assert np.array_equal(tally.missed, expected), (name, size)
        assert tally.loads == tally.misses == expected.sum()


def test_they_agree_on_a_longer_trace_with_a_shape_of_its_own() -> None:
    rng = np.random.default_rng(5)
    skew = rng.random((5, 17)) ** 2
    routes = np.argsort(-rng.random((400, 5, 17)) * skew, axis=2)[:, :, :3]
    lookups = Lookups.of(make_trace(routes, [150, 250], 17))
    for name in RULES:
        for size, tally in zip((3, 9, 16), serve(lookups, [3, 9, 16], policy_for(name, lookups)), strict=True):
            assert np.array_equal(tally.missed, by_table(lookups, size, policy_for(name, lookups))), (name, size)


class Backwards(RecentScorer):
    """What was used goes first: recency does better, and soon takes over. No two experts of a layer are equal."""

    name = "backwards"

    def scores(self) -> Array:
        turned: Array = np.arange(self.shape.experts, dtype=np.float32) / 64 - self.counts
        return turned


def test_banks_follow_the_order_that_leads_each_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some capacities go by recency already while others still go by scores, or never evict."""
    monkeypatch.setitem(SCORERS, "backwards", Backwards)
    monkeypatch.setattr("emoe.simulation.policies.CONTESTED", {"backwards"})
    rng = np.random.default_rng(3)
    skew = rng.random((3, 9)) ** 2
    routes = np.argsort(-rng.random((200, 3, 9)) * skew, axis=2)[:, :, :2]
    lookups = Lookups.of(make_trace(routes, [80, 120], 9))
    sizes, switches = [2, 3, 5, 8, 9], []
    for size, tally in zip(sizes, serve(lookups, sizes, policy_for("backwards", lookups)), strict=True):
        contest = Contest([size] * 3, 9)
        assert np.array_equal(tally.missed, by_table(lookups, size, policy_for("backwards", lookups), contest)), size
        switches.append(contest.switches)
    assert 0 < sum(switches) < len(sizes)
    monkeypatch.setattr("emoe.simulation.policies.CONTESTED", frozenset())
    [plain] = serve(lookups, [3], policy_for("backwards", lookups))
    assert np.array_equal(plain.missed, by_table(lookups, 3, policy_for("backwards", lookups))), "scores alone"


def test_progress_is_told_now_and_then_and_at_the_end() -> None:
    lookups = Lookups.of(make_trace(np.zeros((REPORT_TOKENS + 2, 1, 1)), [REPORT_TOKENS + 2], 2))
    told: list[tuple[int, int]] = []
    serve(lookups, [1], policy_for("lru", lookups), lambda done, all_: told.append((done, all_)))
    assert told == [(done, REPORT_TOKENS + 2) for done in (0, REPORT_TOKENS, REPORT_TOKENS + 2)]


def fewest_loads(keys: list[frozenset[int]], slots: int) -> int:
    """Over every choice of what to evict, by dynamic programming."""

    @cache
    def rest(token: int, held: frozenset[int]) -> int:
        if token == len(keys):
            return 0
        now = keys[token]
        others = held - now
        room = slots - len(now)
        best = min(
            rest(token + 1, now | frozenset(kept)) for kept in combinations(sorted(others), min(room, len(others)))
        )
        return len(now - held) + best

    return rest(0, frozenset())


@given(traces(layers=2, experts=5, tokens=24), st.integers(2, 4))
@settings(max_examples=60)
def test_beladys_rule_is_the_best_of_all_choices(trace: Trace, size: int) -> None:
    lookups = Lookups.of(trace)
    [tally] = serve(lookups, [size], policy_for("belady", lookups))
    rows = lookups.keys.reshape(len(lookups), 2, -1)
    for rank in range(2):
        keys = [frozenset(row) - {lookups.nowhere} for row in rows[:, rank].tolist()]
        assert tally.missed[:, rank].sum() == fewest_loads(keys, size)


@given(traces(), st.sampled_from(["lru", "lfu", "least-stale", "random", "recent"]), st.integers(1, 3))
def test_no_policy_loads_less_than_belady(trace: Trace, name: str, lanes: int) -> None:
    lookups = Lookups.of(trace, interleave=lanes)
    sizes = [2, 3, 4, 5, 6]
    best = serve(lookups, sizes, policy_for("belady", lookups))
    found = serve(lookups, sizes, policy_for(name, lookups))
    assert all(tally.loads >= bound.loads for tally, bound in zip(found, best, strict=True))
    best_pool = serve_shared(lookups, 3, policy_for("belady", lookups))
    pool = serve_shared(lookups, 3, policy_for(name, lookups))
    assert pool.loads >= best_pool.loads
    assert best_pool.loads <= best[1].loads, "one bank can always be divided as the layers' banks are"


@given(traces())
def test_misses_of_lru_and_belady_never_grow_with_capacity(trace: Trace) -> None:
    lookups = Lookups.of(trace)
    for name in ("lru", "belady"):
        loads = [tally.loads for tally in serve(lookups, [2, 3, 4, 5, 6], policy_for(name, lookups))]
        assert loads == sorted(loads, reverse=True)


@given(traces())
def test_where_everything_fits_only_first_uses_miss(trace: Trace) -> None:
    lookups = Lookups.of(trace)
    used = set(lookups.keys.ravel().tolist()) - {lookups.nowhere}
    for name in ("lru", "random", "belady"):
        [tally] = serve(lookups, [6], policy_for(name, lookups))
        assert tally.loads == len(used)


def test_the_slots_of_a_capacity() -> None:
    shape = RoutingShape(2, 100, 4)
    assert [slots_for(share, shape) for share in (0.01, 0.29, 0.4, 1.0)] == [4, 29, 40, 100]
    assert [slots_for(share, RoutingShape(24, 32, 4)) for share in (0.2, 0.4, 0.6, 0.8)] == [6, 12, 19, 25]
    with pytest.raises(UsageError, match="above 0 and at most 100 %"):
        slots_for(1.2, shape)
