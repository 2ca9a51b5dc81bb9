"""The measure of Figures 7 to 9 and what it is compared with."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.bench.reproduce import correlation as of
from emoe.prediction.protocol import Array

SEEDS = st.integers(0, 9999)


@given(SEEDS)
def test_r_and_c_against_numpy(seed: int) -> None:
    x, y = np.random.default_rng(seed).integers(0, 9, (2, 3, 6)).astype(np.float64)
    for a, b, r, c in zip(x, y, of.correlation(x, y), of.uncentred(x, y), strict=True):
        if a.std() and b.std():
            assert r == pytest.approx(np.corrcoef(a, b)[0, 1])
        else:
            assert np.isnan(r)
        if a.any() and b.any():
            assert c == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert of.correlation(x, 3 * x + 1)[0] == pytest.approx(1) or not x[0].std()


def test_prompts_apart_are_compared_with_the_one_so_much_later() -> None:
    rng = np.random.default_rng(0)
    kinds = rng.permutation(np.eye(8) * 20)[:3]
    counts = np.array([kinds[i % 3] for i in range(9)])[:, None, :]
    near = [of.mean(of.apart(counts, distance)) for distance in (1, 2, 3, 6)]
    assert near[2] == near[3] == pytest.approx(1)
    assert max(near[:2]) < 0


def test_what_is_drawn_has_the_lengths_and_popularity_of_the_prompts() -> None:
    rng = np.random.default_rng(1)
    counts = rng.multinomial(rng.integers(200, 400, (40, 2)), [0.5, 0.3, 0.1, 0.1, 0.0])
    for made in (of.independent(counts, rng), of.without_preference(counts, rng)):
        assert (made.sum(axis=2) == counts.sum(axis=2)).all()
    assert of.mean(of.apart(of.independent(counts, rng), 1)) > 0.9
    assert (of.independent(counts, rng)[:, :, 4] == 0).all()
    # Means not subtracted, even routing without preference looks alike: that is why r decides.
    plain = of.without_preference(counts, rng)
    assert abs(of.mean(of.apart(plain, 1))) < 0.2 < 0.9 < of.mean(of.apart(plain, 1, of.uncentred))


def test_less_popularity_leaves_what_a_prompt_prefers() -> None:
    counts = np.array([[[9, 1, 0]], [[9, 0, 1]], [[9, 1, 0]], [[9, 0, 1]]])
    special = of.beyond_popularity(counts)
    assert special.sum(axis=0) == pytest.approx(np.zeros((1, 3)))
    assert of.mean(of.apart(counts, 1)) > 0.9
    assert of.apart(special, 1)[:, 0] == pytest.approx([-1] * 3)


@given(SEEDS)
def test_renaming_is_one_to_one_and_finds_a_permutation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.random((30, 6))
    secret = rng.permutation(6)
    assert (of.renaming(x, x[:, np.argsort(secret)]) == secret).all()
    y = rng.random((5, 4))
    found = of.renaming(x[:5, :4], y)
    assert sorted(found) == [0, 1, 2, 3]

    def quality(names: object) -> float:
        return of.mean(of.correlation(x[:5, :4], y[:, np.array(names)]))

    best = max(quality(names) for names in itertools.permutations(range(4)))
    # No swap of two helps; that is nearly the best.
    assert quality(found) >= best - 0.1
    swapped = [quality(_swap(found, a, b)) for a, b in itertools.combinations(range(4), 2)]
    assert quality(found) >= max(swapped) - 1e-9


def _swap(names: Array, a: int, b: int) -> Array:
    other = names.copy()
    other[[a, b]] = other[[b, a]]
    return other


def test_means_and_errors_leave_out_what_is_no_number() -> None:
    values = np.array([[1.0, np.nan], [3.0, 5.0]])
    assert of.mean(values) == 3
    assert of.standard_error(values) == pytest.approx(np.std([1, 4], ddof=1) / np.sqrt(2))
    assert np.isnan(of.mean(np.array([np.nan]))) and np.isnan(of.standard_error(np.zeros((1, 2))))
    assert [of.level(*pair, 0.36) for pair in ((0.4, 0.2), (0.1, 0.5), (0.1, 0.2))] == [
        "holds",
        "partly",
        "does not hold",
    ]
