"""One scorer at work, against scores made anew for every eviction."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe.prediction.live import LiveScored, LiveScores
from emoe.prediction.protocol import Array, RoutingShape
from emoe.prediction.registry import CONTESTED
from emoe.residency.contest import RECENCY, SCORES, Contest
from emoe.residency.eviction import LeastStale, Now, Uses

SHAPE = RoutingShape(layers=4, experts=6, top_k=2)
BANK = [1, 3]


@dataclass
class Told:
    """Scores by the tokens so far and the prompts begun; remembers how often it was asked."""

    name: str = "told"
    total: Array = field(default_factory=lambda: np.zeros((SHAPE.layers, SHAPE.experts), dtype=np.float32))
    tasks: list[str | None] = field(default_factory=list)
    asked: int = 0

    def begin_prompt(self, task: str | None) -> None:
        self.tasks.append(task)

    def observe(self, routes: Array, weights: Array | None = None, token_ids: Array | None = None) -> None:
        assert weights is not None and weights.dtype.kind == "f" and token_ids is not None and token_ids.ndim == 1
        self.total = self.total + SHAPE.counts(routes)

    def now(self) -> Array:
        turned: Array = np.roll(self.total, len(self.tasks), axis=1)
        return turned

    def scores(self) -> Array:
        self.asked += 1
        return self.now()


@dataclass
class ByLayer(Told):
    """The same, moved by what the running token chose up to the layer."""

    def at(self, rank: int, routes: Array) -> Array:
        chosen = routes[: rank + 1]
        assert (chosen[chosen < SHAPE.experts] >= 0).all()
        known = [int(each) for each in chosen.ravel() if each < SHAPE.experts]
        moved: Array = np.roll(self.now()[rank], sum(known)) + len(known) * np.arange(SHAPE.experts, dtype=np.float32)
        return moved

    def scores_at(self, rank: int, routes: Array) -> Array:
        assert (routes[rank + 1 :] >= SHAPE.experts).all()
        return self.at(rank, routes)

    def scores_of(self, routes: Array, weights: Array | None = None, token_ids: Array | None = None) -> Array:
        raise AssertionError("nobody has many tokens at once here")


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([None, [2, 3], [0, 0]]), st.booleans())
def test_evictions_go_by_what_the_scorer_says_now(
    seed: int, by_layer: bool, quotas: list[int] | None, sleeps: bool
) -> None:
    """Of the running layer by its own routes, of others by what was observed; by recency while that loads less."""
    rng, draw = np.random.default_rng(seed), random.Random(seed)
    contested = quotas is not None
    name = min(CONTESTED) if contested else "told"
    scorer = ByLayer(name) if by_layer else Told(name)
    live = LiveScores(scorer, SHAPE)
    sizes = [SHAPE.experts] * 2 if contested else [SHAPE.experts, SHAPE.experts - 1]
    rule = LiveScored(live, BANK, sizes, quotas or [2, 3])
    contest = Contest([2, 3], SHAPE.experts) if quotas == [2, 3] else None
    assert (rule.contest is not None) == (contest is not None), "a shared bank has no contest"
    keys = [(layer, expert) for layer, size in enumerate(sizes) for expert in range(size)]
    last = np.zeros(len(keys), dtype=np.int64)

    def check(layer: int, values: dict[int, Array]) -> None:
        asked = np.sort(rng.permutation(len(keys))[: draw.randint(1, len(keys))])
        past = Uses(last[asked], last[asked] // 2, last[asked], np.array([keys[i][0] for i in asked]), asked)
        now = Now(tick, tick, layer, len(BANK))
        order = np.argsort(rule.score(past, now), kind="stable").tolist()
        if not live.active:
            expected = np.argsort(LeastStale().score(past, now), kind="stable").tolist()
        elif contest is not None and contest.lead == RECENCY:
            expected = np.argsort(past.last_tick, kind="stable").tolist()
        else:
            worth = [values[keys[i][0]][keys[i][1]] for i in asked]
            expected = sorted(range(len(asked)), key=lambda i: (worth[i], past.last_tick[i]))
        assert order == expected, (tick, layer)

    prompts = 0
    for tick in range(12):
        if tick == 0 or draw.random() < 0.3:
            live.begin_prompt("task")
            prompts += 1
        if sleeps and draw.random() < 0.2:
            live.active = not live.active
        tokens = draw.choice([1, 1, 1, 3])
        routes = np.argsort(rng.random((tokens, SHAPE.layers, SHAPE.experts)), axis=2)[:, :, : SHAPE.top_k]
        routes[:, BANK[1]] %= sizes[1]
        single = tokens == 1 and live.active
        live.begin_pass(tokens)
        if contest is not None and rule.contest is not None and single:
            contest.begin_token()
            contest.lead = rule.contest.lead = draw.choice([SCORES, RECENCY])
        so_far = np.full((SHAPE.layers, SHAPE.top_k), 255)
        for rank in range(SHAPE.layers):
            live.route(rank, routes[0, rank])
            so_far[rank] = routes[0, rank]
            if rank not in BANK:
                continue
            layer = BANK.index(rank)
            own = scorer.at(rank, so_far) if isinstance(scorer, ByLayer) and single else scorer.now()[rank]
            if contest is not None and single:
                used = np.zeros((1, SHAPE.experts), dtype=bool)
                used[0, routes[0, rank]] = True
                contest.visit(np.array([layer]), used, lambda own=own: own[None])  # type: ignore[misc]
            last[[keys.index((layer, int(expert))) for expert in routes[0, rank]]] = tick
            check(layer, {each: scorer.now()[BANK[each]] for each in range(len(BANK))} | {layer: own})
        if contest is not None and rule.contest is not None:
            assert rule.contest.made == contest.made
            assert live.spared_loads() == contest.made[RECENCY] - contest.made[SCORES]
        if draw.random() < 0.2:
            continue  # the pass has failed: nobody hears of its routes
        told = scorer.total.sum()
        live.observe(routes, routes / 2, routes[:, 0, 0])
        assert scorer.total.sum() == told + live.active * routes.size
        if not single:
            check(1, {each: scorer.now()[BANK[each]] for each in range(len(BANK))})
    assert scorer.tasks == ["task"] * prompts
    assert scorer.asked <= live.version


def test_its_time_is_what_telling_and_asking_took(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("emoe.prediction.live.time.perf_counter", lambda: next(ticks))
    live = LiveScores(Told(), SHAPE)
    assert live.spent_s == 0
    routes = np.zeros((1, SHAPE.layers, SHAPE.top_k), dtype=np.uint8)
    live.begin_pass(1)
    live.of_layer(2)
    live.observe(routes, routes / 2, routes[:, 0, 0])
    live.observe(routes[:0], routes[:0] / 2, routes[:0, 0, 0])
    assert live.spent_s == 2, "nothing is told of a pass without tokens"
