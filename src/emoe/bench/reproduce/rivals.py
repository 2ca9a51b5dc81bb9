"""What chooses experts only here, to be compared with: at random, a scorer as a predictor, a network waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from emoe.prediction.protocol import Array, Predictor, RoutingShape, UseScorer
from emoe.prediction.registry import NETWORKS, PREDICTORS, SCORERS, make_scorer

RANDOM = "random"
AT_ONCE = "at-once-"
"""A network of this prefix answers at once, in the engine's process: what it chooses does not depend on how fast the
machine is, as it does where the engine does not wait for it."""


class Random:
    """Expects anything."""

    name = RANDOM

    def __init__(self, shape: RoutingShape, seed: int = 0) -> None:
        """Draw from this seed."""
        self._shape = shape
        self._random = np.random.default_rng(seed)

    def begin_prompt(self, task: str | None) -> None:
        """Nothing is learned."""

    def observe(self, routes: Array) -> None:
        """Nothing is learned."""

    def predict(self, task: str | None) -> Array:
        """Shares at random."""
        return self._shape.normalised(self._random.random((self._shape.layers, self._shape.experts)))


class ByScore:
    """A scorer of expected use as a predictor: shares that fall with the rank of the score."""

    def __init__(self, shape: RoutingShape, scorer: UseScorer) -> None:
        """Follow this scorer."""
        self.name = scorer.name
        self._shape = shape
        self._scorer = scorer

    def begin_prompt(self, task: str | None) -> None:
        """Pass it on."""
        self._scorer.begin_prompt(task)

    def observe(self, routes: Array) -> None:
        """Pass it on, token by token as decoding would."""
        for row in range(len(routes)):
            self._scorer.observe(routes[row : row + 1])

    def predict(self, task: str | None) -> Array:
        """1 for the lowest score of a layer, up to the number of experts, scaled."""
        ranks = np.argsort(np.argsort(self._scorer.scores(), axis=1, kind="stable"), axis=1) + 1.0
        return self._shape.normalised(ranks)


def _by_score(name: str) -> Callable[[RoutingShape], Predictor]:
    return lambda shape: ByScore(shape, make_scorer(name, shape))


@contextmanager
def rivals(seed: int) -> Iterator[None]:
    """Inside the `with` block, a model can be loaded with `random`, a scorer's name or an `AT_ONCE` network."""
    added: dict[str, Callable[[RoutingShape], Predictor]] = {RANDOM: lambda shape: Random(shape, seed)}
    added |= {name: _by_score(name) for name in SCORERS}
    added |= {AT_ONCE + name: PREDICTORS[name] for name in NETWORKS}
    with PREDICTORS.meanwhile(added):
        yield
