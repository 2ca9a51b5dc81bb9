"""What every predictor offers. Pure numpy; the engine and the simulator share the same objects.

Layers are ranks: positions among the MoE layers, 0 nearest the input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from emoe.errors import UsageError
from emoe.routing.trace import Trace, missing_id

Array = NDArray[Any]
Report = Callable[[str], None]
"""Called with one line about how far a long fit is."""


@dataclass(frozen=True, slots=True)
class RoutingShape:
    """How a model routes: MoE layers, experts in each, experts for each token.

    Raises:
        UsageError: a number below 1, or more experts for a token than there are.
    """

    layers: int
    experts: int
    top_k: int

    def __post_init__(self) -> None:
        if min(self.layers, self.experts, self.top_k) < 1 or self.top_k > self.experts:
            raise UsageError(f"no model routes over {self.layers} layers to {self.top_k} of {self.experts} experts.")

    @classmethod
    def of(cls, trace: Trace) -> RoutingShape:
        """The shape that a trace was recorded with."""
        return cls(len(trace.layers), trace.num_experts, trace.top_k)

    def counts(self, routes: Array) -> Array:
        """int64 [layers, experts]: tokens routed to each expert, of routes [tokens, layers, k].

        Ids at or above the number of experts mean "not computed".
        """
        if routes.ndim != 3 or routes.shape[1] != self.layers:
            raise UsageError(f"routes of shape {list(routes.shape)} do not fit a model of {self.layers} MoE layers.")
        rank = np.broadcast_to(np.arange(self.layers)[None, :, None], routes.shape)
        known = routes < self.experts
        flat = rank[known] * self.experts + routes[known].astype(np.int64)
        return np.bincount(flat, minlength=self.layers * self.experts).reshape(self.layers, self.experts)

    def uniform(self) -> Array:
        """float64 [layers, experts]: the shares of a model that routes at random; rows sum to k."""
        return np.full((self.layers, self.experts), self.top_k / self.experts)

    def normalised(self, amounts: Array) -> Array:
        """Rows of `amounts` [layers, experts] scaled to sum to k; a row of zeros becomes uniform."""
        total = amounts.sum(axis=1, keepdims=True)
        uniform = self.uniform()
        return np.where(total > 0, amounts * (self.top_k / np.where(total > 0, total, 1)), uniform)


@runtime_checkable
class Predictor(Protocol):
    """Prompt-level prediction (paper, section 2.2): history -> share of tokens per expert key."""

    name: str

    def begin_prompt(self, task: str | None) -> None:
        """Note that a prompt of this task (None: unknown) starts."""
        ...

    def observe(self, routes: Array) -> None:
        """Note routes of the running prompt, int [tokens, layers, k] in order; may be called many times for one."""
        ...

    def predict(self, task: str | None) -> Array:
        """float64 [layers, experts]: the expected share of the next prompt's tokens, if it is of this task.

        Rows sum to k, as those of `Trace.shares` do.
        """
        ...


@runtime_checkable
class Trainable(Protocol):
    """What learns offline, and what it learned (stored as safetensors in a profile)."""

    def fit(self, history: Trace, *, seed: int = 0, progress: Report | None = None) -> None:
        """Learn from recorded prompts."""
        ...

    def state(self) -> dict[str, Array]:
        """What was learned, as named arrays."""
        ...

    def restore(self, state: Mapping[str, Array]) -> None:
        """The inverse of `state`: predictions are equal bit for bit."""
        ...


@runtime_checkable
class UseScorer(Protocol):
    """Token-level prediction for eviction: how soon each expert key is expected to be used."""

    name: str

    def begin_prompt(self, task: str | None) -> None:
        """Note that a prompt of this task (None: unknown) starts."""
        ...

    def observe(self, routes: Array, weights: Array | None = None, token_ids: Array | None = None) -> None:
        """Note tokens that ran: routes int [tokens, layers, k], and where known gate weights of the same shape and
        the tokens' ids [tokens]."""
        ...

    def scores(self) -> Array:
        """float32 [layers, experts]: higher is sooner; from what was observed so far. The lowest is evicted first.

        The array may be overwritten by the next call of `observe`.
        """
        ...


@runtime_checkable
class LayerScorer(UseScorer, Protocol):
    """A scorer that also uses what the running token chose in the layers that have run."""

    def scores_at(self, rank: int, routes: Array) -> Array:
        """float32 [experts] of one layer, from what was observed and the running token's own routes.

        Args:
            rank: the layer. Within a token, ranks are asked for in ascending order.
            routes: int [layers, k] of the running token; rows after `rank` are not looked at.
        """
        ...

    def scores_of(self, routes: Array, weights: Array | None = None, token_ids: Array | None = None) -> Array:
        """float32 [tokens, layers, experts]: what `scores_at` returns for each layer of each of these tokens, which
        are then observed. Equal up to rounding: many tokens are computed at once."""
        ...


__all__ = ["Array", "LayerScorer", "Predictor", "Report", "RoutingShape", "Trainable", "UseScorer", "missing_id"]
