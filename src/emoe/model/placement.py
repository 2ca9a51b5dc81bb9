"""Which device runs which layer's experts, and the pools that bring them there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from emoe.checkpoint.index import ExpertIndex
from emoe.checkpoint.memory_room import memory_room
from emoe.checkpoint.readers import Reader
from emoe.config import ON_MISS, ExpertMemory, Mode, OnMiss
from emoe.errors import UsageError
from emoe.kernels.slots import SlotKernels, available
from emoe.model.hybrid import Costs, Hybrid, measure
from emoe.model.layer import LayerRuntime
from emoe.model.loading import device_of
from emoe.model.spreading import PartIndex, measure_spread
from emoe.residency.bank import Bank
from emoe.residency.budget import HostPlan, LayerNeed, SlotPlan, plan_host
from emoe.residency.devices import Device, device_at
from emoe.residency.gpus import gpu_number
from emoe.residency.host import HostTier
from emoe.residency.loader import Loader
from emoe.residency.pool import ExpertPool, Progress
from emoe.residency.table import ResidencyTable
from emoe.residency.transfers import Transfers, copy_seconds


@dataclass(frozen=True, slots=True)
class Placement:
    """What each layer needs, those of one group on one device; `devices` by group.

    `firsts`: by group and layer, the first of the layer's experts that lie there, where they are spread over devices.
    `told`: why they are, or not; empty where that was not asked for.
    """

    needs: list[LayerNeed]
    devices: dict[int, Device]
    firsts: dict[int, dict[int, int]] = field(default_factory=dict)
    told: str = ""

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


def spread_over(
    names: Sequence[str] | None, spread: str, placement: Placement, resident_share: float, row: torch.Tensor
) -> Placement:
    """The same with every layer's experts spread over devices, where that is faster ("auto") or in any case ("always").

    Args:
        names: the devices, the layers' own among them; None: as they are.
        spread: one of SPREADS.
        placement: all layers on one device.
        resident_share: of the experts; the others miss, as if all were chosen alike.
        row: a hidden state [1, hidden] in the model's dtype, on the layers' device.

    Raises:
        UsageError: the layers lie on several devices, or on none of `names`.
    """
    if names is None:
        return placement
    homes = {id(device): device for device in placement.devices.values()}
    (home, *others) = homes.values()
    places = [_numbered(torch.device(name)) for name in names]
    if others or home.place not in places:
        raise UsageError(
            f"the layers lie on {', '.join(str(device.place) for device in homes.values())}: to spread their experts, "
            f"put them on one of the expert devices ({', '.join(names)}) with device_map."
        )
    if len(places) == 1:
        return placement
    devices = [home, *(device_at(place) for place in places if place != home.place)]
    k = min(need.top_k for need in placement.needs)
    costs = measure_spread(devices, max(need.slot_nbytes for need in placement.needs), row)
    saved = costs.saved_s(k, len(devices), 1 - resident_share)
    told = (
        f"spread over {len(devices)} devices a layer's token takes {abs(saved) * 1e6:.0f} us "
        f"{'less' if saved > 0 else 'more'} (copy {costs.link_s * 1e6:.0f} us, hop {costs.hop_s * 1e6:.0f} us)"
    )
    # With fewer slots on each device, they miss more than all of them together would.
    held = all(resident_share * (need.experts // len(devices)) >= need.top_k for need in placement.needs)
    if spread == "auto" and not held:
        return replace(
            placement, told=f"not spread: a device's slots of a layer hold less than one token's experts; {told}"
        )
    if spread == "auto" and saved <= 0:
        return replace(placement, told=f"not spread: {told}")
    needs: list[LayerNeed] = []
    homes_of: dict[int, Device] = {}
    firsts: dict[int, dict[int, int]] = {}
    for need in placement.needs:
        for number, device in enumerate(devices):
            group = need.group * len(devices) + number
            first = need.experts * number // len(devices)
            count = need.experts * (number + 1) // len(devices) - first
            if count:
                needs.append(replace(need, experts=count, top_k=min(need.top_k, count), group=group))
                firsts.setdefault(group, {})[need.layer] = first
                homes_of[group] = device
    return Placement(needs, homes_of, firsts, f"spread: {told}")


def check_device_map(device_map: object) -> None:
    """Refuse, before anything is read, a place that this machine does not have.

    Raises:
        UsageError: accelerate is not installed, which transformers places modules with; no device that experts can run
            on has that name; there is no such GPU.
    """
    if device_map is None:
        return
    if find_spec("accelerate") is None:
        raise UsageError("putting a model on a device needs accelerate: pip install accelerate.")
    if not isinstance(device_map, str) or device_map in _SPREAD_BY_ACCELERATE:
        return
    gpu_number(device_map, "Leave it out to run on the CPU, or install a driver and torch's CUDA build.")


_SPREAD_BY_ACCELERATE = ("auto", "balanced", "balanced_low_0", "sequential")


def _numbered(place: torch.device) -> torch.device:
    """ "cuda" is the current device."""
    return torch.device("cuda", torch.cuda.current_device()) if str(place) == "cuda" else place


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
    loader: Loader, firsts: Mapping[int, int] | None = None,
) -> ExpertPool:  # fmt: skip
    """One bank at work on `device`, through host slots where it is reached by copies.

    `firsts`: the number of the first of its experts in each layer, where experts are spread.
    """
    numbered: Any = index if firsts is None else PartIndex(index, firsts)
    pool = ExpertPool(table, bank, numbered, reader, loader)
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
        for shard in () if layer.spread is None else layer.spread.shards:
            parts = shard.pool.bank.stacked()
            shard.kernels = SlotKernels(layer.math, parts) if available(parts)[0] else None
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
