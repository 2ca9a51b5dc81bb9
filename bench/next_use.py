"""What next-use costs, and what it does where learned scores lose: on made-up routes whose phases change abruptly.

    python bench/next_use.py phases [--tokens 5000] [--phase 20 60 300] [--used 10]
    python bench/next_use.py cost [--shape 24x32x4]

`phases`: 6 layers of 32 experts, top 4; for so many tokens every route is drawn from the same few experts of a layer,
then from others. Loads over LRU's: next-use alone, with the contest that lets LRU lead where it loads less, and
decayed. `cost`: milliseconds of one core for the scores of a layer and for observing a token (in the engine the first
is asked only in layers that must evict), and the process' growth in MiB. Routes are random: the work is the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from emoe.prediction.next_use import NextUse
from emoe.prediction.protocol import RoutingShape
from emoe.routing.trace import Trace
from emoe.simulation.banks import serve
from emoe.simulation.generate import parse_random, random_trace
from emoe.simulation.lookups import Lookups
from emoe.simulation.policies import ByScore, Settings, make_policy

LAYERS, EXPERTS, TOP_K = 6, 32, 4
SLOTS = (6, 12, 19, 25)


def phases_trace(tokens: int, phase: int, used: int, seed: int = 0) -> Trace:
    """Routes drawn from `used` experts of each layer, which change every `phase` tokens."""
    rng = np.random.default_rng(seed)
    trace = random_trace(RoutingShape(LAYERS, EXPERTS, TOP_K), tokens, seed)
    for start in range(0, tokens, phase):
        for layer in range(LAYERS):
            chosen = rng.permutation(EXPERTS)[:used]
            part = trace.experts[start : start + phase, layer]
            part[:] = chosen[np.argsort(rng.random((len(part), used)), axis=1)[:, :TOP_K]]
    return trace


def loads(lookups: Lookups, name: str, contested: bool = True) -> list[int]:
    """Loads at each of SLOTS."""
    policy = make_policy(name, lookups.shape, Settings())
    if isinstance(policy, ByScore) and not contested:
        policy.contested = False
    return [int(tally.missed.sum()) for tally in serve(lookups, SLOTS, policy)]


def show_phases(options: argparse.Namespace) -> None:
    """One table for each length of a phase."""
    for phase in options.phase:
        lookups = Lookups.of(phases_trace(options.tokens, phase, options.used))
        lru = loads(lookups, "lru")
        print(
            f"phases of {phase} tokens, {options.used} of {EXPERTS} experts, {options.tokens} tokens; loads over LRU's"
        )
        print(f"  {'slots':16}" + "".join(f"{slots:>8}" for slots in SLOTS))
        for title, name, contested in (
            ("next-use alone", "next-use", False),
            ("next-use", "next-use", True),
            ("decayed", "decayed", True),
        ):
            ratios = [mine / its for mine, its in zip(loads(lookups, name, contested), lru, strict=True)]
            print(f"  {title:16}" + "".join(f"{ratio:8.3f}" for ratio in ratios), flush=True)


def show_cost(options: argparse.Namespace) -> None:
    """Medians over the tokens after the first 300."""
    shape, tokens = parse_random(f"{options.shape}:{options.tokens}")
    routes = random_trace(shape, tokens).experts
    before = _rss_mib()
    scorer = NextUse(shape)
    scorer.begin_prompt(None)
    scored, observed = [], []
    for token in range(tokens):
        start = time.process_time()
        for layer in range(shape.layers):
            scorer.scores_at(layer, routes[token])
        middle = time.process_time()
        scorer.observe(routes[token : token + 1])
        if token >= 300:
            scored.append((middle - start) / shape.layers)
            observed.append(time.process_time() - middle)
    print(
        f"{options.shape}: {1e3 * statistics.median(scored):.2f} ms a layer, observing "
        f"{1e3 * statistics.median(observed):.2f} ms a token (mean {1e3 * statistics.fmean(observed):.2f}), "
        f"{_rss_mib() - before} MiB; {torch.get_num_threads()} thread"
    )


def _rss_mib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 >> 20


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(required=True)
    phases = what.add_parser("phases")
    phases.add_argument("--tokens", type=int, default=5000)
    phases.add_argument("--phase", type=int, nargs="+", default=[20, 60, 300])
    phases.add_argument("--used", type=int, default=10)
    phases.set_defaults(run=show_phases)
    cost = what.add_parser("cost")
    cost.add_argument("--shape", default="24x32x4")
    cost.add_argument("--tokens", type=int, default=1000)
    cost.set_defaults(run=show_cost)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.run(options)


if __name__ == "__main__":
    main()
