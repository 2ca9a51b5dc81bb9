"""One MoE layer of a bound model: its pool of experts, and how they are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from emoe.kernels.experts import ExpertMath, Weights
from emoe.kernels.slots import SlotKernels, sent
from emoe.model.hybrid import Hybrid
from emoe.model.spreading import Spread
from emoe.residency.pool import ExpertPool

if TYPE_CHECKING:
    from emoe.model.runtime import Runtime


@dataclass(slots=True)
class LayerRuntime:
    """One MoE layer bound to its pool.

    `waits`: a miss is loaded and waited for, also in a mode that reroutes (`balanced`, where the layer is sensitive for
    the running task). `keeps_route`: whether the visit now under way runs the model's own route. `kernels`: those that
    take slots by number, where the device has them. `hybrid`: when to compute a miss on the CPU, where that is allowed.
    `spread`: the devices over which its experts are spread; `pool` is then the layer's own.
    `noted`: on its way from the device, what the model's own route was before rerouting, for the counters.
    """

    layer: int
    experts: int
    pool: ExpertPool
    math: ExpertMath
    owner: Runtime
    weights: list[Weights]
    dtype: torch.dtype
    waits: bool = False
    keeps_route: bool = True
    kernels: SlotKernels | None = None
    hybrid: Hybrid | None = None
    prompt_counts: list[int] = field(default_factory=list)
    spread: Spread | None = None
    noted: Callable[[], tuple[torch.Tensor, ...]] | None = None
    _mask_key: tuple[int, ...] = ()
    _mask: torch.Tensor | None = None

    @property
    def pools(self) -> list[ExpertPool]:
        """Its pool, or those over which its experts are spread."""
        return [self.pool] if self.spread is None else [shard.pool for shard in self.spread.shards]

    def ready(self) -> npt.NDArray[np.bool_]:
        """bool [experts]: which can be run now and are not being run."""
        return np.concatenate([pool.table.ready(self.layer) for pool in self.pools])

    def wanted(self, counts: Sequence[int] | None = None) -> frozenset[int]:
        """The experts that this prompt's tokens chose most so far: as many as the layer has slots of its own.

        `counts`: how often each was chosen; by default by the prompt's tokens before this pass.
        """
        counts = self.prompt_counts if counts is None else counts
        quota = self.pool.table.plan.quotas[self.layer]
        order = sorted(range(self.experts), key=lambda e: (-counts[e], e))
        return frozenset(order[:quota])

    def counts_with(self, ids: torch.Tensor) -> list[int]:
        """How often this prompt chose each expert, those `ids` included."""
        found: list[int] = torch.bincount(ids.reshape(-1), minlength=self.experts).tolist()
        return [n + more for n, more in zip(self.prompt_counts or [0] * self.experts, found, strict=True)]

    def allowed(self) -> torch.Tensor | None:
        """The [experts] mask of what may be run, or None where the model's own route is kept.

        A layer of which nothing is resident (a prompt that was to fill it has failed) keeps its route, and loads.
        """
        if self.keeps_route:
            return None
        resident = tuple(self.pool.table.resident(self.layer))
        if len(resident) == self.experts:
            return None
        if resident != self._mask_key or self._mask is None:
            mask = torch.zeros(self.experts, dtype=torch.bool)
            mask[list(resident)] = True
            self._mask_key, self._mask = resident, sent(mask, self.pool.bank.device)
        return self._mask
