"""A small regression that is corrected step by step: non-negative, robust, and never far from what is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

PRIOR_WEIGHT = 0.05
"""The prior counts as much as so many observations: less than one, since it may be wrong by a factor."""
OUTLIER = 3.0
"""Residuals beyond so many times their usual size count as if they were that large (Huber)."""
USUAL_RATE = 0.05
"""How fast the usual size of residuals follows them."""
MOST = 1e4
"""No coefficient leaves its unit by more than this factor."""


class Fit:
    """seconds = sum of coefficients times amounts, over observations that fade.

    Each observation is weighed by the inverse of its size in units (a long step does not drown the short ones), and
    less where it is far outside the usual (another program took the machine). Coefficients are sought in units, those
    of a profile; where the data does not tell two of them apart, the ridge towards the prior does.
    """

    def __init__(self, prior: Sequence[float], units: Sequence[float], forget: float) -> None:
        """`prior`: the coefficients at first; `units`: a size of each that is no surprise; `forget`: weight kept."""
        self._units = np.maximum(np.array(units, dtype=np.float64), 1e-12)
        self._prior = np.array(prior, dtype=np.float64) / self._units
        self._at = self._prior.copy()
        self._forget = forget
        size = len(self._prior)
        self._outer: NDArray[np.float64] = np.zeros((size, size))
        self._inner: NDArray[np.float64] = np.zeros(size)
        self._usual = 1.0
        self.values: list[float] = (self._at * self._units).tolist()

    def observe(self, amounts: Sequence[float], seconds: float) -> None:
        """Note that these amounts took so long."""
        row = np.array(amounts, dtype=np.float64) * self._units
        expected = max(float(row @ self._at), 1e-3 * float(row.sum()), 1e-12)
        error = abs(seconds / expected - 1.0)
        weight = min(1.0, OUTLIER * self._usual / error) if error else 1.0
        self._usual += USUAL_RATE * (min(error, OUTLIER * self._usual) - self._usual)
        self._usual = max(self._usual, 1e-3)
        size = float(row.sum())
        row /= size
        self._outer = self._outer * self._forget + weight * np.outer(row, row)
        self._inner = self._inner * self._forget + weight * row * (seconds / size)
        self._at = self._solve()
        self.values = (self._at * self._units).tolist()

    def _solve(self) -> NDArray[np.float64]:
        """The least squares with the ridge, coefficients between 0 and MOST: those below 0 are left out in turn."""
        outer = self._outer + PRIOR_WEIGHT * np.eye(len(self._prior))
        inner = self._inner + PRIOR_WEIGHT * self._prior
        kept = np.arange(len(self._prior))
        found: NDArray[np.float64] = np.zeros(len(self._prior))
        while kept.size:
            part = np.linalg.solve(outer[np.ix_(kept, kept)], inner[kept])
            if (part >= 0).all():
                found[kept] = np.minimum(part, MOST)
                break
            kept = kept[part >= 0]
        return found
