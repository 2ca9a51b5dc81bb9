"""The experts of one layer spread over several devices: each is computed where it lies, and its rows come back.

A token's hidden state is a few KiB, an expert is MiB: rows travel, weights do not. What is gained is the devices'
memory together, and their links together, for the misses of one layer; what it costs is a hop there and back.
Every (token, choice) pair has its own row, which is computed as on one device, and rows are added in the router's order
where the layer lies: no bit changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch

from emoe.checkpoint.index import ExpertIndex
from emoe.errors import UsageError
from emoe.kernels.chunks import finish_chunk, rows_of_chunk
from emoe.kernels.combining import Workspace
from emoe.kernels.experts import ExpertMath, Weights, finish_token, rows_of_token
from emoe.kernels.grouping import Grouping
from emoe.kernels.slots import SlotKernels, sent
from emoe.residency.devices import Device
from emoe.residency.pool import ExpertPool
from emoe.residency.transfers import copy_seconds


class PartIndex:
    """A checkpoint's experts under the numbers that a shard gives them."""

    def __init__(self, index: ExpertIndex, firsts: Mapping[int, int]) -> None:
        """`firsts`: the first expert of each layer."""
        self.path = index.path
        self._index = index
        self._firsts = firsts

    def pieces(self, layer: int, expert: int) -> Any:
        """The pieces of an expert."""
        return self._index.pieces(layer, self._firsts[layer] + expert)


@dataclass(slots=True)
class Shard:
    """The experts `first` to `first + count` of a layer, in one bank, under numbers from 0 up."""

    pool: ExpertPool
    first: int
    count: int
    weights: list[Weights]
    kernels: SlotKernels | None = None
    workspace: Workspace = field(default_factory=Workspace)

    @property
    def device(self) -> Device:
        """Where it lies."""
        return self.pool.bank.home

    def holds(self, expert: int) -> bool:
        """Whether an expert of the layer is one of these."""
        return self.first <= expert < self.first + self.count


@dataclass(slots=True)
class Spread:
    """One layer over its shards, the first of which lies with the layer."""

    layer: int
    math: ExpertMath
    shards: list[Shard]

    def one_token(self, hidden: torch.Tensor, experts: Sequence[int], gates: torch.Tensor, count: bool) -> torch.Tensor:
        """Run one token: all loads begin before anything waits for one.

        Args:
            hidden: [1, hidden].
            experts: the k chosen, best first.
            gates: [1, k] router weights.
            count: whether hits and misses are counted.

        Returns:
            [1, hidden].

        Raises:
            ReadError: an expert could not be read.
        """
        home = self.shards[0].device
        like: Weights | None = None
        takings = []
        try:
            for shard in self.shards:
                places = [place for place, expert in enumerate(experts) if shard.holds(expert)]
                if places:
                    own = [experts[place] - shard.first for place in places]
                    takings.append((shard, places, shard.pool.begin(self.layer, own, count=count)))
            there = [shard.device.receive(hidden, home) for shard, _, _ in takings]
            arrived: list[tuple[list[int], torch.Tensor, Device]] = []
            for (shard, places, taking), row in zip(takings, there, strict=True):
                while taking.flights:
                    shard.pool.arrive(taking)
                if shard.kernels is not None:
                    rows = shard.kernels.rows(row, taking.slots)
                else:
                    weights = [shard.weights[slot] for slot in taking.slots]
                    like = like or weights[0]
                    rows = rows_of_token(self.math, row, weights)
                shard.pool.end(taking)  # at once: its last use is what has been given to compute so far
                taking.slots = []
                arrived.append((places, rows, shard.device))
        except BaseException:
            for shard, _, taking in takings:
                shard.pool.end(taking)
            raise
        order = torch.tensor([place for places, _, _ in arrived for place in places])
        outer = torch.cat([home.receive(rows, device) for _, rows, device in arrived])
        outer = torch.empty_like(outer).index_copy_(0, sent(order, outer.device), outer)
        return finish_token(self.math, outer, gates, hidden.dtype, like)

    def chunk(
        self, hidden: torch.Tensor, grouping: Grouping, gates: torch.Tensor, prefill: bool, count: bool
    ) -> torch.Tensor:
        """Run a chunk; the arguments are those of `emoe.kernels.chunks.many_tokens` and of `ExpertPool.stream`."""
        if not grouping.counts:
            return torch.zeros_like(hidden)
        home = self.shards[0].device
        parts = []
        with ExitStack() as ending:  # every stream is closed, whatever one of them raises
            start = 0
            for shard in self.shards:
                part = grouping.part(start, [e for e in grouping.blocks if shard.holds(e)])
                start += part.rows
                if part.blocks:
                    order = [e - shard.first for e in grouping.by_count() if shard.holds(e)]
                    together = shard.kernels is not None
                    stream = shard.pool.stream(self.layer, order, prefill=prefill, count=count, together=together)
                    ending.callback(shard.workspace.trim)
                    ending.callback(stream.close)  # type: ignore[attr-defined]
                    parts.append((shard, part, stream, next(stream)))  # every link is busy before anything is computed
            outer = hidden.new_empty(start, hidden.shape[1])
            found = []
            for shard, part, stream, wave in parts:
                there, gather = shard.device.receive(hidden, home), shard.device.receive(part.gather, home)
                waves = ([(expert + shard.first, slot) for expert, slot in each] for each in chain([wave], stream))
                found.append(self._rows(shard, there, part.at(gather), waves))
            at = 0
            for (shard, part, _, _), rows in zip(parts, found, strict=True):
                outer[at : at + part.rows] = home.receive(rows, shard.device)
                at += part.rows
        return finish_chunk(self.math, outer, grouping, gates, hidden.dtype, self.shards[0].workspace)

    def _rows(
        self, shard: Shard, hidden: torch.Tensor, part: Grouping, waves: Iterator[list[tuple[int, int]]]
    ) -> torch.Tensor:
        if shard.kernels is not None:
            return shard.kernels.rows_of_chunk(hidden, part, waves, shard.workspace)
        ready = ((expert, shard.weights[slot]) for wave in waves for expert, slot in wave)
        return rows_of_chunk(self.math, hidden, part, ready, shard.workspace)


