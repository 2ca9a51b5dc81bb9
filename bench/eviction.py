"""Which eviction rule keeps most of what a real trace needs? Runs the engine's own slot table over decode steps.

    python bench/eviction.py TRACE [--tokens 3000] [--capacity 20,40,60,80]

TRACE is a file of emoe.routing.trace, or the gpt-oss-20b layout it also reads. Tokens are taken from every n-th prompt,
`--each` per prompt, back to back; hits are shares of routed expert keys.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import numpy as np

from emoe.residency.budget import LayerNeed, PoolPlan, uniform_quotas
from emoe.residency.eviction import EVICTION_RULES, make_eviction
from emoe.residency.table import ResidencyTable
from emoe.routing.trace import Trace


def tokens_of(trace: Trace, total: int, each: int) -> np.ndarray:
    """Return token rows: `each` from the start of evenly spaced prompts, about `total` in all."""
    stride = max(1, trace.num_prompts // max(1, total // each))
    spans: Iterable[np.ndarray] = (
        np.arange(trace.offsets[p], min(trace.offsets[p] + each, trace.offsets[p + 1]))
        for p in range(0, trace.num_prompts, stride)
    )
    return np.concatenate(list(spans))


def hit_rate(trace: Trace, rows: np.ndarray, capacity: float, rule: str, shared: bool) -> float:
    """Serve the tokens one by one; return hits over look-ups."""
    layers, experts = len(trace.layers), trace.num_experts
    needs = [LayerNeed(layer, experts, trace.top_k, 64) for layer in range(layers)]
    slots = int(capacity * experts * layers)
    quotas = dict.fromkeys(range(layers), 0) if shared else uniform_quotas(slots, needs)
    table = ResidencyTable(PoolPlan(0, slots, 64, quotas), dict.fromkeys(range(layers), experts), make_eviction(rule))
    hits = misses = 0
    for row in rows:
        table.begin_pass()
        for layer in range(layers):
            table.visit(layer)
            keys = [(layer, int(e)) for e in trace.experts[row, layer]]
            for key in keys:
                table.use(key, keep=True)
                if table.find(key) is not None:
                    hits += 1
                    continue
                misses += 1
                slot = table.reserve(key, protect=frozenset(keys))
                if slot is not None:
                    table.commit(slot, 64)
    return hits / (hits + misses)


def main() -> None:
    """Print one line per capacity, rule and partition."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--each", type=int, default=150)
    parser.add_argument("--capacity", default="20,40,60,80")
    options = parser.parse_args()
    trace = Trace.read(options.trace)
    rows = tokens_of(trace, options.tokens, options.each)
    print(f"{len(rows)} tokens, {len(trace.layers)} layers x {trace.num_experts} experts, top-{trace.top_k}")
    for percent in options.capacity.split(","):
        for rule in sorted(EVICTION_RULES):
            quotas = hit_rate(trace, rows, int(percent) / 100, rule, shared=False)
            pool = hit_rate(trace, rows, int(percent) / 100, rule, shared=True)
            print(f"{percent:>3} %  {rule:<12} per-layer quotas {quotas:.4f}   one pool {pool:.4f}", flush=True)


if __name__ == "__main__":
    main()
