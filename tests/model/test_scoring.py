"""Eviction by a scorer: it sees every pass in order, is asked only when something must go, and changes no logit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import emoe
from emoe.errors import UsageError
from emoe.model.bind import binding_of
from emoe.prediction.next_use import NextUse
from emoe.prediction.protocol import Array, RoutingShape
from emoe.prediction.registry import SCORERS
from emoe.routing.trace import Trace
from tests.families import make_checkpoint
from tests.model.test_exact import batch_of, logits_of


class Counting:
    """Scores by the tokens so far; remembers what it was told and how often it was asked."""

    name = "counting"

    def __init__(self, shape: RoutingShape) -> None:
        self.shape = shape
        self.total = np.zeros((shape.layers, shape.experts), dtype=np.float32)
        self.seen: list[tuple[Array, Array, Array]] = []
        self.tasks: list[str | None] = []
        self.asked = 0

    def begin_prompt(self, task: str | None) -> None:
        self.tasks.append(task)

    def observe(self, routes: Array, weights: Array | None = None, token_ids: Array | None = None) -> None:
        assert weights is not None and token_ids is not None
        self.total += self.shape.counts(routes)
        self.seen.append((routes, weights, token_ids))

    def scores(self) -> Array:
        self.asked += 1
        return self.total


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCORERS, "counting", Counting)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("deepseek_v3", tmp_path_factory.mktemp("deepseek"), seed=6)


def scorer_of(model: Any) -> Counting:
    scores: Any = binding_of(model).ahead.scores
    found: Counting = scores.live.scorer
    return found


def test_it_sees_what_the_trace_holds(path: Path, tmp_path: Path) -> None:
    model, _ = emoe.load(path, expert_memory="60%", eviction="counting", trace=tmp_path / "t.npz", task="a")
    logits_of(model, batch_of(1, 1, 7), 4)
    logits_of(model, batch_of(2, 2, 5), 2)
    model(batch_of(3, 1, 2)["input_ids"])
    scorer = scorer_of(model)
    emoe.close(model)
    trace = Trace.read(tmp_path / "t.npz")
    assert scorer.tasks == ["a"] * 3
    assert [len(routes) for routes, _, _ in scorer.seen] == [7, 1, 1, 1, 1, 5 + 4, 2, 2]
    first = np.concatenate([routes for routes, _, _ in scorer.seen[:5]])
    assert trace.weights is not None and trace.token_ids is not None
    assert np.array_equal(first, trace.experts[: len(first)])
    assert np.array_equal(np.concatenate([w for _, w, _ in scorer.seen[:5]]), trace.weights[: len(first)])
    assert np.array_equal(np.concatenate([t for _, _, t in scorer.seen[:5]]), trace.token_ids[: len(first)])


def test_it_is_asked_at_most_once_a_pass_and_only_for_evictions(path: Path) -> None:
    model, _ = emoe.load(path, expert_memory="60%", eviction="counting")
    logits_of(model, batch_of(1, 1, 3), 20)
    stats = emoe.stats(model)
    assert 0 < scorer_of(model).asked <= stats["passes"]
    assert stats["eviction"] == "counting"
    emoe.close(model)
    whole, _ = emoe.load(path, eviction="counting")
    logits_of(whole, batch_of(1, 1, 3), 3)
    assert scorer_of(whole).asked == 0 and not scorer_of(whole).seen


def test_the_lowest_score_goes_first(path: Path) -> None:
    model, _ = emoe.load(path, expert_memory="60%", eviction="counting")
    logits_of(model, batch_of(1, 1, 9), 12)
    ahead = binding_of(model).ahead
    pool = binding_of(model).pools[0]
    layers = sorted(pool.table.experts)
    layer, rank = layers[-1], len(layers) - 1
    pool.table.visit(layer)
    scores = scorer_of(model).total[rank]
    resident = pool.table.resident(layer)
    missing = next(e for e in range(pool.table.experts[layer]) if e not in resident)
    assert ahead.scores is not None
    ahead.scores.live.version += 1  # as a new pass does
    slot = pool.table.reserve((layer, missing))
    assert slot is not None and pool.table.evicted is not None
    assert scores[pool.table.evicted[1]] == min(scores[e] for e in resident)


@settings(max_examples=8)
@given(st.integers(0, 999), st.integers(26, 95), st.lists(st.integers(1, 8), min_size=1, max_size=3))
def test_no_scorer_changes_a_logit(path: Path, seed: int, share: int, lengths: list[int]) -> None:
    model, _ = emoe.load(path, expert_memory=f"{share}%", eviction="counting")
    whole, _ = emoe.load(path)
    for number, length in enumerate(lengths):
        inputs = batch_of(seed + number, 1 + number % 2, length)
        for ours, theirs in zip(logits_of(model, inputs, 2), logits_of(whole, inputs, 2), strict=True):
            assert torch.equal(ours, theirs)
    emoe.close(model)
    emoe.close(whole)


def test_where_plans_decide_nothing_is_scored(path: Path) -> None:
    model, _ = emoe.load(path, expert_memory="60%", mode="resident", eviction="counting")
    logits_of(model, batch_of(1, 1, 9), 6)
    assert not scorer_of(model).seen and scorer_of(model).asked == 0
    scorer = emoe.stats(model)["scorer"]
    assert not scorer["active"] and "resident" in scorer["reason"]


def test_an_unknown_name_lists_rules_and_scorers(path: Path) -> None:
    with pytest.raises(UsageError, match=r"counting.*least-stale, lfu, lru"):
        emoe.load(path, eviction="fifo")


def test_a_scorer_that_costs_more_than_it_spares_is_switched_off_and_says_so(path: Path) -> None:
    """A slow scorer on a model that reads from memory: evictions go on by least-stale, and no logit changes."""
    import time

    class Slow(NextUse):
        def scores_at(self, rank: int, routes: Array) -> Array:
            time.sleep(0.002)
            return super().scores_at(rank, routes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("emoe.prediction.next_use.NextUse", Slow)
        model, _ = emoe.load(path, expert_memory="6/layer", eviction="next-use")
    tokens = torch.arange(5, 14)[None]
    with torch.no_grad():
        slow = model.generate(tokens, max_new_tokens=80, min_new_tokens=80, do_sample=False)
    scorer = emoe.stats(model)["scorer"]
    emoe.close(model)
    assert not scorer["active"] and "switched off" in scorer["reason"]
    assert scorer["spent_s"] > scorer["spared_s"]
    whole, _ = emoe.load(path)
    with torch.no_grad():
        assert torch.equal(slow, whole.generate(tokens, max_new_tokens=80, min_new_tokens=80, do_sample=False))
    emoe.close(whole)
