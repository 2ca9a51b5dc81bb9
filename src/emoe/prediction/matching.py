"""Request-level activation matching, as MoE-Infinity does it (arXiv 2401.14361)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from emoe.prediction.counting import PromptCounter, need
from emoe.prediction.protocol import Array

STORED_PROMPTS = 256
"""Prompts kept; matching costs this * layers * experts multiplications."""


class ActivationMatching(PromptCounter):
    """The stored prompt whose activations are nearest to the latest prompt's tells what comes.

    An activation matrix holds one prompt's tokens per expert, layer by layer; two are compared by the cosine of each
    layer, averaged over layers, where a layer of which either has no token adds nothing. The running prompt's partial
    matrix is matched against all stored ones; between prompts it is the last prompt's, against all but itself. The
    matched matrix, as shares, is the prediction: MoE-Infinity follows one request, so the match is meant to be that
    request's own future, and at a prompt's boundary it says "again something like this".

    A full store replaces the entry nearest to the new one, which keeps it varied. The task plays no part.
    """

    name = "moe-infinity"

    def predict(self, task: str | None) -> Array:
        """float64 [layers, experts]; the latest prompt's own shares while there is nothing to match it with."""
        latest = self.latest
        if self._running.any():
            candidates = np.ones(len(self._stored), dtype=bool)
        else:
            candidates = np.arange(len(self._stored)) != self._newest
        if not candidates.any() or not latest.any():
            return self.shape.normalised(latest.astype(np.float64))
        likeness = np.where(candidates, self._likeness(latest), -np.inf)
        return self.shape.normalised(self._stored[int(np.argmax(likeness))].astype(np.float64))

    def _likeness(self, counts: Array) -> Array:
        """float32 [stored]: summed cosine of the layers."""
        likeness: Array = self._units @ _unit_rows(counts).reshape(-1)
        return likeness

    def _forget(self) -> None:
        super()._forget()
        self._newest = -1
        self._stored = np.zeros((0, *self._running.shape), dtype=np.int64)
        self._units = np.zeros((0, self._running.size), dtype=np.float32)

    def _learn(self, counts: Array, task: str | None) -> None:
        unit = _unit_rows(counts).reshape(1, -1)
        if len(self._stored) < STORED_PROMPTS:
            self._newest = len(self._stored)
            self._stored = np.concatenate([self._stored, counts[None]])
            self._units = np.concatenate([self._units, unit])
        else:
            self._newest = int(np.argmax(self._likeness(counts)))
            self._stored[self._newest] = counts
            self._units[self._newest] = unit[0]

    def _arrays(self) -> dict[str, Array]:
        return {"stored": self._stored.copy(), "newest": np.array([self._newest])}

    def _take(self, state: Mapping[str, Array]) -> None:
        stored = need(state, self.name, "stored", (None, *self._running.shape))
        newest = int(need(state, self.name, "newest", (1,))[0])
        self._stored, self._newest = stored, newest
        self._units = np.stack([_unit_rows(one).reshape(-1) for one in stored]) if len(stored) else self._units[:0]


def _unit_rows(counts: Array) -> Array:
    """float32 [layers, experts]: rows of length 1; a row of zeros stays."""
    rows = counts.astype(np.float32)
    length = np.sqrt((rows * rows).sum(axis=1, keepdims=True))
    units: Array = np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)
    return units
