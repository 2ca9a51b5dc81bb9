"""Sensitivity: the threshold is a dial over stored curves."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.errors import UsageError
from emoe.tasks.sensitivity import Sensitivity

CURVES = st.lists(st.floats(0, 1), min_size=4, max_size=4).map(np.array)


def made(curve: np.ndarray) -> Sensitivity:
    return Sensitivity("agreement", {"agreement": {"qa": curve}}, len(curve))


@given(CURVES, st.floats(0, 1.1))
def test_a_layer_is_insensitive_while_every_prefix_up_to_it_holds(curve: np.ndarray, threshold: float) -> None:
    expected = [not all(x >= threshold for x in curve[: rank + 1]) for rank in range(4)]
    assert made(curve).sensitive("qa", threshold).tolist() == expected


@given(CURVES, st.floats(0, 1), st.floats(0, 1))
def test_a_higher_threshold_makes_no_layer_insensitive(curve: np.ndarray, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert not (made(curve).sensitive("qa", low) & ~made(curve).sensitive("qa", high)).any()


def test_the_default_threshold_is_the_papers() -> None:
    assert made(np.array([0.9, 0.85, 0.84, 0.99])).sensitive("qa").tolist() == [False, False, True, True]


def test_unknown_tasks_are_sensitive_everywhere() -> None:
    known = made(np.ones(3))
    assert known.sensitive("poetry").all()
    assert known.sensitive(None).all()
    assert Sensitivity.unknown(3).sensitive("qa").all()


def test_another_measure_can_be_asked_for_by_name() -> None:
    both = Sensitivity("similarity", {"similarity": {"qa": np.ones(2)}, "agreement": {"qa": np.zeros(2)}}, 2)
    assert not both.sensitive("qa").any()
    assert both.sensitive("qa", measure="agreement").all()
    with pytest.raises(UsageError, match="'perplexity' was not measured: similarity, agreement were"):
        both.sensitive("qa", measure="perplexity")


def test_curves_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="must be 3 numbers"):
        Sensitivity("agreement", {"agreement": {"qa": np.ones(2)}}, 3)
    with pytest.raises(UsageError, match="must be 1 numbers"):
        Sensitivity("agreement", {"agreement": {"qa": np.array([np.nan])}}, 1)
    with pytest.raises(UsageError, match="'similarity' was not measured"):
        Sensitivity("similarity", {"agreement": {"qa": np.ones(2)}}, 2)


@given(CURVES)
def test_json_and_back(curve: np.ndarray) -> None:
    first = Sensitivity("agreement", {"agreement": {"qa": curve}}, len(curve), 0.7, {"qa": 12})
    again = Sensitivity.from_json(json.loads(json.dumps(first.as_json())), 4)
    assert (again.measure, again.threshold, again.prompts) == ("agreement", 0.7, {"qa": 12})
    assert again.curves["agreement"]["qa"] == pytest.approx(curve, abs=1e-5)
