"""Who wanted which experts, and whether they were there: per request, and per task and layer.

A layer's routes and what was resident when it was reached are only noted while it runs; the whole step is counted at
its end, by one scatter over [requests, layers, experts] and no loop over tokens or requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from emoe.model.collecting import stacked
from emoe.model.layer import LayerRuntime
from emoe.model.passes import Pass

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class StepUse:
    """What the segments of one pass took of each MoE layer; int [segments, layers] each.

    Attributes:
        hits, misses: expert keys that a segment's tokens wanted, and that were there or not when the layer was reached.
        loads: those of the misses that were waited for; a load that several segments wanted counts for each.
        bytes: of these loads.
        rerouted: tokens of which a chosen expert was replaced.
        routed: tokens.
        planned: how many of the hits and misses were in the plan in force; None where there was none.
    """

    hits: Array
    misses: Array
    loads: Array
    bytes: Array
    rerouted: Array
    routed: Array
    planned: Array | None


@dataclass(frozen=True, slots=True, eq=False)
class _Few:
    """A layer that runs few tokens: their `rows`, what all chose (`ids`), and what else is loaded to stay."""

    rank: int
    rows: Array
    ids: torch.Tensor
    filling: frozenset[int]

    def wanted(self, segment: Array, shape: tuple[int, int, int]) -> Array:
        """bool [segments, experts]: what each segment's tokens that are run chose, and what stays of the others'."""
        chosen, ran = np.zeros((2, shape[0], shape[2]), dtype=bool)
        ids = self.ids.cpu().numpy()
        chosen[segment[:, None], ids] = True
        ran[segment[self.rows][:, None], ids[self.rows]] = True
        stays = np.zeros(shape[2], dtype=bool)
        stays[list(self.filling)] = True
        both: Array = ran | (chosen & stays)
        return both


class Accounting:
    """Collects one pass; a pass that fails is forgotten at the next `begin`."""

    def __init__(self, layers: Mapping[int, LayerRuntime], nbytes: Mapping[int, int]) -> None:
        """`layers` and the bytes that are read for one expert of each, by decoder layer."""
        order = sorted(layers)
        self._layers = [layers[layer] for layer in order]
        self._ranks = {layer: rank for rank, layer in enumerate(order)}
        self._experts = max(layer.experts for layer in self._layers)
        self._nbytes = np.array([nbytes[layer] for layer in order], dtype=np.int64)
        self._everything = all(pool.table.all_fit for layer in self._layers for pool in layer.pools)
        self._segment: Array = np.zeros(0, dtype=np.int64)
        self._segments = 0
        self._seen: list[tuple[int, torch.Tensor]] = []
        self._few: list[_Few] = []
        self._resident = np.ones((len(order), self._experts), dtype=bool)
        self._loaded = np.ones(len(order), dtype=bool)

    def begin(self, now: Pass) -> None:
        """A pass starts."""
        self._segments = len(now.segments)
        self._segment = np.repeat(np.arange(self._segments), [segment.tokens for segment in now.segments])
        self._seen.clear()
        self._few.clear()

    def observe(self, layer: int, ids: torch.Tensor) -> None:
        """A layer was reached: what its router chose [tokens, k], before any expert is asked for."""
        rank = self._ranks[layer]
        runtime = self._layers[rank]
        rows = runtime.owner.answering_of(runtime, ids.shape[0])
        if rows is None:
            self._seen.append((rank, ids))
        else:
            self._few.append(_Few(rank, rows, ids, runtime.owner.filling(runtime, ids)))
        if not self._everything:
            self._resident[rank, : runtime.experts] = runtime.ready()
            self._loaded[rank] = runtime.owner.counts(runtime)

    def end(self, planned: Array | None = None) -> StepUse:
        """The pass went well; `planned`: bool [layers, experts], the plan in force."""
        shape = (self._segments, len(self._layers), self._experts)
        if not self._seen and not self._few:
            zero = np.zeros(shape[:2], dtype=np.int64)
            return StepUse(zero, zero, zero, zero, zero, zero, None)
        wanted = np.zeros(shape, dtype=bool)
        ranks = np.array([rank for rank, _ in self._seen])
        for k, of in _by_width(self._seen):
            ids = stacked([self._seen[i][1] for i in of]).reshape(-1, len(of), k)
            wanted[self._segment[:, None, None], ranks[of][None, :, None], ids] = True
        for few in self._few:
            wanted[:, few.rank] = few.wanted(self._segment, shape)
        count = wanted.sum(axis=2)
        tokens = np.bincount(self._segment, minlength=self._segments)
        routed = np.zeros(shape[:2], dtype=np.int64)
        routed[:, ranks] = tokens[:, None]
        for few in self._few:
            routed[:, few.rank] = np.bincount(self._segment[few.rows], minlength=self._segments)
        rerouted = np.zeros(shape[:2], dtype=np.int64)
        inside = None if planned is None else (wanted & planned).sum(axis=2)
        if self._everything:
            return StepUse(count, rerouted, rerouted, rerouted, rerouted, routed, inside)
        hits = (wanted & self._resident).sum(axis=2)
        misses = count - hits
        loads = misses * self._loaded
        ran = [(rank, chosen, self._segment) for rank, chosen in self._seen]
        ran += [(few.rank, few.ids[few.rows], self._segment[few.rows]) for few in self._few]
        for rank, chosen, segment in ran:
            if not self._loaded[rank]:
                replaced = ~self._resident[rank][chosen.cpu().numpy()].all(axis=1)
                rerouted[:, rank] = np.bincount(segment, weights=replaced, minlength=self._segments)
        return StepUse(hits, misses, loads, loads * self._nbytes, rerouted, routed, inside)


def _by_width(seen: Sequence[tuple[int, torch.Tensor]]) -> list[tuple[int, list[int]]]:
    """The layers by how many experts a token chooses there: those of one width are counted together."""
    groups: dict[int, list[int]] = {}
    for i, (_, ids) in enumerate(seen):
        groups.setdefault(int(ids.shape[1]), []).append(i)
    return list(groups.items())
