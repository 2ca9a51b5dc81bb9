"""Wrong labels leave the traffic as it is, and spoil more as their share grows."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from emoe.prediction.protocol import RoutingShape
from emoe.scheduling.arrivals import poisson_arrivals
from emoe.simulation.serving_traffic import Call, Routes, Targets, make_calls

SHAPE = RoutingShape(layers=2, experts=4, top_k=2)
ROUTES = Routes.drawn(SHAPE, {task: np.full((2, 4), 0.5) for task in "abc"})


def calls(seed: int, wrong: float) -> list[Call]:
    return make_calls(
        poisson_arrivals(1.0, 30, seed), ROUTES, {}, lambda task: Targets(None, None), wrong_labels=wrong, seed=seed
    )


@given(st.integers(0, 1000), st.floats(0, 1), st.floats(0, 1))
def test_only_labels_change_with_the_share(seed: int, one: float, other: float) -> None:
    few, many = (calls(seed, share) for share in sorted((one, other)))
    for a, b in zip(few, many, strict=True):
        plain = [dataclasses.replace(call, label=None, expected_tokens=0.0) for call in (a, b)]
        assert plain[0] == plain[1]
        assert a.label == a.task or a.label == b.label != b.task
    assert all(call.label != call.task for call in calls(seed, 1.0))
