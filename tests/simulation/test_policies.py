"""Scorers and predictors as policies: when they are told what, and what comes of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.errors import UsageError
from emoe.prediction.protocol import Array, RoutingShape
from emoe.prediction.registry import PREDICTORS, SCORERS
from emoe.routing.counts import PromptCounts
from emoe.routing.trace import Trace
from emoe.simulation.banks import serve
from emoe.simulation.generate import random_trace
from emoe.simulation.learning import Past
from emoe.simulation.lookups import Lookups
from emoe.simulation.policies import ByScore, Settings, make_policy, names, scores_before
from emoe.simulation.prompts import plan_prompts
from emoe.simulation.runs import Task, simulate
from tests.simulation.stand_ins import (
    BatchScorer,
    CountPredictor,
    RecentScorer,
    TrainedPredictor,
    make_trace,
    traces,
)

SHAPE = RoutingShape(3, 6, 2)
MADE: list[Any] = []


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(kind: type[Any]) -> Any:
        def make(shape: RoutingShape) -> Any:
            MADE.append(kind(shape))
            return MADE[-1]

        return make

    MADE.clear()
    for scorer in (RecentScorer, BatchScorer):
        monkeypatch.setitem(SCORERS, scorer.name, kept(scorer))
    for predictor in (CountPredictor, TrainedPredictor):
        monkeypatch.setitem(PREDICTORS, predictor.name, kept(predictor))


@given(traces())
def test_scores_come_from_before_the_token_and_a_batch_gives_the_same(trace: Trace) -> None:
    one, many = RecentScorer(SHAPE), BatchScorer(SHAPE)
    for prompt in range(trace.num_prompts):
        rows = slice(int(trace.offsets[prompt]), int(trace.offsets[prompt + 1]))
        for scorer in (one, many):
            scorer.begin_prompt(None)
        seen = np.copy(one.counts)
        streams = [scores_before(scorer, trace.experts[rows], None, None) for scorer in (one, many)]
        for token, (single, batch) in enumerate(zip(*streams, strict=True)):
            assert np.array_equal(single, seen)
            assert np.array_equal(single, batch)
            seen = seen + SHAPE.counts(trace.experts[rows][token : token + 1])
    assert np.array_equal(one.counts, many.counts)


@given(traces(), st.integers(1, 3))
def test_a_batch_of_scores_changes_no_figure(trace: Trace, lanes: int) -> None:
    lookups = Lookups.of(trace, interleave=lanes)
    one, many = (serve(lookups, [3], make_policy(name, SHAPE, Settings()))[0] for name in ("recent", "recent-batch"))
    assert np.array_equal(one.missed, many.missed)


@given(traces())
def test_each_of_interleaved_sequences_has_a_scorer_that_sees_it_alone(trace: Trace) -> None:
    MADE.clear()
    lookups = Lookups.of(trace, interleave=2)
    serve(lookups, [3], make_policy("recent", SHAPE, Settings()))
    assert len(MADE) == 2
    for lane, scorer in enumerate(MADE):
        mine = [each for each in lookups.sequences if each.lane == lane]
        assert scorer.tasks == [each.task for each in mine]
        expected = np.zeros_like(scorer.counts)
        for i, each in enumerate(mine):
            expected *= np.float32(0.5)
            # The last token of the last sequence is never scored after, so it need not be observed.
            expected += SHAPE.counts(trace.experts[each.rows[:-1] if i == len(mine) - 1 else each.rows])
        assert np.array_equal(scorer.counts, expected.astype(np.float32))


@given(traces())
def test_of_interleaved_sequences_the_mean_of_their_scores_counts(trace: Trace) -> None:
    lookups = Lookups.of(trace, interleave=2)
    policy = make_policy("recent", SHAPE, Settings())
    policy.start(lookups)
    seen = np.zeros((2, 3, 6), dtype=np.float32)
    scored = np.zeros_like(seen)
    done = [0] * len(lookups.sequences)
    for token, number in enumerate(lookups.sequence.tolist()):
        sequence = lookups.sequences[number]
        if not done[number]:
            seen[sequence.lane] *= np.float32(0.5)
        scored[sequence.lane] = seen[sequence.lane]
        row = sequence.rows[done[number]]
        done[number] += 1
        policy.before(token)
        assert isinstance(policy, ByScore)
        assert np.array_equal(policy.rule.values, scored.mean(axis=0).ravel())
        seen[sequence.lane] += SHAPE.counts(trace.experts[row : row + 1])


def by_hand(
    lookups: Lookups, slots: int, p: int, prefetch: bool, learned: Array | None
) -> tuple[list[list[int]], list[list[int]], int]:
    """The planned policy, one layer and one set at a time: (misses [tokens][layers], prefetched keys, wasted)."""
    shape, trace = lookups.shape, lookups.trace
    total = np.zeros((shape.layers, shape.experts)) if learned is None else learned.astype(float)
    held: list[set[int]] = [set() for _ in range(shape.layers)]
    value = np.zeros((shape.layers, shape.experts))
    last = np.full((shape.layers, shape.experts), -1)
    unused: list[set[int]] = [set() for _ in range(shape.layers)]
    running: dict[int, int] = {}
    missed, fetched, wasted, begun = [], [], 0, 0
    for token, number in enumerate(lookups.sequence.tolist()):
        if number == begun:
            begun += 1
            lane = lookups.sequences[number].lane
            if lane in running:
                total += shape.counts(trace.experts[lookups.sequences[running[lane]].rows])
            running[lane] = number
            if number % p == 0 and (number or learned is not None):
                value = shape.normalised(total).astype(np.float32).astype(float)
                exact = shape.normalised(total)
                for layer in range(shape.layers) if prefetch else ():
                    plan = sorted(range(shape.experts), key=lambda e: (-exact[layer, e], e))[:slots]
                    new = [e for e in plan if e not in held[layer]]
                    while len(held[layer]) + len(new) > slots:
                        out = min(held[layer] - set(plan), key=lambda e: (value[layer, e], last[layer, e], e))
                        held[layer].remove(out)
                        wasted += out in unused[layer]
                        unused[layer].discard(out)
                    held[layer] |= set(new)
                    unused[layer] |= set(new)
                    fetched.append([layer * shape.experts + e for e in new])
        row = []
        for layer, keys in enumerate(lookups.keys[token].reshape(shape.layers, -1).tolist()):
            now = {key - layer * shape.experts for key in keys if key != lookups.nowhere}
            last[layer, list(now)] = token
            unused[layer] -= now
            new_keys = now - held[layer]
            row.append(len(new_keys))
            while len(held[layer]) + len(new_keys) > slots:
                out = min(held[layer] - now, key=lambda e: (value[layer, e], last[layer, e], e))
                held[layer].remove(out)
                wasted += out in unused[layer]
                unused[layer].discard(out)
            held[layer] |= new_keys
        missed.append(row)
    return missed, fetched, wasted + sum(map(len, unused))


@given(traces(), st.integers(2, 6), st.integers(1, 3), st.booleans(), st.booleans(), st.integers(1, 2))
def test_a_planned_policy_is_what_it_is_by_hand(
    trace: Trace, slots: int, p: int, prefetch: bool, history: bool, lanes: int
) -> None:
    lookups = Lookups.of(trace, interleave=lanes)
    policy = make_policy("trained", SHAPE, Settings(p, prefetch), Past(trace) if history else None)
    tally = serve(lookups, [2, slots], policy)[1]
    learned = trace.counts().sum(axis=0) if history else None
    missed, fetched, wasted = by_hand(lookups, slots, p, prefetch, learned)
    assert tally.missed.tolist() == missed
    assert [key for each in tally.prefetches for key in each.keys.tolist()] == [key for keys in fetched for key in keys]
    assert tally.wasted == wasted
    assert tally.loads == tally.misses + sum(len(each.keys) for each in tally.prefetches)
    [best] = serve(lookups, [slots], make_policy("belady", SHAPE, Settings()))
    assert tally.loads >= best.loads, "prefetching hides no load"


def test_an_adaptive_plan_comes_when_routing_has_drifted() -> None:
    """Prompts of 300 tokens (a window of shares is 256): two to experts 0 and 1, then two to 4 and 5."""
    routes = np.empty((1200, 3, 2), dtype=int)
    routes[:600], routes[600:] = [0, 1], [4, 5]
    lookups = Lookups.of(make_trace(routes, [300] * 4, 6))
    [tally] = serve(lookups, [2], make_policy("count", SHAPE, Settings("adaptive")))
    # At the second prompt nothing has drifted from what the first one used; at the fourth it has from that.
    assert [each.token for each in tally.prefetches] == [900]
    [tally] = serve(lookups, [2], make_policy("count", SHAPE, Settings("adaptive"), Past(lookups.trace)))
    assert tally.prefetches[0].token == 0
    [tally] = serve(lookups, [2], make_policy("count", SHAPE, Settings(0)))
    assert [each.token for each in tally.prefetches] == [300, 600, 900]


def test_a_history_is_fitted_or_shown() -> None:
    trace = make_trace(np.zeros((4, 3, 1), int), [2, 2], 6, tasks=[0, 1])
    shape = RoutingShape(3, 6, 1)
    past = Past(trace)
    make_policy("trained", shape, Settings(), past)
    make_policy("count", shape, Settings(), past)
    trained, shown = MADE
    assert trained.fits == 1 and not trained.prompts
    assert shown.prompts == ["task 0", "task 1"]
    assert np.array_equal(trained.total, shown.total) and shown.total.sum() == 12
    trained.total += 1  # what it observes later is no part of what others start from
    make_policy("trained", shape, Settings(), past)
    assert MADE[2].fits == 0 and np.array_equal(MADE[2].total, shown.total)
    make_policy("recent", shape, Settings(), past).start(Lookups.of(trace, interleave=2))
    assert [scorer.tasks for scorer in MADE[3:]] == [["task 0", "task 1"]] * 2


def test_an_unknown_policy_is_refused_with_the_choices() -> None:
    with pytest.raises(UsageError, match=r"no policy is called 'fifo': choose one of .*lru.*count.*belady"):
        make_policy("fifo", SHAPE, Settings())
    assert {"lru", "lfu", "least-stale", "random", "recent", "trained", "belady"} <= set(names())
    for wrong in (-1, "weekly", "adaptive:2"):
        with pytest.raises(UsageError):
            Settings(replan_prompts=wrong)


def test_a_network_without_a_history_is_refused_before_anything_runs() -> None:
    trace = random_trace(RoutingShape(2, 6, 2), 50)
    wanted = "emoe-l is a network that has to be trained first: give --history or --split"
    with pytest.raises(UsageError, match=wanted):
        simulate([(trace, None)], Task(["lru", "emoe-l"], [0.5]), report=lambda *_: pytest.fail("it ran"))
    counts = PromptCounts(trace.counts(), trace.task, trace.tasks, trace.top_k)
    with pytest.raises(UsageError, match=wanted):
        plan_prompts([(counts, None)], ["emoe-l"], [0.5], Settings(1), report=lambda *_: pytest.fail("it ran"))
