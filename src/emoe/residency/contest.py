"""Two eviction orders on trial: learned scores against plain recency, on banks that hold no bytes.

A scorer can be wrong about traffic unlike what it learned from: where a phase of routing ends abruptly, LRU is hard to
beat. So both orders are served on banks of the real sizes, and the real bank follows the one that loads less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

SCORES, RECENCY = 0, 1
HALF_LIFE_TOKENS = 500.0
"""Tokens after which a load counts half in the comparison."""

MARGIN = 0.01
"""By how much the other order must be better to take the lead: noise alone must not."""


class Contest:
    """The banks of some layers, per-layer quotas, under both orders."""

    def __init__(self, slots: Sequence[int], experts: int) -> None:
        """`slots` of each layer, each at least one token's experts; layers have at most `experts` experts."""
        layers = len(slots)
        self.lead = SCORES
        self.experts = experts
        self.loads = np.zeros(2)
        self.switches = 0
        self.made = [0, 0]
        """Loads so far under each order."""
        self._slots = np.array(slots, dtype=np.int64)
        self._resident = np.zeros((2, layers, experts), dtype=bool)
        self._last = np.full((layers, experts), -1, dtype=np.int64)
        self._tick = 0
        self._keep = 0.5 ** (1 / HALF_LIFE_TOKENS)

    def begin_token(self) -> None:
        """A token starts: take stock of those before."""
        self._tick += 1
        self.loads *= self._keep
        mine, other = self.loads[self.lead], self.loads[1 - self.lead]
        if mine - other > MARGIN * other + len(self._slots):
            self.lead = 1 - self.lead
            self.switches += 1

    def visit(self, layers: Array, used: Array, values: Callable[[], Array]) -> None:
        """Serve one token in some layers.

        Args:
            layers: int [n].
            used: bool [n, experts], what it was routed to.
            values: returns [n, experts] scores, lowest first to go; asked only if the scores' bank must evict.
        """
        last = self._last[layers]
        last[used] = self._tick
        self._last[layers] = last
        for order in (SCORES, RECENCY):
            resident = self._resident[order, layers]
            missed = used & ~resident
            if not missed.any():
                continue
            count = int(np.count_nonzero(missed))
            self.loads[order] += count
            self.made[order] += count
            resident |= used
            excess = resident.sum(axis=1) - self._slots[layers]
            if (excess > 0).any():
                value = last.astype(np.float64) if order == RECENCY else values().astype(np.float64)
                value[~resident | used] = np.inf
                ranked = value.argsort(axis=1, kind="stable")
                gone = np.arange(value.shape[1]) < excess[:, None]
                rows = np.broadcast_to(np.arange(len(layers))[:, None], ranked.shape)[gone]
                resident[rows, ranked[gone]] = False
            self._resident[order, layers] = resident
