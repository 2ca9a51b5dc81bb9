"""The measure behind the paper's Table 2 against a literal version."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.prediction.protocol import RoutingShape
from emoe.prediction.scoring import BOUND, Score, measure, sides
from tests.prediction.histories import random_routes, routes_by_task, trace_of

SHAPE = RoutingShape(2, 5, 2)


@given(seed=st.integers(0, 999), prompts=st.integers(1, 5))
def test_figures_against_a_literal_version(seed: int, prompts: int) -> None:
    rng, score = np.random.default_rng(seed), Score(SHAPE)
    predicted = [rng.random((2, 5)) for _ in range(prompts)]
    counts = [rng.integers(1, 9, (2, 5)) for _ in range(prompts)]
    for shares, count in zip(predicted, counts, strict=True):
        score.add(shares, count)
    found = score.figures()

    def best(row: Any) -> set[int]:
        return set(sorted(range(5), key=lambda e: (-row[e], e))[:2])

    pairs = [
        [(best(p), best(c)) for p, c in zip(shares, count, strict=True)]
        for shares, count in zip(predicted, counts, strict=True)
    ]
    assert found["accuracy"] == pytest.approx(np.mean([[len(p & t) / 2 for p, t in one] for one in pairs]))
    figures = []
    for layer in range(2):
        for expert in range(5):
            said = [expert in one[layer][0] for one in pairs]
            true = [expert in one[layer][1] for one in pairs]
            both = sum(a and b for a, b in zip(said, true, strict=True))
            if sum(said) + sum(true):
                precision = both / sum(said) if sum(said) else 0.0
                recall = both / sum(true) if sum(true) else 0.0
                f1 = 2 * precision * recall / (precision + recall) if both else 0.0
                figures.append((precision, recall, f1))
    assert (found["precision"], found["recall"], found["f1"]) == pytest.approx(tuple(np.mean(figures, axis=0)))
    # 40 % of 5 experts are 2, as many as a token has: what was named is what is resident.
    hits = sum(c[e] for p, n in zip(predicted, counts, strict=True) for r, c in zip(p, n, strict=True) for e in best(r))
    assert found["hit_at_40"] == pytest.approx(hits / sum(int(count.sum()) for count in counts))


def test_a_half_is_learned_and_the_other_scored() -> None:
    rng = np.random.default_rng(0)
    trace = trace_of(SHAPE, [random_routes(rng, SHAPE, i + 1) for i in range(9)], [None] * 9)
    learned, scored = sides(trace, None, 0, False)
    lengths = [*np.diff(learned.offsets), *np.diff(scored.offsets)]
    assert sorted(lengths) == list(range(1, 10)) and len(np.diff(learned.offsets)) == 4
    assert lengths != sorted(lengths)
    for one in sides(trace, None, 0, True):
        assert (np.diff(np.diff(one.offsets)) > 0).all()
    history, scored = sides(trace, trace.select([0, 1]), 0, False)
    assert (history.num_prompts, scored.num_prompts) == (2, 9)


def test_a_predictor_is_asked_before_it_sees_the_prompt() -> None:
    """Prompts of a task that was never seen: only the bound, and after some tokens the previous prompt, know them."""
    rng, shape = np.random.default_rng(0), RoutingShape(2, 8, 2)
    history = trace_of(shape, [routes_by_task(rng, shape, 30, 0) for _ in range(4)], ["a"] * 4)
    scored = trace_of(shape, [routes_by_task(rng, shape, 30, 1)], ["b"])
    previous = measure("previous-prompt", history, scored, 0, 10)
    assert previous["boundary"]["accuracy"] < 0.3
    assert previous["within"]["accuracy"] == 1
    bound = measure(BOUND, history, scored, 0, 0)
    assert bound["boundary"]["accuracy"] == 1 and "within" not in bound
