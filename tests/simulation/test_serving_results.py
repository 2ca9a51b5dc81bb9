"""Latencies and targets of simulated requests, worked out by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.simulation.serving_results import Served, ServingResults, Spread
from emoe.simulation.serving_traffic import Call


def results(*rows: tuple[Call, Served], seconds: float = 10.0) -> ServingResults:
    calls, served = zip(*rows, strict=True)
    return ServingResults(
        scheduler="fifo",
        calls=calls,
        served=served,
        seconds=seconds,
        busy_s=4.0,
        wait_s=1.0,
        steps=7,
        loads=3,
        costs={"token_s": 0.5},
    )


def call(at_s: float, tokens: int, task: str = "a", **targets: Any) -> Call:
    return Call(at_s=at_s, input_tokens=20, output_tokens=tokens, task=task, label=None, expected_tokens=8.0, **targets)


def test_times_of_one_request() -> None:
    found = results((call(1.0, 5), Served(admitted_s=1.5, first_token_s=3.0, ended_s=7.0)))
    assert (found.ttft_s(0), found.tpot_s(0), found.latency_s(0)) == (2.0, 1.0, 6.0)
    summary = found.summary()
    assert (summary.queue.mean, summary.ttft.p50, summary.tpot.p99, summary.latency.mean) == (0.5, 2.0, 1.0, 6.0)
    assert (summary.output_tokens, summary.tokens_per_s) == (5, 0.5)


def test_one_token_has_no_time_per_later_token_and_keeps_that_target() -> None:
    found = results((call(0.0, 1, tpot_slo_s=1e-9), Served(0.0, 2.0, 2.0)))
    assert found.tpot_s(0) is None
    assert found.met(0)
    assert math.isnan(found.summary().tpot.mean)
    assert found.as_dict()["tpot_s"] == {"mean": None, "p50": None, "p99": None}


@pytest.mark.parametrize(
    ("ttft", "tpot", "met"),
    [
        (None, None, True),
        (2.0, 1.0, True),
        (1.99, 1.0, False),
        (2.0, 0.99, False),
        (None, 0.99, False),
        (1.99, None, False),
        (2.0, None, True),
        (None, 1.0, True),
    ],
)
def test_a_request_meets_all_the_targets_it_has(ttft: float | None, tpot: float | None, met: bool) -> None:
    found = results((call(1.0, 5, ttft_slo_s=ttft, tpot_slo_s=tpot), Served(1.0, 3.0, 7.0)))
    assert found.met(0) is met
    assert found.summary().met == met
    assert found.summary().goodput == met / 10.0


def test_groups_are_by_task_in_order_and_the_whole_is_their_sum() -> None:
    rows = [(call(n * 1.0, 2 + n, "ba"[n % 2]), Served(n * 1.0, n + 1.0, n + 4.0, preemptions=n)) for n in range(3)]
    found = results(*rows)
    by_task = found.by_task()
    assert list(by_task) == ["a", "b"]
    assert (by_task["a"].requests, by_task["b"].requests) == (1, 2)
    assert by_task["b"].output_tokens == 2 + 4
    values = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert values["preemptions"] == 3
    assert (values["requests"], values["met_share"], values["load_wait_s"], values["busy_s"]) == (3, 1.0, 1.0, 4.0)
    assert values["tasks"]["b"] == by_task["b"].as_dict()
    assert found.summary([]).as_dict()["met_share"] is None


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40))
def test_a_spread_is_numpys(values: list[float]) -> None:
    found = Spread.of(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert (found.p50, found.p99) == pytest.approx((np.median(values), np.quantile(values, 0.99)))
    assert min(values) <= found.p50 <= found.p99 <= max(values)
