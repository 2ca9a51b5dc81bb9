"""Output lengths by task."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.errors import UsageError
from emoe.tasks.lengths import LEVELS, Lengths

COUNTS = st.lists(st.integers(0, 500), min_size=1, max_size=40)


@given(COUNTS)
def test_mean_and_quantiles(counts: list[int]) -> None:
    lengths = Lengths.of(counts)
    assert lengths.mean == pytest.approx(sum(counts) / len(counts))
    assert list(lengths.quantiles) == list(LEVELS)
    values = list(lengths.quantiles.values())
    assert values == sorted(values)
    assert values[-1] == max(counts)
    assert lengths.answers == len(counts)


@given(COUNTS, st.integers(0, 600))
def test_what_remains_is_never_less_than_a_token_nor_more_than_the_longest(counts: list[int], generated: int) -> None:
    lengths = Lengths.of(counts)
    left = lengths.remaining(generated)
    if generated == 0:
        assert left == lengths.mean
    elif generated < max(counts):
        longer = [tokens for tokens in lengths.quantiles.values() if tokens > generated]
        assert left == pytest.approx(sum(longer) / len(longer) - generated)
        assert 0 < left <= max(counts) - generated
    else:
        assert left == 1


def test_json_and_back() -> None:
    lengths = Lengths.of([3, 4, 10], cut=1)
    again = Lengths.from_json(json.loads(json.dumps(lengths.as_json())))
    assert again.mean == pytest.approx(lengths.mean, abs=1e-3)
    assert again.quantiles == pytest.approx(lengths.quantiles, abs=1e-3)
    assert again.cut == pytest.approx(1 / 3, abs=1e-3)


def test_no_answer_is_refused() -> None:
    with pytest.raises(UsageError, match="no answer"):
        Lengths.of([])
