"""What Figure 3's numbers say of routes whose structure is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.bench.reproduce import transitions
from emoe.prediction.protocol import RoutingShape
from emoe.routing.trace import Trace
from tests.prediction.histories import random_routes, trace_of

SHAPE = RoutingShape(3, 6, 2)


def linked(seed: int, prompts: int = 6, tokens: int = 200) -> Trace:
    """Layer 1 follows from layer 0 (expert e -> 5 - e); layer 2 is drawn independently."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(prompts):
        routes = random_routes(rng, SHAPE, tokens)
        routes[:, 1] = 5 - routes[:, 0]
        found.append(routes)
    return trace_of(SHAPE, found, [None] * prompts)


def test_a_link_is_found_and_its_absence_too() -> None:
    learn, score = linked(0), linked(1)
    pairs = transitions.pairs_of(learn)
    certain, none = transitions.named(pairs, score.experts)
    assert certain == 1 and none == pytest.approx(1 / 3, abs=0.03)
    assert transitions.popular(learn.counts().sum(axis=0), score.experts) == pytest.approx([1 / 3, 1 / 3], abs=0.03)
    bits, entropy = transitions.information(pairs)
    # Of a token's two experts one decides the partner, the other one of five others: log2 6 - H.
    assert entropy == pytest.approx([np.log2(6)] * 2, abs=0.01)
    assert bits[0] == pytest.approx(np.log2(6) - (1 + 0.5 * np.log2(5)), abs=0.02) and bits[1] < 0.01
    mixed = transitions.pairs_of(transitions.shuffled(learn, 0))
    assert transitions.named(mixed, score.experts)[0] < 0.5 and transitions.information(mixed)[0][0] < 0.01


@given(st.integers(0, 9999), st.booleans())
def test_shuffling_keeps_what_each_layer_did(seed: int, within: bool) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 7, 4)
    trace = trace_of(SHAPE, [random_routes(rng, SHAPE, int(n), 0.1) for n in lengths], [None] * 4)
    other = transitions.shuffled(trace, seed, within)
    counts = (other.counts(), trace.counts()) if within else (other.counts().sum(axis=0), trace.counts().sum(axis=0))
    assert (counts[0] == counts[1]).all()


@given(st.integers(0, 9999))
def test_named_and_pairs_against_literal_versions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    trace = trace_of(SHAPE, [random_routes(rng, SHAPE, 9, 0.1) for _ in range(2)], [None] * 2)
    pairs = transitions.pairs_of(trace)
    steps = transitions.onward(pairs)
    named = transitions.named(pairs, trace.experts)
    for layer in range(2):
        count, hits, looked = np.zeros((6, 6)), 0, 0
        for token in trace.experts:
            now, after = token[layer].tolist(), token[layer + 1].tolist()
            for a, b in itertools.product(now, after):
                if max(a, b) < 6:
                    count[a, b] += 1
            if max(*now, *after) < 6:
                score = steps[layer][now].sum(axis=0)
                best = sorted(range(6), key=lambda e, score=score: (-score[e], e))[:2]  # type: ignore[misc]
                hits, looked = hits + len({*best} & {*after}), looked + 2
        assert (pairs[layer] == count).all()
        assert named[layer] == pytest.approx(hits / looked) if looked else np.isnan(named[layer])
    rows = transitions.one_hot(trace.experts[:, 0], 6)
    assert (rows.sum(axis=0) == trace.counts().sum(axis=0)[0]).all()
