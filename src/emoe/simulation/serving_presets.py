"""Cost models of machines that nobody has to own: coefficients from arithmetic, every assumption named.

`mixtral`: Mixtral-8x7B in bfloat16 on a GPU with 2 TB/s of memory and 125 TFLOP/s of arithmetic in practice, experts
over a link of 25 GB/s.

- an expert is 3 matrices of 4,096 x 14,336 in 2 bytes: 352 MB, 14.1 ms on the link;
- a step reads 3.2 GB of dense weights (1.6 ms), launches 32 layers (0.1 ms each), and reads what experts its tokens
  use, all 90 GB of them for a dozen tokens or more, of which 45 ms is the most: 20 ms in all for the middle;
- a decoded token adds 0.2 ms of arithmetic and 0.3 ms of sampling and bookkeeping; an input token 26 GFLOP: 0.2 ms;
- a token of KV memory is 2 x 32 layers x 8 heads x 128 in 2 bytes, 131 kB: 66 ns.

Routes are drawn: an expert's share of a layer's tokens varies between tasks as between subjects of MMLU on
Mixtral-8x7B, a Dirichlet distribution of concentration 235 around one of 43 for each expert. That is little: Mixtral's
tasks share their experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emoe.errors import named
from emoe.prediction.protocol import RoutingShape

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Preset:
    """A model on a machine: its shape, costs in seconds, the engine's limits, and how routes are drawn."""

    shape: RoutingShape
    costs: Mapping[str, float]
    max_running: int
    max_batch_tokens: int
    kv_tokens: int
    spread: float
    spread_of_tasks: float

    def shares(self, tasks: Sequence[str], seed: int = 0) -> dict[str, Array]:
        """Float [layers, experts] for each task; rows sum to k, no entry is above 1."""
        rng = np.random.default_rng(seed)
        shape = self.shape
        found: dict[str, Array] = {}
        base = rng.dirichlet(np.full(shape.experts, self.spread), size=shape.layers)
        for task in tasks:
            rows = np.stack([rng.dirichlet(np.maximum(row * self.spread_of_tasks, 1e-3)) for row in base])
            found[task] = np.minimum(rows * shape.top_k, 1.0)
        return found


PRESETS: Mapping[str, Preset] = {
    "mixtral": Preset(
        shape=RoutingShape(32, 8, 2),
        costs={
            "step_s": 0.02,
            "token_s": 0.0005,
            "prefill_token_s": 0.0002,
            "kv_token_s": 6.6e-8,
            "expert_load_s": 3 * 4096 * 14336 * 2 / 25e9,
        },
        max_running=32,
        max_batch_tokens=2048,
        kv_tokens=131072,
        spread=43.0,
        spread_of_tasks=235.0,
    )
}


def preset(name: str) -> Preset:
    """A preset by name. Raises UsageError naming the choices."""
    return named("preset", name, PRESETS)
