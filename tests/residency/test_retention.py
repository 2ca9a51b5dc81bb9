"""Which experts stay after a prompt."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.prediction.protocol import RoutingShape
from emoe.residency.retention import HALF_LIFE_TOKENS, kept_after
from emoe.simulation import replay
from emoe.simulation.generate import random_trace
from emoe.simulation.missing import after_prompt


@given(
    tokens=st.integers(1, 80),
    experts=st.integers(2, 12),
    slots=st.integers(0, 12),
    seed=st.integers(0, 1000),
)
def test_those_stay_that_were_used_most_and_last(tokens: int, experts: int, slots: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    routes = np.stack([rng.permutation(experts + 1)[:2] for _ in range(tokens)])  # one id is none
    behind = rng.integers(0, 50, tokens)
    kept = kept_after(routes, behind, experts, slots)
    score = [
        sum(0.5 ** (behind[t] / HALF_LIFE_TOKENS) for t in range(tokens) if e in routes[t].tolist())
        for e in range(experts)
    ]
    assert len(kept) == min(slots, sum(value > 0 for value in score))
    assert all(0 <= e < experts for e in kept)
    left = [score[e] for e in range(experts) if e not in kept]
    assert not kept or not left or min(score[e] for e in kept) >= max(left) - 1e-12


def test_tokens_find_what_the_end_of_their_prompt_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt uses every expert, its end two of them, and so do the tokens after it."""
    shape = RoutingShape(2, 8, 2)
    trace = random_trace(shape, 192)
    ends = ([6, 7], [0, 1], [2, 3], [4, 5])  # another one for each prompt
    rows = [route for end in ends for route in [[t % 8, (t + 3) % 8] for t in range(32)] + [end] * 16]
    routes = np.array(rows, dtype=trace.experts.dtype)
    trace = dataclasses.replace(trace, experts=np.repeat(routes[:, None], 2, axis=1))
    found = after_prompt(trace, 0.5, prompt=40, new=8)
    monkeypatch.setattr(replay, "kept_after", lambda *_: frozenset())
    without = after_prompt(trace, 0.5, prompt=40, new=8)
    assert found.miss_rate < 0.7 * without.miss_rate
    assert sum(found.prompt_loads) <= sum(without.prompt_loads) + 2
