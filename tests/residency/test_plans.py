"""Equation 2 against a slow literal version, and what a plan never does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.errors import UsageError
from emoe.residency.plans import TaskDemand, best_keys, best_keys_of_all, expected_tokens

LAYERS, EXPERTS = 3, 5


@st.composite
def demands(draw: st.DrawFn) -> list[TaskDemand]:
    """Some tasks with running requests; shares are eighths, so that sums are exact and ties happen."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        eighths = st.lists(st.integers(0, 8), min_size=LAYERS * EXPERTS, max_size=LAYERS * EXPERTS)
        sensitive = draw(st.one_of(st.none(), st.lists(st.booleans(), min_size=LAYERS, max_size=LAYERS)))
        found.append(
            TaskDemand(
                input_tokens=draw(st.lists(st.integers(1, 500), max_size=4)),
                output_tokens=draw(st.integers(0, 300)) / 4,
                shares=np.array(draw(eighths)).reshape(LAYERS, EXPERTS) / 8,
                sensitive=None if sensitive is None else np.array(sensitive),
            )
        )
    return found


def literal(demands: list[TaskDemand], layer: int, expert: int) -> float:
    """Equation 2 as it is printed: N_i = (sum_j W_j + T * W_o) * s * f_i, summed over tasks."""
    total = 0.0
    for demand in demands:
        inputs = 0
        for w_j in demand.input_tokens:
            inputs += w_j
        t = len(demand.input_tokens)
        s = 1 if demand.sensitive is None or demand.sensitive[layer] else 0
        total += (inputs + t * demand.output_tokens) * s * float(demand.shares[layer, expert])
    return total


@given(demands(), st.lists(st.integers(0, EXPERTS), min_size=LAYERS, max_size=LAYERS))
def test_the_plan_is_equation_2_and_the_best_of_each_layer(running: list[TaskDemand], quotas: list[int]) -> None:
    tokens = expected_tokens(running)
    plan = best_keys(tokens, quotas)
    for layer in range(LAYERS):
        votes = [literal(running, layer, expert) for expert in range(EXPERTS)]
        assert tokens[layer].tolist() == votes
        ranked = sorted((e for e in range(EXPERTS) if votes[e] > 0), key=lambda e: (-votes[e], e))
        assert plan[layer] == ranked[: quotas[layer]]
        assert len(plan[layer]) <= quotas[layer]


@given(demands(), st.data())
def test_insensitive_tasks_do_not_vote(running: list[TaskDemand], data: st.DataObject) -> None:
    layer = data.draw(st.integers(0, LAYERS - 1))
    mask = np.arange(LAYERS) != layer
    shares = np.full((LAYERS, EXPERTS), 8.0)
    loud = TaskDemand(input_tokens=[10**6], output_tokens=1000, shares=shares, sensitive=mask)
    with_it, without = expected_tokens([*running, loud]), expected_tokens(running)
    assert with_it[layer].tolist() == without[layer].tolist()
    assert (with_it[mask] > without[mask]).all()


def test_nobody_votes_where_every_task_is_insensitive() -> None:
    demand = TaskDemand([10], 5, np.ones((LAYERS, EXPERTS)), np.zeros(LAYERS, dtype=bool))
    assert best_keys(expected_tokens([demand]), [2] * LAYERS) == [[]] * LAYERS


@given(demands(), st.integers(0, LAYERS * EXPERTS))
def test_a_shared_pool_takes_the_keys_with_most_tokens(running: list[TaskDemand], slots: int) -> None:
    tokens = expected_tokens(running)
    plan = best_keys_of_all(tokens, slots)
    kept = [tokens[layer, e] for layer, experts in enumerate(plan) for e in experts]
    assert len(kept) == min(slots, int((tokens > 0).sum()))
    assert sorted(kept, reverse=True) == sorted(tokens.reshape(-1).tolist(), reverse=True)[: len(kept)]


def test_shapes_that_do_not_fit_are_refused() -> None:
    good = np.ones((LAYERS, EXPERTS))
    with pytest.raises(UsageError, match="at least one task"):
        expected_tokens([])
    with pytest.raises(UsageError, match=r"\[3, 4\] do not fit"):
        expected_tokens([TaskDemand([1], 1, good), TaskDemand([1], 1, good[:, 1:])])
    with pytest.raises(UsageError, match="does not fit 3 layers"):
        expected_tokens([TaskDemand([1], 1, good, np.ones(2, dtype=bool))])
    with pytest.raises(UsageError, match="2 quotas do not fit 3 layers"):
        best_keys(good, [1, 1])
