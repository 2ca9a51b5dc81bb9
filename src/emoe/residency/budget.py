"""How many experts a budget holds, and how they are shared between layers. Pure arithmetic, no device."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from emoe.config import ExpertMemory, format_bytes
from emoe.errors import BudgetError

SLOT_ALIGN_BYTES = 64
"""Every part of a slot starts on a cache line: the kernels' vector path then never depends on which slot is used."""

DIRECT_ALIGN_BYTES = 512
"""Where O_DIRECT can write, so that an expert needs no copy (emoe.checkpoint.direct.SMALL_BLOCK)."""

DIRECT_PART_BYTES = 64 << 10
"""Experts with a part of this size are aligned for O_DIRECT: it costs them less than a hundredth."""


AUTO_SHARE = 0.8
"""Of the free memory: the rest is for what else the process and the page cache need."""

SPARE_SLOTS = 2
"""Slots beyond one token's experts: reads ahead may fill them, so that demand never waits for a place to read into."""

MAX_LANE, LANE_SHARE = 4, 24
"""Slots kept for experts that pass through: as many as loads are in flight, where that is at most one of so many.

With 4 instead of 2 of 182 slots a prompt in mode resident takes 11 % less time, with 8 no less than with 4
(docs/log.md)."""

MIN_PASSING, PASSING_BYTES = 4, 400 * 10**6
"""Experts that may pass through a bank while a prompt is read: at least so many, at most of so many bytes."""


