"""Output lengths by task."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.errors import UsageError
from emoe.routing.trace import Trace
from emoe.tasks.keywords import OTHER
from emoe.tasks.lengths import LEVELS, Lengths, lengths_by_task

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


def test_of_a_trace_are_the_decoded_tokens_of_each_prompt() -> None:
    decoded = [2, 4, 0, 6]
    phase = np.concatenate([[0, 0, 0] + [1] * n for n in decoded]).astype(np.uint8)
    trace = Trace(
        experts=np.zeros((len(phase), 1, 1), np.uint8),
        phase=phase,
        step=np.arange(len(phase)),
        offsets=np.cumsum([0] + [3 + n for n in decoded]),
        task=np.array([0, 0, 1, -1], np.int32),
        tasks=("code", "never decoded"),
        layers=np.array([0], np.int32),
        num_experts=2,
        prompts=({},) * 4,
    )
    lengths = lengths_by_task(trace)
    assert {task: each.mean for task, each in lengths.items()} == {"code": 3.0, OTHER: 4.0}
