"""Which device runs which layer's experts, and the pools that bring them there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from transformers import PreTrainedModel

from emoe.checkpoint.index import ExpertIndex
from emoe.checkpoint.memory_room import memory_room
from emoe.checkpoint.readers import Reader
from emoe.config import ON_MISS, ExpertMemory, Mode, OnMiss
from emoe.errors import UsageError
from emoe.kernels.slots import SlotKernels, available
from emoe.model.hybrid import Costs, Hybrid, measure
from emoe.model.loading import device_of
from emoe.model.runtime import LayerRuntime
from emoe.residency.bank import Bank
from emoe.residency.budget import HostPlan, LayerNeed, SlotPlan, plan_host
from emoe.residency.devices import Device, device_at
from emoe.residency.host import HostTier
from emoe.residency.loader import Loader
from emoe.residency.pool import ExpertPool, Progress
from emoe.residency.table import ResidencyTable
from emoe.residency.transfers import Transfers, copy_seconds


@dataclass(frozen=True, slots=True)
class Placement:
    """What each layer needs, those of one group on one device; `devices` by group."""

    needs: list[LayerNeed]
    devices: dict[int, Device]

    @property
    def spread(self) -> bool:
        """Whether there is more than one device."""
        return len(set(map(id, self.devices.values()))) > 1

    @property
    def copies(self) -> bool:
        """Whether experts reach some device by copies from host memory."""
        return any(device.copies for device in self.devices.values())


def place(model: PreTrainedModel, index: ExpertIndex, needs: Sequence[LayerNeed]) -> Placement:
    """Experts live where their layer's router lies, as `device_map` has put it: one bank for each device and group.

    Raises:
        UnsupportedModelError: a layer lies on neither a CPU nor a CUDA device.
    """
    modules = {entry.layer: entry.module for entry in index.layers}
    devices: dict[torch.device, Device] = {}
    groups: dict[tuple[int, torch.device], int] = {}
    placed = []
    for need in needs:
        at = device_of(model.get_submodule(modules[need.layer].rpartition(".")[0]))
        if at not in devices:
            devices[at] = device_at(at)
        placed.append(replace(need, group=groups.setdefault((need.group, at), len(groups))))
    return Placement(placed, {group: devices[at] for (_, at), group in groups.items()})


def host_plan(asked: ExpertMemory | str | None, placement: Placement, plan: SlotPlan) -> HostPlan | None:
    """The host tier's slots; None where no device is reached by copies."""
    if not placement.copies:
        return None
    copying = {group for group, device in placement.devices.items() if device.copies}
    needs = [need for need in placement.needs if need.group in copying]
    return plan_host(asked, plan, needs, memory_room().available_bytes)


def check_settings(host: ExpertMemory | str | None, on_miss: str, mode: Mode, copies: bool) -> None:
    """Refuse what only a GPU can do where there is none; `copies` says that experts are copied to a device.

    Raises:
        UsageError: host memory or on_miss "hybrid" is asked for without one, or on_miss beside a mode that reroutes.
    """
    if host not in (None, "0") and not copies:
        raise UsageError(
            f"host memory ({host}) is for experts that run on a GPU, and these run on the CPU, whose memory is the "
            "expert memory itself: give --expert-memory (expert_memory=) that much, or put the model on a GPU with "
            "device_map."
        )
    if on_miss not in ON_MISS:
        raise UsageError(f"on_miss is one of {', '.join(ON_MISS)}, not {on_miss!r}")
    if on_miss == "hybrid" and (mode != "exact" or not copies):
        raise UsageError(
            "on_miss 'hybrid' computes missed experts on the CPU beside a GPU: it needs mode 'exact' and the model on "
            "a GPU (device_map); on a CPU every expert is computed there anyway."
        )


def make_pool(
    table: ResidencyTable, bank: Bank, device: Device, host: HostPlan | None, index: ExpertIndex, reader: Reader,
    loader: Loader,
) -> ExpertPool:  # fmt: skip
    """One bank at work on `device`, through host slots where it is reached by copies."""
    pool = ExpertPool(table, bank, index, reader, loader)
    if device.copies and host is not None:
        group = table.plan.group
        tier = HostTier(device, bank.parts, host.pools[group], table.experts, host.keeps(group))
        seconds = copy_seconds(device, tier.memory(0), bank.memories[0])
        pool.transfers = Transfers(device, bank, tier, loader, pool.read, seconds)
    return pool


def equip(layers: Iterable[LayerRuntime], on_miss: OnMiss) -> None:
    """Give layers the kernels that their device has, and, where asked for, the rule by which the CPU takes misses."""
    costs: dict[int, Costs] = {}
    for layer in layers:
        parts = layer.pool.bank.stacked()
        if available(parts)[0]:
            layer.kernels = SlotKernels(layer.math, parts)
        if on_miss == "hybrid":
            pool = layer.pool
            if id(pool) not in costs:
                costs[id(pool)] = measure(layer.math, pool, layer.weights[0].down.shape[1], layer.dtype)
            layer.hybrid = Hybrid(layer.math, pool, costs[id(pool)])


def preload(pools: Sequence[ExpertPool], progress: bool | Progress) -> None:
    """Everything fits: read every expert now, with progress, so that no request waits."""
    total = sum(pool.bank.nbytes for pool in pools)
    before = 0
    for pool in pools:
        keys = [(layer, e) for layer, n in sorted(pool.table.experts.items()) for e in range(n)]
        if callable(progress):
            report: Progress | None = lambda done, _, base=before, call=progress: call(base + done, total)  # noqa: E731
            pool.preload(keys, report)
        elif progress:
            _preload_with_bar(pool, keys)
        else:
            pool.preload(keys)
        before += pool.bank.nbytes


def _preload_with_bar(pool: ExpertPool, keys: list[tuple[int, int]]) -> None:
    from tqdm.auto import tqdm

    with tqdm(total=pool.bank.nbytes, unit="B", unit_scale=True, unit_divisor=1024, desc="Loading experts") as bar:
        pool.preload(keys, lambda done, _: cast(None, bar.update(done - bar.n)))
