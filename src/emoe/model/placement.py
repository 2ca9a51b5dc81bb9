"""Which device runs which layer's experts, and the pools that bring them there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from transformers import PreTrainedModel

from emoe.checkpoint.index import ExpertIndex
from emoe.checkpoint.memory_room import memory_room
from emoe.checkpoint.readers import Reader
from emoe.config import ExpertMemory
from emoe.errors import UsageError
from emoe.model.loading import device_of
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
    """The host tier's slots; None where no device is reached by copies.

    Raises:
        UsageError: host memory was asked for, and the experts run in the machine's own memory.
    """
    if not placement.copies:
        refuse_host_memory(asked)
        return None
    copying = {group for group, device in placement.devices.items() if device.copies}
    needs = [need for need in placement.needs if need.group in copying]
    return plan_host(asked, plan, needs, memory_room().available_bytes)


def refuse_host_memory(asked: ExpertMemory | str | None) -> None:
    """Raise UsageError where host memory was asked for and there is no device that copies from it."""
    if asked not in (None, "0"):
        raise UsageError(
            f"host memory ({asked}) is for experts that run on a GPU, and these run on the CPU, whose memory is the "
            "expert memory itself: give --expert-memory (expert_memory=) that much, or put the model on a GPU with "
            "device_map."
        )


def make_pool(
    table: ResidencyTable, bank: Bank, device: Device, host: HostPlan | None, index: ExpertIndex, reader: Reader,
    loader: Loader,
) -> ExpertPool:  # fmt: skip
    """One bank at work on `device`, through host slots where it is reached by copies."""
    pool = ExpertPool(table, bank, index, reader, loader)
    if device.copies and host is not None:
        tier = HostTier(device, bank.parts, host.pools[table.plan.group], table.experts)
        seconds = copy_seconds(device, tier.memory(0), bank.memories[0])
        pool.transfers = Transfers(device, bank, tier, loader, pool.read, seconds)
    return pool


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
