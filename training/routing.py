"""What the routers of a loaded Qwen3-MoE choose, and the same model with some experts forbidden."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def routers(model: Any) -> list[Any]:
    return [layer.mlp.gate for layer in model.model.layers]


@contextmanager
def counted(model: Any) -> Iterator[list[Tensor]]:
    """Yields a list that each forward pass extends by the experts chosen, one [tokens, k] per layer."""
    seen: list[Tensor] = []
    hooks = [r.register_forward_hook(lambda _m, _i, output: seen.append(output[2])) for r in routers(model)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def only(model: Any, allowed: Sequence[Tensor]) -> Iterator[None]:
    """Tokens go to the best-scored of the allowed experts ([experts] of bool per layer), with the weights
    that the router would give if the others did not exist: its logits are masked with -inf before softmax."""

    def masked(mask: Tensor, k: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            logits, scores, _ = output
            probs = logits.float().masked_fill(~mask, float("-inf")).softmax(-1)
            top, ids = probs.topk(k, dim=-1)
            return logits, (top / top.sum(-1, keepdim=True)).to(scores.dtype), ids

        return hook

    hooks = [r.register_forward_hook(masked(mask, r.top_k)) for r, mask in zip(routers(model), allowed, strict=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def shares(model: Any, ids: list[int]) -> Tensor:
    """[layers, experts]: the share of a prompt's look-ups that each expert got."""
    with counted(model) as seen:
        model(torch.tensor([ids], device=model.device), logits_to_keep=1)
    experts = model.config.num_experts
    counts = torch.stack([torch.bincount(c.reshape(-1), minlength=experts) for c in seen]).float()
    return counts / counts.sum(1, keepdim=True)


def most_popular(share: Tensor, count: int) -> list[Tensor]:
    """The `count` experts of each layer with the largest share, as masks."""
    masks = torch.zeros_like(share, dtype=torch.bool)
    return list(masks.scatter_(1, share.topk(count, dim=1).indices, True))


def nearest_neighbour(
    queries: Tensor, labels: list[str], base: Tensor | None = None, known: list[str] | None = None
) -> float:
    """Accuracy of the nearest other vector's label (Euclidean); leave-one-out where no base is given."""
    distance = torch.cdist(queries, queries if base is None else base)
    if base is None:
        distance.fill_diagonal_(float("inf"))
    found = distance.argmin(1).tolist()
    names = labels if known is None else known
    right = sum(bool(names[f] == mine) for f, mine in zip(found, labels, strict=True))
    return right / len(labels)
