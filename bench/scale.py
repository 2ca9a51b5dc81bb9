"""What the machinery costs per token as layers x experts grow from 100 to 100,000 expert keys.

    python -m bench.scale [--shapes 10x10x2,...] [--rules least-stale,...] [--slots 40] [--tokens 150] [--json FILE]

Slots are simulated: the pool, its table, the loader and the scorers are the engine's own, but an expert has 64 bytes
and a load moves none. So what is left is the bookkeeping: microseconds for each token, and nanoseconds for each routed
expert (layers x k of a token), by eviction rule. If a step grew faster than the routed experts, the last column would
grow with the number of keys. Routes are made up: experts of a layer are popular by Zipf's law, and every third
choice repeats the token before; that sets the share of misses, which is printed, for a miss costs more than a hit.
Slots are full from the start.

`plan` is one evaluation of Equation 2 over all keys with what is issued for it, which happens once every p prompts: it
looks at every key, so its time is given for each key.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from emoe.checkpoint.index import ExpertIndex, PartSpec
from emoe.checkpoint.readers import Reader
from emoe.config import ExpertMemory
from emoe.prediction.live import LiveScored, LiveScores
from emoe.prediction.protocol import RoutingShape
from emoe.prediction.registry import SCORERS, make_scorer
from emoe.residency.bank import Bank, slot_nbytes
from emoe.residency.budget import LayerNeed, plan_slots
from emoe.residency.devices import CpuDevice
from emoe.residency.eviction import EVICTION_RULES, Eviction, Scored, make_eviction
from emoe.residency.loader import Loader
from emoe.residency.plans import TaskDemand, best_keys_of_all, expected_tokens
from emoe.residency.pool import ExpertPool
from emoe.residency.table import ResidencyTable

SHAPES = "10x10x2,16x64x8,32x128x8,58x256x8,61x384x8,100x1000x8"
"""The last but two is DeepSeek-V3's, the last but one that of Kimi K2."""

PART = PartSpec("down_proj", (4, 4), "float32")
REPEATED = 0.33


class _Index:
    """Of experts without pieces."""

    path = Path("simulated")

    def pieces(self, layer: int, expert: int) -> tuple[int, int]:
        """Something to hand to the reader."""
        return (layer, expert)


class _Reader:
    """Reads nothing, at once."""

    def read_into(self, *_: object) -> int:
        """Say that one slot was read."""
        return slot_nbytes([PART])


@dataclass(frozen=True, slots=True)
class Row:
    """One shape under one rule; medians over tokens."""

    rule: str
    layers: int
    experts: int
    top_k: int
    keys: int
    missed: float
    token_us: float
    routed_ns: float


