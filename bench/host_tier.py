"""Which rule should the host tier follow? Reads from disk per token, over a recorded trace, at some sizes of both.

    python bench/host_tier.py TRACE [--tokens 2000] [--device 20 40] [--host 30 50 70]

Tables only, no weights: the device's table (least-stale, as the engine's) asks the host's for what it misses. LRU over
what the device asks for; one that drops first what the device holds; LRU that also counts the device's own uses; and
the engine's, an exclusive tier that swaps an expert for the one the device evicts. Decode tokens, one after another.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from emoe.config import ExpertMemory
from emoe.residency.budget import LayerNeed, PoolPlan, plan_slots
from emoe.residency.eviction import Counts, Now, Uses, make_eviction
from emoe.residency.table import Key, ResidencyTable
from emoe.routing.trace import Trace

RULES = ("lru", "beneath-device", "lru of all uses", "exclusive")


class BeneathDevice:
    """What the device holds goes first, ties by recency."""

    name = "beneath-device"
    steady = False
    shared_from = 0.0

    def __init__(self, keys: int) -> None:
        """Start with nothing on the device."""
        self.on_device = np.zeros(keys, dtype=np.bool_)

    def score(self, past: Uses, now: Now) -> Counts:
        """The last fetch, what the device holds below everything else."""
        score: Counts = past.last_tick - (self.on_device[past.number].astype(np.int64) << 40)
        return score


def main() -> None:
    """Parse, replay, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--device", type=int, nargs="+", default=[20, 40], help="%% of the experts")
    parser.add_argument("--host", type=int, nargs="+", default=[30, 50, 70], help="%% of the experts")
    args = parser.parse_args()
    trace = Trace.read(args.trace)
    experts = int(trace.experts.max()) + 1
    routes = trace.experts[trace.phase == 1][: args.tokens]
    layers = routes.shape[1]
    print(f"{len(routes)} decode tokens, {layers} layers x {experts} experts, {routes.shape[2]} per token")
    print(f"| device | host | misses/token | {' | '.join(f'{rule}: reads/token' for rule in RULES)} |")
    print("|---" * (3 + len(RULES)) + "|")
    for device in args.device:
        for host in args.host:
            found = [replay(routes, experts, device / 100, host / 100, rule) for rule in RULES]
            cells = " | ".join(f"{reads / len(routes):.2f}" for _, reads in found)
            print(f"| {device} % | {host} % | {found[0][0] / len(routes):.2f} | {cells} |", flush=True)


def replay(routes: np.ndarray, experts: int, device: float, host: float, rule: str) -> tuple[int, int]:
    """(misses of the device, reads from disk); a half of the tokens warms up and both are scaled to all."""
    layers, top_k = routes.shape[1:]
    needs = [LayerNeed(layer, experts, top_k, 64) for layer in range(layers)]
    plan = plan_slots(ExpertMemory("share", device), needs, shared_from=make_eviction("least-stale").shared_from).pools[
        0
    ]
    sizes = dict.fromkeys(range(layers), experts)
    table = ResidencyTable(plan, sizes, make_eviction("least-stale"))
    beneath = BeneathDevice(layers * experts)
    slots = int(host * layers * experts)
    below = ResidencyTable(
        PoolPlan(0, slots, 64, dict.fromkeys(range(layers), 0)),
        sizes,
        beneath if rule == RULES[1] else make_eviction("lru"),
    )
    misses = reads = 0
    for token, chosen in enumerate(routes):
        table.begin_pass()
        for layer in range(layers):
            table.visit(layer)
            keys: list[Key] = [(layer, int(e)) for e in chosen[layer]]
            counted = token >= len(routes) // 2
            for key in keys:
                there = table.is_resident(key)
                table.use(key, keep=True)
                if there:
                    if rule == RULES[2]:
                        below.visit(layer)
                        below.use(key, keep=True)
                    continue
                misses += counted
                slot = table.reserve(key, protect=frozenset(keys))
                if slot is None:
                    raise RuntimeError("no slot")
                evicted = table.evicted
                table.commit(slot, 1)
                if evicted is not None:
                    beneath.on_device[evicted[0] * experts + evicted[1]] = False
                beneath.on_device[layer * experts + key[1]] = True
                below.visit(layer)
                below.use(key, keep=True)
                held = below.find(key)
                reads += counted and held is None
                if rule == RULES[3]:
                    if held is not None:
                        below.evict(held)
                    if evicted is not None and below.find(evicted) is None:
                        below.use(evicted, keep=True)
                        _fill(below, evicted)
                elif held is None:
                    _fill(below, key)
    return 2 * misses, 2 * reads


def _fill(table: ResidencyTable, key: Key) -> None:
    slot = table.reserve(key)
    if slot is not None:
        table.commit(slot, 1)


if __name__ == "__main__":
    main()
