"""The regression behind the cost model: against plain least squares, and what keeps it from going astray."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from emoe.scheduling.fit import MOST, OUTLIER, PRIOR_WEIGHT, Fit

PRIOR, UNITS = (0.02, 0.5), (0.01, 1.0)


def observations(seed: int, count: int, true: tuple[float, float] = (0.03, 0.7)) -> list[tuple[list[float], float]]:
    rng = np.random.default_rng(seed)
    amounts = [[1.0, float(rng.integers(0, 9))] for _ in range(count)]
    return [(each, float(np.dot(each, true))) for each in amounts]


def test_it_starts_at_the_prior() -> None:
    assert Fit(PRIOR, UNITS, 0.99).values == pytest.approx(PRIOR)
    assert Fit([0.0, 0.0], [0.0, 0.0], 0.99).values == [0.0, 0.0]  # units of nothing divide nothing


@given(st.integers(0, 99), st.integers(1, 12))
@settings(max_examples=12)
def test_it_is_ridge_regression_on_steps_of_equal_weight(seed: int, count: int) -> None:
    """Without outliers: rows over their size in units, older ones fading, a ridge towards the prior."""
    forget, fit = 0.9, Fit(PRIOR, UNITS, 0.9)
    rows: list[NDArray[np.float64]] = []
    targets: list[float] = []
    weights: list[float] = []
    for amounts, seconds in observations(seed, count, true=(0.02, 0.5)):  # as expected, so nothing is an outlier
        fit.observe(amounts, seconds)
        row = np.array(amounts) * UNITS
        rows.append(row / row.sum())
        targets.append(seconds / row.sum())
        weights = [weight * forget for weight in weights] + [1.0]
    a, b, w = np.array(rows), np.array(targets), np.array(weights)
    start = np.array(PRIOR) / UNITS
    left = (a * w[:, None]).T @ a + PRIOR_WEIGHT * np.eye(2)
    found = np.linalg.solve(left, (a * w[:, None]).T @ b + PRIOR_WEIGHT * start)
    assert fit.values == pytest.approx((found * UNITS).tolist(), rel=1e-9)


@pytest.mark.parametrize("seed", [0, 1])
def test_it_finds_what_made_the_times(seed: int) -> None:
    fit = Fit(PRIOR, UNITS, 0.995)
    for amounts, seconds in observations(seed, 300):
        fit.observe(amounts, seconds)
    assert fit.values == pytest.approx([0.03, 0.7], rel=0.01)


def test_the_scale_of_time_is_no_matter() -> None:
    slow, fast = Fit(PRIOR, UNITS, 0.99), Fit([x / 1e3 for x in PRIOR], [x / 1e3 for x in UNITS], 0.99)
    for amounts, seconds in observations(3, 40):
        slow.observe(amounts, seconds)
        fast.observe(amounts, seconds / 1e3)
    assert [x * 1e3 for x in fast.values] == pytest.approx(slow.values, rel=1e-9)


def test_one_outlier_counts_for_no_more_than_a_few_times_the_usual() -> None:
    fit = Fit(PRIOR, UNITS, 0.99)
    for amounts, seconds in observations(1, 200):
        fit.observe(amounts, seconds)
    before = np.array(fit.values)
    fit.observe([1.0, 4.0], 1e6)
    after = np.array(fit.values)
    usual = 1e-3  # the least that the usual size falls to
    assert (np.abs(after / before - 1) <= 2 * OUTLIER * usual).all()


def test_a_lasting_change_is_believed() -> None:
    fit = Fit(PRIOR, UNITS, 0.98)
    for amounts, seconds in observations(1, 200) + [(a, 5 * s) for a, s in observations(2, 600)]:
        fit.observe(amounts, seconds)
    assert fit.values == pytest.approx([0.15, 3.5], rel=0.1)


def test_no_coefficient_is_negative_or_leaves_its_unit_by_far() -> None:
    falling = Fit(PRIOR, UNITS, 0.99)
    for n in range(200):  # more takes less
        falling.observe([1.0, float(n % 5)], 1.0 - 0.1 * (n % 5))
    assert falling.values[1] == 0.0
    assert 0.6 <= falling.values[0] <= 1.0
    huge = Fit([1.0], [1.0], 0.99)
    for _ in range(3000):
        huge.observe([1.0], 1e9)
    assert huge.values == [MOST]
