"""First-order transitions between layers: which experts a token goes to after the ones it went to (paper, Fig. 3)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from emoe.errors import UsageError
from emoe.prediction.counting import PromptCounter, need
from emoe.prediction.protocol import Array

CHUNK_TOKENS = 256
"""Tokens whose transitions are counted at once: their one-hot rows are layers * tokens * experts float32."""


class Transitions(PromptCounter):
    """Chains learned transitions from the first layer of the latest prompt through all layers.

    pairs[l, a, b] counts the tokens that went to expert a in layer l and to b in layer l + 1; with P(b | a) of them,
    f_{l+1} = f_l P. An expert without evidence passes on the next layer's popularity. Memory and time of a prediction
    grow with layers * experts^2.
    """

    name = "transitions"

    def observe(self, routes: Array) -> None:
        """Count routes [tokens, layers, k] and their transitions."""
        super().observe(routes)
        self._waiting.append(np.array(routes, copy=True))
        self._waiting_tokens += len(routes)
        if self._waiting_tokens >= CHUNK_TOKENS:
            self._count_pairs()

    def observe_counts(self, counts: Array) -> None:
        """Counts alone hold no transitions. Raises UsageError unless they come with routes."""
        raise UsageError(f"{self.name} needs each token's routes, and counts per prompt do not hold them.")

    def predict(self, task: str | None) -> Array:
        """float64 [layers, experts]; uniform before the first token."""
        self._count_pairs()
        popular = self.shape.normalised((self._total + self._running).astype(np.float64)) / self.shape.top_k
        shares = np.empty((self.shape.layers, self.shape.experts))
        shares[0] = self.shape.normalised(self.latest[:1].astype(np.float64))[0]
        for layer in range(1, self.shape.layers):
            pairs = self._pairs[layer - 1].astype(np.float64)
            evidence = pairs.sum(axis=1, keepdims=True)
            onward = np.where(evidence > 0, pairs / np.where(evidence > 0, evidence, 1), popular[layer])
            shares[layer] = shares[layer - 1] @ onward
        return shares

    def _count_pairs(self) -> None:
        if not self._waiting:
            return
        routes, experts = np.concatenate(self._waiting), self.shape.experts
        self._waiting.clear()
        self._waiting_tokens = 0
        for start in range(0, len(routes), CHUNK_TOKENS):
            part = routes[start : start + CHUNK_TOKENS]
            chosen = np.zeros((self.shape.layers, len(part), experts + 1), dtype=np.float32)
            layer = np.arange(self.shape.layers)[:, None, None]
            # Ids at or above the number of experts mean "not computed"; they go to a column that is cut off.
            chosen[layer, np.arange(len(part))[None, :, None], np.minimum(part, experts).transpose(1, 0, 2)] = 1
            chosen = chosen[:, :, :experts]
            # Whole numbers below 2^24 are exact in float32.
            self._pairs += np.matmul(chosen[:-1].transpose(0, 2, 1), chosen[1:]).astype(np.int64)

    def _forget(self) -> None:
        super()._forget()
        size = self.shape.experts
        self._total = np.zeros_like(self._running)
        self._pairs = np.zeros((self.shape.layers - 1, size, size), dtype=np.int64)
        self._waiting: list[Array] = []
        self._waiting_tokens = 0

    def _learn(self, counts: Array, task: str | None) -> None:
        self._total = self._total + counts

    def _arrays(self) -> dict[str, Array]:
        self._count_pairs()
        return {"total": self._total, "pairs": self._pairs.copy()}

    def _take(self, state: Mapping[str, Array]) -> None:
        total = need(state, self.name, "total", self._total.shape)
        pairs = need(state, self.name, "pairs", self._pairs.shape)
        self._total, self._pairs = total, pairs
        self._waiting.clear()
        self._waiting_tokens = 0
