"""When a prediction is due."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.errors import UsageError
from emoe.prediction.protocol import RoutingShape
from emoe.prediction.schedule import DEFAULT_PROMPTS, Adaptive, Every, RecentShares, drift, make_schedule
from tests.prediction.histories import Array, random_routes

SHAPE = RoutingShape(3, 8, 2)


def some_shares(seed: int) -> Array:
    return SHAPE.normalised(np.random.default_rng(seed).random((3, 8)) ** 4)


@given(p=st.integers(0, 90), prompts=st.integers(1, 200))
def test_every_is_due_once_in_p_prompts(p: int, prompts: int) -> None:
    schedule, predicted, due = Every(p), None, []
    for prompt in range(prompts):
        if schedule.due(prompt, None, predicted):
            due.append(prompt)
            predicted = SHAPE.uniform()
    assert due == list(range(0, prompts, max(p, 1)))


def test_a_missing_prediction_is_always_due() -> None:
    assert Every(40).due(7, None, None)
    assert Adaptive(1.0).due(7, None, None)
    assert not Every(40).due(7, None, SHAPE.uniform())


@given(a=st.integers(0, 999), b=st.integers(0, 999), scale=st.floats(0.1, 9))
def test_drift_is_a_distance_of_distributions(a: int, b: int, scale: float) -> None:
    one, other = some_shares(a), some_shares(b)
    assert drift(one, one) == 0
    assert 0 <= drift(one, other) <= 1
    assert drift(one, other) == pytest.approx(drift(other, one))
    assert drift(one * scale, other) == pytest.approx(drift(one, other))
    literal = [
        sum(max(p - q, 0.0) for p, q in zip(x / x.sum(), y / y.sum(), strict=True))
        for x, y in zip(one, other, strict=True)
    ]
    assert drift(one, other) == pytest.approx(np.mean(literal))


def test_drift_of_strangers_is_one_and_unseen_layers_do_not_count() -> None:
    one, other = np.zeros((2, 4)), np.zeros((2, 4))
    one[:, 0], other[:, 1] = 2, 2
    assert drift(one, other) == 1
    one[1] = 0
    other[0] = [2, 0, 0, 0]
    assert drift(one, other) == 0
    assert drift(np.zeros((2, 4)), other) == 0
    other[0] = [0, 0, 0, 2]
    assert Adaptive(0.5).due(3, one, other), "of layers that were seen"
    assert not Adaptive(0.5).due(3, np.zeros((2, 4)), other)
    assert Adaptive().horizon == Every().horizon == DEFAULT_PROMPTS


@given(seed=st.integers(0, 999), low=st.floats(0, 1), high=st.floats(0, 1))
def test_a_higher_threshold_asks_no_more_often(seed: int, low: float, high: float) -> None:
    low, high = sorted((low, high))
    observed, predicted = some_shares(seed), some_shares(seed + 1)
    assert Adaptive(low).due(1, observed, predicted) >= Adaptive(high).due(1, observed, predicted)
    assert not Adaptive(low).due(1, None, predicted)


def test_adaptive_notices_another_task_and_rests_once_it_is_predicted() -> None:
    schedule, one, other = Adaptive(0.3), some_shares(0), some_shares(1)
    assert drift(one, other) > 0.4
    assert schedule.due(1, other, one)
    assert not schedule.due(2, other, other)


@given(seed=st.integers(0, 99), pieces=st.lists(st.integers(0, 30), max_size=12), window=st.integers(2, 40))
def test_recent_shares_are_those_of_the_last_tokens(seed: int, pieces: list[int], window: int) -> None:
    rng, recent, seen = np.random.default_rng(seed), RecentShares(SHAPE, window), np.zeros((0, 3, 2), dtype=np.uint8)
    for tokens in pieces:
        routes = random_routes(rng, SHAPE, tokens)
        recent.observe(routes)
        seen = np.concatenate([seen, routes])
        shares = recent.shares()
        assert (shares is None) == (len(seen) < window // 2)
        if shares is not None:
            np.testing.assert_allclose(shares.sum(axis=1), 2)
            fits = [
                count
                for count in range(window // 2, min(len(seen), window) + 1)
                if np.allclose(shares, SHAPE.normalised(SHAPE.counts(seen[-count:]).astype(float)))
            ]
            assert fits, "they are the shares of the last tokens, from half a window to a whole one"
    recent.clear()
    assert recent.shares() is None


def test_recent_shares_leave_out_what_was_not_computed() -> None:
    recent = RecentShares(SHAPE, 4)
    routes = np.full((2, 3, 2), 255, dtype=np.uint8)
    routes[:, 0] = [1, 2]
    recent.observe(routes)
    shares = recent.shares()
    assert shares is not None
    assert shares[0].tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    assert not shares[1:].any()


def test_schedules_by_name() -> None:
    every, usual, exact = make_schedule(40), make_schedule("adaptive"), make_schedule("adaptive:0.25")
    assert isinstance(every, Every) and every.prompts == 40
    assert isinstance(make_schedule("0"), Every)
    assert isinstance(usual, Adaptive) and isinstance(exact, Adaptive) and exact.threshold == 0.25
    for wrong in ("often", "adaptive:x", "3:4", "", "1.5"):
        with pytest.raises(UsageError, match="no schedule is called"):
            make_schedule(wrong)
    with pytest.raises(UsageError, match="give 0 or more"):
        make_schedule(-1)
    with pytest.raises(UsageError, match="from 0 to 1"):
        make_schedule("adaptive:1.5")
    with pytest.raises(UsageError, match="at least 2"):
        RecentShares(SHAPE, 1)
