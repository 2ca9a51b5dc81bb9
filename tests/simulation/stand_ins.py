"""Traces, predictors and scorers small enough to follow by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from emoe.prediction.protocol import Array, Report, RoutingShape
from emoe.routing.trace import DECODE, Trace, id_dtype


def make_trace(
    experts: Any, lengths: list[int], num_experts: int, *, tasks: list[int] | None = None, phase: Any = None
) -> Trace:
    """A trace of routes [tokens, layers, k], cut into prompts of these lengths."""
    routes = np.asarray(experts, dtype=id_dtype(num_experts))
    labels = tasks or [-1] * len(lengths)
    return Trace(
        experts=routes,
        phase=np.full(len(routes), DECODE, dtype=np.uint8) if phase is None else np.asarray(phase, dtype=np.uint8),
        step=np.arange(len(routes)),
        offsets=np.cumsum([0, *lengths]).astype(np.int64),
        task=np.asarray(labels, dtype=np.int32),
        tasks=tuple(f"task {i}" for i in range(max(labels, default=-1) + 1)),
        layers=np.arange(routes.shape[1], dtype=np.int32),
        num_experts=num_experts,
        token_ids=np.arange(len(routes), dtype=np.int32),
        prompts=tuple({} for _ in lengths),
    )


@st.composite
def traces(draw: st.DrawFn, layers: int = 3, experts: int = 6, top_k: int = 2, tokens: int = 30) -> Trace:
    """Skewed routes, some not computed, in a few prompts."""
    lengths = draw(st.lists(st.integers(0, tokens // 3), min_size=1, max_size=4).filter(lambda each: sum(each) > 0))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    skew = rng.random((layers, experts)) ** draw(st.sampled_from([1, 4]))
    noise = rng.random((sum(lengths), layers, experts)) * skew
    routes = np.argsort(-noise, axis=2)[:, :, :top_k].astype(id_dtype(experts))
    if draw(st.booleans()):
        routes[rng.random(routes.shape) < 0.1] = np.iinfo(routes.dtype).max
    tasks = rng.integers(-1, 2, len(lengths)).tolist()
    return make_trace(routes, lengths, experts, tasks=tasks)


class RecentScorer:
    """Uses of the running prompt so far, and half of those before, prompt by prompt."""

    name = "recent"

    def __init__(self, shape: RoutingShape) -> None:
        self.shape = shape
        self.counts = np.zeros((shape.layers, shape.experts), dtype=np.float32)
        self.tasks: list[str | None] = []

    def begin_prompt(self, task: str | None) -> None:
        self.counts *= np.float32(0.5)
        self.tasks.append(task)

    def observe(self, routes: Array, weights: Array | None = None, token_ids: Array | None = None) -> None:
        self.counts += self.shape.counts(routes).astype(np.float32)

    def scores(self) -> Array:
        return self.counts


class BatchScorer(RecentScorer):
    """The same, many tokens at once."""

    name = "recent-batch"

    def scores_at(self, rank: int, routes: Array) -> Array:
        row: Array = self.counts[rank]
        return row

    def scores_of(self, routes: Array, weights: Array | None = None, token_ids: Array | None = None) -> Array:
        each = np.stack([self.shape.counts(routes[i : i + 1]) for i in range(len(routes))]).astype(np.float32)
        before: Array = self.counts + each.cumsum(axis=0) - each
        self.counts = self.counts + each.sum(axis=0)
        return before


class CountPredictor:
    """Shares of all tokens seen, by task; what it was fitted to counts too."""

    name = "count"

    def __init__(self, shape: RoutingShape) -> None:
        self.shape = shape
        self.total = np.zeros((shape.layers, shape.experts))
        self.prompts: list[str | None] = []
        self.fits = 0

    def begin_prompt(self, task: str | None) -> None:
        self.prompts.append(task)

    def observe(self, routes: Array) -> None:
        self.total += self.shape.counts(routes)

    def predict(self, task: str | None) -> Array:
        return self.shape.normalised(self.total)


class TrainedPredictor(CountPredictor):
    """The same, as something that is fitted."""

    name = "trained"

    def fit(self, history: Trace, *, seed: int = 0, progress: Report | None = None) -> None:
        self.fits += 1
        self.total += history.counts().sum(axis=0)

    def state(self) -> dict[str, Array]:
        return {"total": self.total}

    def restore(self, state: Mapping[str, Array]) -> None:
        self.total = np.array(state["total"])