def expected_most(k: int, devices: int) -> float:
    """Experts of one token on the device that gets most of them, if each of k falls on any of `devices` alike.

    P(most <= m) is k! / devices^k times the coefficient of x^k in (sum over i <= m of x^i / i!)^devices.
    """
    expected = 0.0
    for most in range(k):
        series = [1.0]
        for _ in range(devices):
            series = [
                sum(series[n - i] / math.factorial(i) for i in range(min(most, n) + 1) if n - i < len(series))
                for n in range(k + 1)
            ]
        expected += 1 - series[k] * math.factorial(k) / devices**k
    return expected


@dataclass(frozen=True, slots=True)
class SpreadCosts:
    """Seconds: one expert over a link (the slowest), and a token's hidden state to another device and back."""

    link_s: float
    hop_s: float

    def saved_s(self, k: int, devices: int, miss_rate: float) -> float:
        """What spreading saves of a token's time in one layer, if so many of its k experts are missing.

        Only copies are counted: that devices also compute side by side is not measured, and left out.
        """
        return (k - expected_most(k, devices)) * miss_rate * self.link_s - self.hop_s


def measure_spread(devices: Sequence[Device], slot_nbytes: int, row: torch.Tensor, times: int = 5) -> SpreadCosts:
    """Time copies to each of `devices`, and a row from the first to the others and back."""
    home, links, hops = devices[0], [], []
    for device in devices:
        bank, held = device.bank(slot_nbytes), device.host(slot_nbytes)
        links.append(copy_seconds(device, held.memory, bank))
        device.free_host(held)
    for device in devices[1:]:
        taken = []
        for _ in range(times):
            begun = home.clock()
            (_,) = home.fetch(home.receive(device.receive(row, home), device))()
            taken.append(home.clock() - begun)
        hops.append(min(taken))
    return SpreadCosts(max(links), sum(hops))


def check_spreading(devices: Sequence[str] | None, spread: str, mode: str, plain: bool) -> None:
    """Refuse what spread experts do not do. `plain`: nothing looks ahead, reroutes, scores or computes elsewhere.

    Raises:
        UsageError: it names what is asked for.
    """
    if spread not in SPREADS:
        raise UsageError(f"spread is one of {', '.join(SPREADS)}, not {spread!r}")
    if devices is None:
        return
    if len(set(devices)) != len(devices) or not devices:
        raise UsageError(f"expert devices are one or more, each named once, not {', '.join(devices) or 'none'}")
    if mode != "exact" or not plain:
        raise UsageError(
            "experts spread over devices run in mode 'exact', with eviction least-stale, lru or lfu, without a "
            "predictor, a prefetch, a layer split or on_miss 'hybrid': leave out these, or the expert devices."
        )


SPREADS = ("auto", "always")
"""Spread a layer's experts over the expert devices where that is faster by measurement, or in any case."""