def align_up(nbytes: int, to: int = SLOT_ALIGN_BYTES) -> int:
    """Return `nbytes` rounded up to a multiple of `to`."""
    return -(-nbytes // to) * to


def padded(part_nbytes: Sequence[int]) -> list[int]:
    """Return what each part of a slot takes, so that the next starts where it may."""
    to = DIRECT_ALIGN_BYTES if max(part_nbytes, default=0) >= DIRECT_PART_BYTES else SLOT_ALIGN_BYTES
    return [align_up(nbytes, to) for nbytes in part_nbytes]


@dataclass(frozen=True, slots=True)
class LayerNeed:
    """What one MoE layer asks of the budget.

    `slot_nbytes` is the aligned size of one of its experts, `group` names layers whose slots are interchangeable
    (equal part shapes); layers of one group share one bank.
    """

    layer: int
    experts: int
    top_k: int
    slot_nbytes: int
    group: int = 0


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """The slots of one bank.

    `quotas[layer]` slots belong to a layer; all zero means one pool shared by all layers. `lane` slots belong to none:
    they are kept for experts that only pass through (mode `resident` needs them to read a prompt with its own routes).
    """

    group: int
    slots: int
    slot_nbytes: int
    quotas: dict[int, int]
    lane: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the bank."""
        return self.slots * self.slot_nbytes

    @property
    def passing(self) -> int:
        """How many experts may pass through at once in a prompt: what the disk fills while attention computes.

        At 40 % memory a prompt of 512 tokens takes 12 % less time with 8 experts of 50 MB (gpt-oss) than with 4, and
        17 and 21 % less with 16 and 32 of 12.6 MB (OLMoE); decoding misses as before. At 20 % a quarter of the slots is
        4 to 6 % faster than an eighth, and decoding misses up to 0.6 % more (docs/log.md).
        """
        return max(MIN_PASSING, min(PASSING_BYTES // max(1, self.slot_nbytes), self.slots // 4))


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """The budget turned into slots."""

    budget_bytes: int
    floor_bytes: int
    total_bytes: int
    pools: tuple[PoolPlan, ...]

    @property
    def slots(self) -> int:
        """Number of slots over all banks."""
        return sum(pool.slots for pool in self.pools)

    @property
    def resident_bytes(self) -> int:
        """Bytes of all banks: at most the budget."""
        return sum(pool.nbytes for pool in self.pools)

    @property
    def all_resident(self) -> bool:
        """Whether every expert has a slot of its own."""
        return self.resident_bytes >= self.total_bytes


def floor_bytes(layers: Sequence[LayerNeed]) -> int:
    """Return the smallest budget that works: one token's experts of one layer, for each bank."""
    floors: dict[int, int] = {}
    for need in layers:
        floors[need.group] = max(floors.get(need.group, 0), need.top_k * need.slot_nbytes)
    return sum(floors.values())


def total_bytes(layers: Sequence[LayerNeed]) -> int:
    """Return the bytes of all experts of all layers, as slots."""
    return sum(need.experts * need.slot_nbytes for need in layers)


def plan_slots(
    memory: ExpertMemory | None,
    layers: Sequence[LayerNeed],
    *,
    lane: bool = False,
    shared_from: float = math.inf,
    popularity: Mapping[int, Sequence[float]] | None = None,
) -> SlotPlan:
    """Turn a budget into banks of slots and per-layer quotas.

    Args:
        memory: the budget; None makes every expert resident.
        layers: one entry per MoE layer, in any order.
        lane: keep up to MAX_LANE slots of each bank that does not hold everything out of the quotas.
        shared_from: an even share of this many times one token's experts makes one pool of the bank instead of
            quotas (the eviction rule knows from where that is better); not with a lane, nor where the budget itself
            is given per layer.
        popularity: the expected share of tokens per expert of each layer; when given, the quotas are those that leave
            the fewest expected misses (`popular_quotas`) instead of an even share, also where that is given per layer.

    Raises:
        BudgetError: the budget is below one step's experts of one layer; the message names the smallest that works.
    """
    total = total_bytes(layers)
    floor = floor_bytes(layers)
    per_layer: int | None = None
    if memory is None:
        budget = total
    elif memory.kind == "bytes":
        budget = int(memory.value)
    elif memory.kind == "share":
        budget = int(total * float(memory.value))
    else:
        per_layer = int(memory.value)
        budget = sum(min(per_layer, need.experts) * need.slot_nbytes for need in layers)
    if budget < floor:
        largest = max(layers, key=lambda need: need.top_k * need.slot_nbytes)
        raise BudgetError(
            f"expert memory of {format_bytes(budget)} is below the floor: one token needs {largest.top_k} experts of "
            f"{format_bytes(largest.slot_nbytes)} in layer {largest.layer} at once. The smallest budget that works is "
            f"{floor} bytes ({format_bytes(floor)}, {floor / total:.1%} of all experts)."
        )
    pools = _split(budget, layers, per_layer, lane, shared_from, popularity)
    return SlotPlan(budget_bytes=budget, floor_bytes=floor, total_bytes=total, pools=tuple(pools))


def _split(
    budget: int,
    layers: Sequence[LayerNeed],
    per_layer: int | None,
    lane: bool,
    shared_from: float,
    popularity: Mapping[int, Sequence[float]] | None,
) -> list[PoolPlan]:
    """Give each bank its floor, then share what is left by the bytes of the experts each still has outside."""
    groups: dict[int, list[LayerNeed]] = {}
    for need in sorted(layers, key=lambda need: need.layer):
        groups.setdefault(need.group, []).append(need)
    floors = {g: floor_bytes(needs) for g, needs in groups.items()}
    totals = {g: total_bytes(needs) for g, needs in groups.items()}
    spare = budget - sum(floors.values())
    wants = {g: totals[g] - floors[g] for g in groups}
    want_all = sum(wants.values())
    pools = []
    for group, needs in groups.items():
        size = needs[0].slot_nbytes
        if per_layer is not None:
            slots = sum(min(per_layer, need.experts) for need in needs)
        else:
            share = spare * wants[group] // want_all if want_all else 0
            slots = min((floors[group] + share) // size, sum(need.experts for need in needs))
        kept_out = 0
        if lane and slots < sum(need.experts for need in needs):
            # What an even share leaves over costs no layer anything; one slot is the least that works.
            spare_slots = slots - sum(min(need.top_k, need.experts) for need in needs)
            kept_out = max(1, min(MAX_LANE, spare_slots, max(slots % len(needs), slots // LANE_SHARE)))
        partial = slots < sum(need.experts for need in needs)
        if partial and popularity is not None:
            quotas = popular_quotas(slots - kept_out, needs, popularity)
        else:
            quotas = uniform_quotas(slots - kept_out, needs)
        if (
            partial
            and popularity is None
            and not lane
            and per_layer is None
            and all(quotas[n.layer] >= shared_from * n.top_k for n in needs)
        ):
            quotas = dict.fromkeys(quotas, 0)
        pools.append(PoolPlan(group, slots, size, quotas, kept_out))
    return pools


def uniform_quotas(slots: int, layers: Sequence[LayerNeed]) -> dict[int, int]:
    """Share `slots` evenly between layers, none above its number of experts.

    When an even share cannot hold one token's experts, quotas would make every visit evict what the same visit just
    loaded (layers come round cyclically), so all quotas are 0: one pool, shared.
    """
    quotas = {need.layer: 0 for need in layers}
    left = slots
    open_layers = list(layers)
    while left and open_layers:
        share = max(1, left // len(open_layers))
        for need in list(open_layers):
            take = min(share, need.experts - quotas[need.layer], left)
            quotas[need.layer] += take
            left -= take
            if quotas[need.layer] == need.experts:
                open_layers.remove(need)
    if any(quotas[need.layer] < min(need.top_k, need.experts) for need in layers):
        return {need.layer: 0 for need in layers}
    return quotas


def popular_quotas(
    slots: int, layers: Sequence[LayerNeed], popularity: Mapping[int, Sequence[float]]
) -> dict[int, int]:
    """Share `slots` between layers so that the expected misses are fewest.

    Every layer sees the same tokens, so the misses expected of a layer with quota q are the shares of its experts
    beyond the q most popular. Each layer gets one token's experts; then every slot goes where the next expert's share
    is largest. Gains fall with every slot a layer gets, so no other split is better. Ties go to the layer with fewer.

    Args:
        slots: what is to be shared.
        layers: the layers of one bank.
        popularity: expected share of tokens per expert, for each layer, in any order of experts.

    Returns:
        The quota of each layer; all 0 where one token's experts of every layer do not fit, as in `uniform_quotas`.

    Raises:
        BudgetError: a layer whose popularity is not given, or not of all its experts.
    """
    ranked: dict[int, list[float]] = {}
    for need in layers:
        given = popularity.get(need.layer, ())
        if len(given) != need.experts:
            raise BudgetError(
                f"the popularity of layer {need.layer} is known for {len(given)} of its {need.experts} experts: it "
                "belongs to another model. Make a profile of this one, or use layer_split='uniform'."
            )
        ranked[need.layer] = sorted(map(float, given), reverse=True)
    quotas = {need.layer: min(need.top_k, need.experts) for need in layers}
    left = min(slots, sum(need.experts for need in layers)) - sum(quotas.values())
    if left < 0:
        return dict.fromkeys(quotas, 0)

    def offer(layer: int) -> tuple[float, int, int]:
        return -ranked[layer][quotas[layer]], quotas[layer], layer

    offers = [offer(need.layer) for need in layers if quotas[need.layer] < need.experts]
    heapq.heapify(offers)
    for _ in range(left):
        _, _, layer = heapq.heappop(offers)
        quotas[layer] += 1
        if quotas[layer] < len(ranked[layer]):
            heapq.heappush(offers, offer(layer))
    return quotas


@dataclass(frozen=True, slots=True)
class HostPlan:
    """Slots of the host tier by bank. `budget_bytes` is what was asked for, `floor_bytes` what reading needs.

    `floors` are the floor's slots: a bank with no more than these reads through the host and keeps nothing there.
    """

    budget_bytes: int
    floor_bytes: int
    pools: dict[int, PoolPlan]
    floors: dict[int, int] = field(default_factory=dict)

    def keeps(self, group: int) -> bool:
        """Whether a bank's host slots are there to keep experts."""
        return self.pools[group].slots > self.floors.get(group, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(pool.nbytes for pool in self.pools.values())


def plan_host(
    asked: ExpertMemory | str | None, plan: SlotPlan, needs: Sequence[LayerNeed], available_bytes: int
) -> HostPlan:
    """Turn host memory into slots for each bank of `plan`.

    Args:
        asked: what `parse_host_memory` made of it; None is "auto".
        plan: the device's slots.
        needs: what each layer asks, grouped as in `plan`.
        available_bytes: free memory of the machine, for "auto".

    Every bank gets the floor, through which experts are read; what is left is shared by the bytes of all experts. Where
    the device holds every expert, nothing is ever asked of the host a second time: the floor is all.
    """
    groups: dict[int, list[LayerNeed]] = {}
    for need in needs:
        groups.setdefault(need.group, []).append(need)
    totals = {group: sum(need.experts for need in own) for group, own in groups.items()}
    floors = {g: min(totals[g], max(need.top_k for need in own) + SPARE_SLOTS) for g, own in groups.items()}
    total = total_bytes(needs)
    sizes = {group: own[0].slot_nbytes for group, own in groups.items()}
    floor = sum(floors[group] * sizes[group] for group in groups)
    if asked == "0" or plan.all_resident:
        budget = 0
    elif isinstance(asked, ExpertMemory):
        budget = int(total * float(asked.value)) if asked.kind == "share" else int(asked.value)
    else:
        budget = int(AUTO_SHARE * available_bytes)
    left = max(0, min(budget, total) - floor)
    wants = {group: (totals[group] - floors[group]) * sizes[group] for group in groups}
    want_all = sum(wants.values())
    pools = {}
    for group, own in groups.items():
        share = left * wants[group] // want_all if want_all else 0
        slots = min(totals[group], floors[group] + share // sizes[group])
        pools[group] = PoolPlan(group, slots, sizes[group], {need.layer: 0 for need in own})
    return HostPlan(budget, floor, pools, floors)
