"""Routers that repeat a trace: embeddings that are orthogonal, and weights solved on them.

Token i has the embedding sqrt(hidden) * q_i, the q_i being orthonormal. The family's RMS norm (weights 1) leaves it so,
hence a router with rows

    w_e = sum_i logit[i, e] * q_i / sqrt(hidden)

gives token i exactly logit[i, e] for expert e. The residual stream stays close to the embedding because attention and
expert outputs are scaled to `RESIDUAL` of it; what that adds to a logit is random and about RESIDUAL * sqrt(layers).
"""

from __future__ import annotations

import math

import numpy as np
import torch

from emoe.errors import UsageError
from emoe.routing.trace import Array

RESIDUAL = 0.002
"""Size of what one attention or MLP adds to the residual stream, where the embedding has 1. In bfloat16 most of it is
lost in rounding; elements of the stream that happen to be small keep it, so logits still depend on every expert."""

GAP = 0.09
"""The least distance between the logits of two chosen experts. Routers of some families compute in bfloat16, where
logits between 4 and 8 are 0.03 apart; nearly equal weights of a trace (stored in 8 bits) are spread by this."""

MARGIN = 1.5
"""From the best expert that is not chosen down to none: the last chosen one lies at least MARGIN - POPULAR above."""

POPULAR = 0.5
"""The most an unchosen expert gets, for being the most popular of its layer: what `resident` falls back on."""

LEAST = 1 / 512
"""Weights below this (a trace of 8-bit weights holds zeros) count as this."""

DECAY = 0.75
"""From one chosen expert's weight to the next where a trace has no weights."""


def check_tokens(tokens: int, hidden: int) -> None:
    """Refuse more tokens than orthogonal embeddings exist. Raises UsageError."""
    if not 1 <= tokens <= hidden:
        raise UsageError(
            f"{tokens} tokens cannot have as many orthogonal embeddings of size {hidden}; ask for 1 to {hidden} tokens"
        )


def embeddings(tokens: int, vocabulary: int, hidden: int, seed: int) -> torch.Tensor:
    """float32 [vocabulary, hidden]: orthogonal rows for the first `tokens`, noise for the rest; elements about 1.

    Raises:
        UsageError: more tokens than orthogonal rows exist.
    """
    check_tokens(tokens, hidden)
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(vocabulary, hidden, generator=rng)
    # In float32 the last bits, and some of what is written, would depend on the number of threads.
    rows[:tokens] = torch.linalg.qr(rows[:tokens].T.double()).Q.T * math.sqrt(hidden)
    return rows


def router_weight(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """float32 [experts, hidden]: the router that gives `rows` (of `embeddings`) these logits [tokens, experts]."""
    return (logits.T.double() @ rows.double() / rows.shape[1]).float()


def next_token_head(rows: torch.Tensor, tokens: int, seed: int, gain: float = 16.0) -> torch.Tensor:
    """float32 [vocabulary, hidden]: an output projection that prefers token i + 1 after token i, and 0 after the last.

    Greedy decoding then walks along the trace in any engine. The rest is noise, so that logits differ with whatever
    reaches them. The preferred token gets about `gain` where the others are spread by 1.
    """
    vocabulary, hidden = rows.shape
    rng = torch.Generator().manual_seed(seed)
    head = torch.randn(vocabulary, hidden, generator=rng) / math.sqrt(hidden)
    head[:tokens] += rows[:tokens].roll(1, dims=0) * (gain / hidden)
    return head


def logits_of(experts: Array, weights: Array | None, num_experts: int) -> torch.Tensor:
    """float32 [tokens, num_experts]: router logits that choose `experts` [tokens, k], best first.

    A softmax over them gives the chosen ones weights in proportion to `weights` [tokens, k] (up to `GAP`). Where these
    add up to clearly less than 1, as a softmax over all experts leaves them, the others get the rest. Unchosen experts
    lie between 0 and POPULAR, by their popularity in the layer.
    """
    tokens, k = experts.shape
    if weights is None:
        weights = np.tile(DECAY ** np.arange(k), (tokens, 1))
        weights = weights / weights.sum(axis=1, keepdims=True)
    weights = np.maximum(weights.astype(np.float64), LEAST)
    chosen = np.log(weights)
    for rank in range(1, k):
        chosen[:, rank] = np.minimum(chosen[:, rank], chosen[:, rank - 1] - GAP)
    lowest = chosen[:, -1:]
    total = weights.sum(axis=1, keepdims=True)
    rest = np.log(np.maximum(1 - total, 1e-9) / max(num_experts - k, 1))
    above = np.where(total < 0.98, np.maximum(MARGIN, lowest - rest), MARGIN)
    counts = np.bincount(experts.ravel(), minlength=num_experts)
    full = np.tile(POPULAR * counts / counts.max(), (tokens, 1))
    np.put_along_axis(full, experts.astype(np.int64), chosen - lowest + above, axis=1)
    return torch.from_numpy(full.astype(np.float32))
