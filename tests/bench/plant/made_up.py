"""Made-up traces with the locality of real ones: a token keeps some of the experts of the one before."""

from __future__ import annotations

from typing import Any

import numpy as np

from emoe.routing.trace import DECODE, Trace, id_dtype


def made_up_trace(
    tokens: int = 60, layers: int = 3, experts: int = 8, k: int = 2, prompts: int = 3, seed: int = 0, **changes: Any
) -> Trace:
    rng = np.random.default_rng(seed)
    ids = np.zeros((tokens, layers, k), dtype=id_dtype(experts))
    for layer in range(layers):
        now = rng.permutation(experts)[:k]
        for token in range(tokens):
            kept = now[rng.random(k) < 0.5]
            others = rng.permutation(np.setdiff1d(np.arange(experts), kept))[: k - len(kept)]
            now = rng.permutation(np.concatenate([kept, others]))
            ids[token, layer] = now
    weights = -np.sort(-rng.dirichlet(np.ones(k) * 2, (tokens, layers)))
    ends = np.linspace(0, tokens, prompts + 1).astype(np.int64)
    values: dict[str, Any] = {
        "experts": ids,
        "weights": weights.astype(np.float16),
        "phase": np.full(tokens, DECODE, dtype=np.uint8),
        "step": np.arange(tokens, dtype=np.int64),
        "offsets": ends,
        "task": np.full(prompts, -1, dtype=np.int32),
        "tasks": (),
        "layers": np.arange(layers, dtype=np.int32),
        "num_experts": experts,
        "prompts": tuple({} for _ in range(prompts)),
    }
    return Trace(**(values | changes))
