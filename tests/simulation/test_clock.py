"""The virtual clock: demand loads wait on the link, prefetches travel while layers compute."""

from __future__ import annotations

import numpy as np
import pytest

from emoe.errors import UsageError
from emoe.simulation.banks import Prefetch, Tally
from emoe.simulation.clock import Latency, Link, token_seconds
from emoe.simulation.lookups import Lookups
from tests.simulation.stand_ins import make_trace

LOAD_S = 2.0


def seconds(
    routes: list[list[list[int]]], missed: list[list[int]], fetched: dict[int, list[int]], layer_s: float
) -> list[float]:
    lookups = Lookups.of(make_trace(routes, [len(routes)], 4))
    tally = Tally(2, np.array(missed, dtype=np.uint16), [Prefetch(t, np.array(k)) for t, k in fetched.items()])
    return [round(each, 9) for each in token_seconds(lookups, tally, Link(5.0, layer_s), 10).tolist()]


def test_without_prefetches_loads_and_layers_follow_each_other() -> None:
    routes = [[[0], [0]], [[1], [1]]]
    assert seconds(routes, [[1, 1], [1, 0]], {}, 0.5) == [2 * LOAD_S + 1.0, LOAD_S + 1.0]


def test_a_prefetch_that_comes_while_layers_compute_costs_nothing() -> None:
    # Key 2 is on the link for two layers of one second each; the second token uses it.
    routes = [[[0], [0]], [[2], [0]]]
    assert seconds(routes, [[0, 0], [0, 0]], {0: [2]}, 1.0) == [2.0, 2.0]


def test_a_prefetch_that_is_needed_before_it_has_come_is_waited_for() -> None:
    # One second of its two passed while the first layer computed.
    routes = [[[0], [2]]]
    assert seconds(routes, [[0, 0]], {0: [4 + 2]}, 1.0) == [1.0 + 1.0 + 1.0]
    # Another before it in the queue: that one arrives first, then this one is loaded at once.
    assert seconds(routes, [[0, 0]], {0: [1, 4 + 2]}, 1.0) == [1.0 + 1.0 + LOAD_S + 1.0]


def test_a_demand_load_waits_for_the_one_under_way_and_goes_before_the_rest() -> None:
    # Keys 1 and 2 are queued. After a layer of a second the second layer misses: 1 s left of key 1, then its own load.
    routes = [[[0], [0]], [[0], [0]]]
    first = 1.0 + 1.0 + LOAD_S + 1.0
    assert seconds(routes, [[0, 1], [0, 0]], {0: [1, 2]}, 1.0) == [first, 2.0]


def test_a_second_plan_joins_the_queue_of_the_first() -> None:
    routes = [[[0], [0]]] * 3
    # Three loads of 2 s need three tokens of 2 s; the last token asks for what is under way.
    assert seconds([*routes, [[3], [0]]], [[0, 0]] * 4, {0: [1, 2], 1: [3]}, 1.0) == [2.0] * 4
    assert seconds([*routes[:2], [[3], [0]]], [[0, 0]] * 3, {0: [1, 2], 1: [3]}, 1.0) == [2.0, 2.0, LOAD_S + 2.0]


def test_latency_is_mean_and_percentiles() -> None:
    found = Latency.of(np.arange(1, 101, dtype=float))
    assert (found.mean_s, found.p50_s) == (50.5, 50.5) and found.p95_s == pytest.approx(95.05)
    with pytest.raises(UsageError, match="bandwidth above 0"):
        Link(0.0)
