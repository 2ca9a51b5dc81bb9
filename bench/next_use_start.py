"""Trains what next-use starts from on a model it knows nothing of: the part of its network that all keys share.

    python bench/next_use_start.py TRACE --split 0 --out src/emoe/prediction/next_use/start.safetensors

That part (552 numbers) reads one key's own recency, frequencies and copies relative to a router that chooses at random,
so it fits models of any shape. It learns from one half of TRACE's prompts: the half that `emoe simulate --split 0`
learns from.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from safetensors.numpy import save_file

from emoe.prediction.next_use.network import SHARED
from emoe.prediction.next_use.scorer import NextUse
from emoe.prediction.protocol import RoutingShape
from emoe.routing.trace import Trace


def main() -> None:
    """Fit with everything else held at zero, and write the shared part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--split", type=int, default=0)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    trace = Trace.read(options.trace)
    order = np.random.default_rng(options.split).permutation(trace.num_prompts)
    history = trace.select(order[: trace.num_prompts // 2].tolist())
    scorer = NextUse(RoutingShape.of(trace), shared_only=True)
    scorer.fit(history, progress=lambda line: print(line, file=sys.stderr, flush=True))
    state = scorer.state()
    save_file(
        {name: state[f"network.{name}"] for name in SHARED},
        options.out,
        metadata={"trained_on": f"{history.num_prompts} prompts of {trace.source.get('model', options.trace)}"},
    )


if __name__ == "__main__":
    main()