def routes_of(shape: RoutingShape, tokens: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """int [tokens, layers, k]."""
    rng = np.random.default_rng(seed)
    popular = np.log(1 / np.arange(1, shape.experts + 1))
    favour = np.stack([rng.permutation(popular) for _ in range(shape.layers)]).astype(np.float32)
    found = np.empty((tokens, shape.layers, shape.top_k), dtype=np.int64)
    for token in range(tokens):
        want = favour + rng.gumbel(size=favour.shape).astype(np.float32)
        if token:
            again = np.where(rng.random(found[token - 1].shape) < REPEATED, found[token - 1], -1)
            rows, columns = np.nonzero(again >= 0)
            want[rows, again[rows, columns]] += 100.0
        found[token] = np.argpartition(-want, shape.top_k, axis=1)[:, : shape.top_k]
    return found


class Machinery:
    """A pool of simulated slots under one rule."""

    def __init__(self, shape: RoutingShape, rule: str, share: float, loader: Loader) -> None:
        self.shape = shape
        nbytes = slot_nbytes([PART])
        needs = [LayerNeed(layer, shape.experts, shape.top_k, nbytes) for layer in range(shape.layers)]
        shared_from = Scored.shared_from if rule in SCORERS else make_eviction(rule).shared_from
        (plan,) = plan_slots(ExpertMemory("share", share), needs, shared_from=shared_from).pools
        experts = dict.fromkeys(range(shape.layers), shape.experts)
        self.live: LiveScores | None = None
        eviction: Eviction
        if rule in SCORERS:
            self.live = LiveScores(make_scorer(rule, shape), shape)
            quotas = [plan.quotas[layer] for layer in experts]
            eviction = LiveScored(self.live, list(experts), list(experts.values()), quotas)
            self.live.begin_prompt(None)
        else:
            eviction = make_eviction(rule)
        table = ResidencyTable(plan, experts, eviction)
        bank = Bank([PART], plan.slots, CpuDevice())
        self.pool = ExpertPool(table, bank, cast(ExpertIndex, _Index()), cast(Reader, _Reader()), loader)
        each = plan.slots // shape.layers
        self.pool.preload((layer, expert) for layer in experts for expert in range(each))

    def token(self, routes: np.ndarray[Any, Any]) -> None:
        """One token through all layers."""
        pool, live = self.pool, self.live
        pool.table.begin_pass()
        if live is not None:
            live.begin_pass(1)
        for layer in range(self.shape.layers):
            ids = routes[layer]
            if live is not None:
                live.route(layer, ids)
            pool.prefetches.poll()
            pool.release(pool.take(layer, ids.tolist()))
        if live is not None:
            weights = np.full((1, *routes.shape), 1 / routes.shape[1], dtype=np.float16)
            live.observe(routes[None].astype(np.uint8 if self.shape.experts < 255 else np.uint16), weights, None)

    def missed(self) -> float:
        """Share of look-ups so far."""
        counts = self.pool.table.counters.values()
        return sum(c.misses for c in counts) / max(1, sum(c.misses + c.hits for c in counts))


def measure(machinery: Machinery, rule: str, routes: np.ndarray[Any, Any], warm: int) -> Row:
    """Medians over the tokens after the first `warm`."""
    times = []
    for number, token in enumerate(routes):
        start = time.perf_counter()
        machinery.token(token)
        if number >= warm:
            times.append(time.perf_counter() - start)
    shape, each_s = machinery.shape, statistics.median(times)
    keys, routed = shape.layers * shape.experts, shape.layers * shape.top_k
    us, ns = each_s * 1e6, each_s / routed * 1e9
    return Row(rule, shape.layers, shape.experts, shape.top_k, keys, machinery.missed(), us, ns)


def planning_s(machinery: Machinery, rounds: int = 5) -> float:
    """Seconds of one plan: Equation 2, the best keys, and the issue of their loads."""
    shape, table = machinery.shape, machinery.pool.table
    rng, times = np.random.default_rng(1), []
    for _ in range(rounds):
        shares = rng.dirichlet(np.full(shape.experts, 0.1), size=shape.layers) * shape.top_k
        start = time.perf_counter()
        chosen = best_keys_of_all(expected_tokens([TaskDemand([100], 50.0, shares)]), table.plan.slots)
        machinery.pool.prefetches.plan([(layer, e) for layer, own in enumerate(chosen) for e in own])
        times.append(time.perf_counter() - start)
        machinery.pool.prefetches.stop()
    return statistics.median(times)


def parse_shapes(text: str) -> list[RoutingShape]:
    """Shapes from "LAYERSxEXPERTSxK,..."."""
    return [RoutingShape(*map(int, word.split("x"))) for word in text.split(",")]


def main(words: Sequence[str] | None = None) -> None:
    """Print one table for each rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=parse_shapes, default=parse_shapes(SHAPES), metavar="LxExK,...")
    parser.add_argument("--rules", default=",".join([*sorted(EVICTION_RULES), *sorted(SCORERS)]))
    parser.add_argument("--slots", type=float, default=40.0, help="percent of the experts")
    parser.add_argument("--tokens", type=int, default=150, help="of which the first third is not measured")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    rows: list[Row] = []
    plans = []
    loader = Loader(2)
    for shape in options.shapes:
        routes = routes_of(shape, options.tokens)
        for rule in options.rules.split(","):
            machinery = Machinery(shape, rule, options.slots / 100, loader)
            rows.append(measure(machinery, rule, routes, options.tokens // 3))
            if rule == options.rules.split(",")[0]:
                plans.append((shape, planning_s(machinery)))
    loader.close()
    print(f"{options.slots:g} % of the experts have slots; one thread; medians of {options.tokens} tokens\n")
    print("| rule | layers x experts, k | keys | missed | us a token | ns a routed expert |\n|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda r: r.rule):
        size = f"{row.layers} x {row.experts}, {row.top_k}"
        print(f"| {row.rule} | {size} | {row.keys:,} | {row.missed:.0%} | {row.token_us:,.0f} | {row.routed_ns:,.0f} |")
    print("\n| plan: layers x experts | keys | ms | ns a key |\n|---|---|---|---|")
    for shape, seconds in plans:
        keys = shape.layers * shape.experts
        print(f"| {shape.layers} x {shape.experts} | {keys:,} | {seconds * 1e3:.2f} | {seconds / keys * 1e9:,.0f} |")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows]) + "\n")


if __name__ == "__main__":
    main()
