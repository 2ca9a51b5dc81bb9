"""Misses computed on the CPU, from host memory, where that is faster than bringing the expert to the device.

A token needs an expert's weights once: read by the CPU where they lie, they need not cross the link. The route is the
model's own, but the CPU rounds differently from the device, so what is computed where shows in the last bits. Whether
it pays is decided by times measured when the model is loaded, so that the same residency gives the same choice.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from emoe.kernels.experts import ExpertMath, Weights, finish_token, rows_of_token
from emoe.kernels.slots import SlotKernels, sent
from emoe.residency.pool import ExpertPool

LABEL = "exact routes; CPU arithmetic for misses"

AHEAD = 1
"""Experts computed on the CPU that are brought to the device meanwhile, at once, so that it holds what is used now."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds: one expert over the link, one expert's product on the CPU, and the hidden rows there and back."""

    link_s: float
    cpu_s: float
    rows_s: float

    def cpu_is_faster(self, experts: int) -> bool:
        """Whether computing so many experts on the CPU takes less than bringing them."""
        return experts > 0 and self.rows_s + experts * self.cpu_s < experts * self.link_s


@dataclass(slots=True)
class Hybrid:
    """The rule for one bank. `computed` counts experts run on the CPU."""

    math: ExpertMath
    pool: ExpertPool
    costs: Costs
    computed: int = 0
    _bound: dict[int, Weights] = field(default_factory=dict)

    def aside(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Which of these the CPU should compute: those that only the host holds, all or none of them."""
        transfers = self.pool.transfers
        if transfers is None:
            return []
        host, table = transfers.host.table, self.pool.table
        found = [e for e in experts if table.find((layer, e)) is None and host.is_resident((layer, e))]
        return found if self.costs.cpu_is_faster(len(found)) else []

    def weights(self, layer: int, expert: int) -> Weights:
        """An expert's weights where they lie in host memory."""
        transfers = self.pool.transfers
        slot = None if transfers is None else transfers.host.seek((layer, expert))
        if transfers is None or slot is None:
            raise RuntimeError(f"expert {expert} of layer {layer} left the host while in use: a defect in emoe.")
        if slot not in self._bound:
            self._bound[slot] = self.math.bind(transfers.host.views(slot))
        transfers.host.for_computing(slot)
        return self._bound[slot]

    def one_token(
        self,
        layer: int,
        hidden: tuple[torch.Tensor, torch.Tensor],
        experts: Sequence[int],
        aside: Sequence[int],
        there: tuple[Sequence[int], Sequence[Weights], SlotKernels | None],
        gates: torch.Tensor,
    ) -> torch.Tensor:
        """Run one token through its experts, some on the device and some on the CPU at the same time.

        Args:
            layer: the layer.
            hidden: [1, hidden], on the device, and the same on the CPU.
            experts: the k chosen, best first.
            aside: those for the CPU.
            there: slots and weights of the others, in the order of `experts`, and the device's kernels.
            gates: [1, k] router weights.

        Returns:
            [1, hidden].
        """
        here, at_home = hidden
        slots, weights, kernels = there
        parts = []
        if slots:
            parts.append(_rows(self.math, here, slots, weights, kernels))
        bound = [self.weights(layer, expert) for expert in aside]
        parts.append(sent(_rows(self.math, at_home, (), bound, None), here.device))
        order = [row for row, expert in enumerate(experts) if expert not in aside]
        order += [experts.index(expert) for expert in aside]
        rows = torch.cat(parts)
        outer = torch.empty_like(rows).index_copy_(0, sent(torch.tensor(order), here.device), rows)
        self.computed += len(aside)
        self.pool.table.counters[layer].misses += len(aside)
        self.pool.prefetches.ask([(layer, expert) for expert in aside], AHEAD)
        return finish_token(self.math, outer, gates, here.dtype, bound[0])


def _rows(
    math: ExpertMath,
    hidden: torch.Tensor,
    slots: Sequence[int],
    weights: Sequence[Weights],
    kernels: SlotKernels | None,
) -> torch.Tensor:
    """[experts, hidden]: each expert's own output."""
    if kernels is not None:
        return kernels.rows(hidden, slots)
    return torch.cat([rows_of_token(math, hidden, [each]) for each in weights])


def measure(math: ExpertMath, pool: ExpertPool, hidden: int, dtype: torch.dtype, times: int = 5) -> Costs:
    """Time an expert of zeros on the CPU, and a row to the device and back. `link_s` the transfers have measured.

    Raises:
        RuntimeError: the pool's device is not reached by copies: a defect in emoe.
    """
    transfers = pool.transfers
    if transfers is None:
        raise RuntimeError("only experts that are copied to a device can be computed aside: a defect in emoe.")
    row = torch.zeros(1, hidden, dtype=dtype)
    transfers.host.memory(0).zero_()
    weights = [math.bind(transfers.host.views(0))]
    device, cpu_s, rows_s = pool.bank.device, [], []
    for _ in range(times):
        start = time.perf_counter()
        _rows(math, row, (), weights, None)
        cpu_s.append(time.perf_counter() - start)
        start = time.perf_counter()
        row.to(device).to("cpu")
        rows_s.append(time.perf_counter() - start)
    return Costs(transfers.link_s, min(cpu_s), min(rows_s))
