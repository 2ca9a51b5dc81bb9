"""The routes of one forward pass put together, for those who learn from them: predictors and scorers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from emoe.model.passes import Pass
from emoe.model.runtime import Runtime
from emoe.routing.trace import id_dtype, missing_id

Array = npt.NDArray[Any]


class LiveTokens:
    """Which tokens of a pass count: no padding, and no sequence of a batch that has ended.

    `generate` feeds ended sequences on until the others end. Ask once for each pass, in order.
    """

    def __init__(self, runtime: Runtime) -> None:
        """Follow the model's end tokens."""
        self._runtime = runtime
        self._ended: list[bool] = []

    def mask_of(self, now: Pass) -> torch.Tensor | None:
        """bool [batch * tokens] on any device; None: every token counts."""
        if now.announced:
            return None
        if now.new_prompt or len(self._ended) != now.batch:
            self._ended = [False] * now.batch
        if now.phase == "decode" and now.input_ids is not None and now.batch > 1:
            for row, token in enumerate(now.input_ids[:, -1].tolist()):
                self._ended[row] = self._ended[row] or token in self._runtime.end_tokens
            return ~torch.tensor(self._ended)
        return now.mask


def tokens_of(now: Pass, row: int) -> list[int] | None:
    """The token ids of one segment of a pass without its padding; None where the model was fed embeddings."""
    if now.input_ids is None:
        return None
    segment = now.segments[row]
    ids = now.input_ids.reshape(-1)[segment.start : segment.stop]
    if now.mask is not None:
        ids = ids[now.mask[segment.start : segment.stop]]
    found: list[int] = ids.tolist()
    return found


@dataclass(frozen=True, slots=True, eq=False)
class PassRoutes:
    """What the model's own router chose in one pass, without padding.

    Attributes:
        now: the pass.
        sequence: int [tokens], the segment of the pass that each token belongs to.
        routes: [tokens, layers, k] expert ids; the dtype's largest value: not computed.
        weights: float16 [tokens, layers, k], as traces hold them, so that a replay sees the same numbers; None where
            no consumer wants them.
        token_ids: int [tokens], or None where the model was fed embeddings.
    """

    now: Pass
    sequence: Array
    routes: Array
    weights: Array | None
    token_ids: Array | None


class RouteCollector:
    """Watches a runtime; when a pass starts, hands the one before to every consumer."""

    def __init__(
        self, runtime: Runtime, layers: Sequence[int], experts: int, top_k: int, with_weights: bool = False
    ) -> None:
        """Watch the decoder layers `layers` (ascending), of at most `experts` experts and `top_k` per token."""
        self.consumers: list[Callable[[PassRoutes], None]] = []
        self._with_weights = with_weights
        self._live = LiveTokens(runtime)
        self._ranks = {layer: rank for rank, layer in enumerate(layers)}
        self._dtype = id_dtype(experts)
        self._top_k = top_k
        self._now: Pass | None = None
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        runtime.observers.append(self._observe)
        runtime.at_pass_start.append(self._start)

    def _start(self, now: Pass) -> None:
        self.flush()
        self._now = now

    def _observe(self, now: Pass, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        self._seen[self._ranks[layer]] = (ids, weights)

    def flush(self) -> None:
        """Hand over what was collected, if anything was."""
        now, seen = self._now, self._seen
        self._now, self._seen = None, {}
        if now is None or now.failed or not seen:
            return
        found = self._put_together(now, seen)
        for consumer in self.consumers:
            consumer(found)

    def _put_together(self, now: Pass, seen: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> PassRoutes:
        ids = self._stacked([seen[rank][0] if rank in seen else None for rank in range(len(self._ranks))], self._dtype)
        weights = None
        if self._with_weights:
            gates = [seen[rank][1].detach().half() if rank in seen else None for rank in range(len(self._ranks))]
            weights = self._stacked(gates, np.dtype(np.float16))
        sequence = np.repeat(np.arange(len(now.segments)), [segment.tokens for segment in now.segments])
        tokens = None if now.input_ids is None else now.input_ids.reshape(-1).cpu().numpy()
        mask = self._live.mask_of(now)
        if mask is not None:
            kept = np.flatnonzero(mask.cpu().numpy())
            sequence, ids = sequence[kept], ids[kept]
            weights = None if weights is None else weights[kept]
            tokens = None if tokens is None else tokens[kept]
        return PassRoutes(now, sequence, ids, weights, tokens)

    def _stacked(self, layers: list[torch.Tensor | None], dtype: np.dtype[Any]) -> Array:
        """[tokens, layers, k] of each layer's [tokens, its own k]; what is absent is "not computed", or weight 0."""
        there = [layer for layer in layers if layer is not None]
        if len(there) == len(layers) and {layer.shape[1] for layer in there} == {self._top_k}:
            whole: Array = stacked(there).astype(dtype)
            return whole
        absent = 0 if dtype.kind == "f" else missing_id(dtype)
        found = np.full((there[0].shape[0], len(layers), self._top_k), absent, dtype=dtype)
        for rank, layer in enumerate(layers):
            if layer is not None:
                found[:, rank, : layer.shape[1]] = layer.cpu().numpy()
        return found


def stacked(layers: Sequence[torch.Tensor]) -> Array:
    """[tokens, layers, k] of each layer's [tokens, k]: one copy where all lie on one device."""
    if len({layer.device for layer in layers}) > 1:
        layers = [layer.cpu() for layer in layers]
    found: Array = torch.stack(list(layers), dim=1).cpu().numpy()
    return found
