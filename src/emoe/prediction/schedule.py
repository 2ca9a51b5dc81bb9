"""When to predict anew: every p prompts, or when what is observed drifts from what was predicted (section 2.3).

Requests are numbered 0, 1, 2, ... The first one is always due. The paper then loads every expert for it; with a budget
that holds fewer there is no such choice, so until the first prediction is there the resident experts are whatever the
eviction rule keeps, or what a profile's popularity says.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from emoe.errors import UsageError
from emoe.prediction.protocol import Array, RoutingShape

DEFAULT_PROMPTS = 40
"""The paper's p."""

DEFAULT_THRESHOLD = 0.3
WINDOW_TOKENS = 256


class Schedule(Protocol):
    """Whether a prediction is due, and for about how many prompts it is then made."""

    @property
    def horizon(self) -> int:
        """Prompts from one prediction to the next, the running one included."""
        ...

    def due(self, prompt: int, observed: Array | None, predicted: Array | None) -> bool:
        """Say so for the prompt with this number.

        observed: shares [layers, experts] of the recent tokens, None while there are too few; predicted: the shares
        in force, None before the first prediction.
        """
        ...


class Every:
    """Due at every p-th prompt: 0, p, 2 p, ... p = 1 is the paper's eMoE-E.

    p = 0 is the origin of Fig. 10, where no prompt is served by another one's experts: the same as p = 1.

    Raises:
        UsageError: a negative p.
    """

    def __init__(self, prompts: int = DEFAULT_PROMPTS) -> None:
        if prompts < 0:
            raise UsageError(f"predictions cannot be {prompts} prompts apart: give 0 or more.")
        self.prompts = prompts
        self.horizon = max(prompts, 1)

    def due(self, prompt: int, observed: Array | None, predicted: Array | None) -> bool:
        """True for multiples of p, and while there is no prediction."""
        return predicted is None or prompt % max(self.prompts, 1) == 0


class Adaptive:
    """Due when the observed shares have drifted: when their total variation distance from the predicted ones,
    averaged over layers, is above the threshold (0: equal, 1: nothing in common).

    Raises:
        UsageError: a threshold outside 0..1.
    """

    def __init__(self, threshold: float = DEFAULT_THRESHOLD) -> None:
        if not 0 <= threshold <= 1:
            raise UsageError(f"a drift threshold of {threshold:g} cannot be meant: give a number from 0 to 1.")
        self.threshold = threshold
        self.horizon = DEFAULT_PROMPTS

    def due(self, prompt: int, observed: Array | None, predicted: Array | None) -> bool:
        """True while there is no prediction; without observations, nothing has drifted."""
        if predicted is None:
            return True
        return observed is not None and drift(observed, predicted) > self.threshold


def drift(observed: Array, predicted: Array) -> float:
    """Mean over layers of the total variation distance of two shares [layers, experts], each row scaled to sum to 1.

    Layers without any observed share are left out; 0 if all are.
    """
    seen = observed.sum(axis=1) > 0
    if not seen.any():
        return 0.0
    rows = [one[seen] / one[seen].sum(axis=1, keepdims=True) for one in (observed, predicted)]
    return float(0.5 * np.abs(rows[0] - rows[1]).sum(axis=1).mean())


class RecentShares:
    """Shares of about the last `tokens` tokens, to compare with a prediction.

    Kept in two halves, so that observing costs no more than counting: between `tokens` / 2 and `tokens` count.
    """

    def __init__(self, shape: RoutingShape, tokens: int = WINDOW_TOKENS) -> None:
        if tokens < 2:
            raise UsageError(f"{tokens} tokens say nothing about shares: give at least 2.")
        self._shape, self._half = shape, tokens // 2
        self.clear()

    def clear(self) -> None:
        """Forget everything, as after a new prediction."""
        self._older: Array | None = None
        self._newer = np.zeros((self._shape.layers, self._shape.experts), dtype=np.int64)
        self._tokens = 0

    def observe(self, routes: Array) -> None:
        """Count routes [tokens, layers, k]."""
        for start in range(0, len(routes), self._half):
            self._add(routes[start : start + self._half])

    def _add(self, routes: Array) -> None:
        if self._tokens + len(routes) > self._half:
            self._older, self._newer, self._tokens = self._newer, np.zeros_like(self._newer), 0
        self._newer = self._newer + self._shape.counts(routes)
        self._tokens += len(routes)

    def shares(self) -> Array | None:
        """float64 [layers, experts], rows sum to k (or are 0 without a known route); None until half is full."""
        if self._older is None and self._tokens < self._half:
            return None
        counts = self._newer if self._older is None else self._older + self._newer
        total = counts.sum(axis=1, keepdims=True)
        shares: Array = np.divide(counts * self._shape.top_k, total, out=np.zeros(counts.shape), where=total > 0)
        return shares


def make_schedule(text: str | int) -> Schedule:
    """The schedule named by p (40), "adaptive" or "adaptive:0.25".

    Raises:
        UsageError: anything else.
    """
    name, _, rest = str(text).partition(":")
    try:
        if name == "adaptive":
            return Adaptive(float(rest)) if rest else Adaptive()
        if not rest:
            return Every(int(name))
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
    raise UsageError(f"no schedule is called {text!r}: give a number of prompts, adaptive, or adaptive:THRESHOLD.")
