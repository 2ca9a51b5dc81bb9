"""The virtual clock: how long tokens take when loads share a link and layers compute.

A layer's demand loads follow each other on the link, and the layer computes when they have come. What was prefetched
travels while layers compute, one expert at a time, in the order asked for; a demand load waits for the one under way
and goes before the others. An expert that is routed to before its prefetch has come is waited for like a miss. The
clock does not feed back: what is resident when, and every count, is the same without it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from emoe.errors import UsageError
from emoe.routing.trace import Array
from emoe.simulation.banks import Tally
from emoe.simulation.lookups import Lookups


@dataclass(frozen=True, slots=True)
class Link:
    """What time is made of: bytes per second from the store, and seconds that one layer computes for one token."""

    bytes_per_s: float
    layer_s: float = 0.0

    def __post_init__(self) -> None:
        if self.bytes_per_s <= 0 or self.layer_s < 0:
            raise UsageError(
                f"a link of {self.bytes_per_s:g} bytes per second and layers of {self.layer_s:g} s cannot be: give a "
                "bandwidth above 0 and a compute time of at least 0."
            )


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds for one token."""

    mean_s: float
    p50_s: float
    p95_s: float

    @classmethod
    def of(cls, seconds: Array) -> Latency:
        """Of [tokens] seconds."""
        p50, p95 = np.percentile(seconds, [50, 95])
        return cls(float(seconds.mean()), float(p50), float(p95))


def latency(lookups: Lookups, tally: Tally, link: Link, expert_bytes: int) -> Latency:
    """Each token's time, from what was missed and prefetched."""
    return Latency.of(token_seconds(lookups, tally, link, expert_bytes))


def token_seconds(lookups: Lookups, tally: Tally, link: Link, expert_bytes: int) -> Array:
    """float64 [tokens]."""
    load_s = expert_bytes / link.bytes_per_s
    waited = tally.waited
    seconds: Array = waited.sum(axis=1) * load_s + lookups.shape.layers * link.layer_s
    asked = {each.token: each.keys for each in tally.prefetches if len(each.keys)}
    token = 0
    for start in sorted(asked):
        if start < token:
            continue  # asked for while others were under way, and added to them
        under_way = _UnderWay(load_s, link.layer_s, lookups)
        token = start
        while token < len(lookups) and (under_way.waiting or token in asked):
            under_way.add(asked.get(token, ()))
            seconds[token] = under_way.serve(token, waited[token])
            token += 1
    return seconds


class _UnderWay:
    """Prefetches on the link, from when they are asked for until all have come."""

    def __init__(self, load_s: float, layer_s: float, lookups: Lookups) -> None:
        self._load_s, self._layer_s, self._lookups = load_s, layer_s, lookups
        self.waiting: dict[int, None] = {}
        """Keys that have not come, in the order asked for; the one under way is among them."""
        self._now = self._free = 0.0
        self._flying: int | None = None

    def add(self, keys: Iterable[int]) -> None:
        """Queue keys."""
        self.waiting.update(dict.fromkeys(int(key) for key in keys))

    def serve(self, token: int, missed: Array) -> float:
        """Seconds of one token, whose layers missed [layers] experts."""
        start = self._now
        k = self._lookups.shape.top_k
        for rank, missing in enumerate(missed.tolist()):
            keys = self._lookups.keys[token, rank * k : (rank + 1) * k].tolist()
            wanted = [key for key in keys if key in self.waiting]
            if wanted or missing:
                self._now = max(self._now, self._free)  # what is under way arrives, wanted or not
                self._now += (missing + sum(key != self._flying for key in wanted)) * self._load_s
                self._free = self._now
                self._arrive()
                for key in wanted:
                    self.waiting.pop(key, None)
            self._compute()
        return self._now - start

    def _arrive(self) -> None:
        if self._flying is not None:
            self.waiting.pop(self._flying, None)
            self._flying = None

    def _compute(self) -> None:
        """A layer computes; the link carries on with what was asked for."""
        end = self._now + self._layer_s
        while self._flying is None or self._free <= end:
            self._arrive()
            begin = max(self._free, self._now)
            if begin >= end or not self.waiting:
                break
            self._flying = next(iter(self.waiting))
            self._free = begin + self._load_s
        self._now = end
