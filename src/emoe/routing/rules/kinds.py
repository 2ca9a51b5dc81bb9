"""The kinds of router there are, as pure functions that can leave experts out.

Every function takes `scores` or `logits` [tokens, experts] and `allowed`, a bool mask [experts] or
[tokens, experts], or None for no restriction. With every expert allowed the operations are the model's
own, in the same order and dtype, so the results are its own bit for bit. Otherwise they are what the
router would give if the other experts did not exist: forbidden logits become -inf before a softmax over
all experts, forbidden choice scores become -inf before a top-k. Each token must have at least one allowed
expert.

Where fewer than k experts can be chosen, the places left over repeat the token's best expert with weight
0: an expert that runs anyway, so that nothing more is loaded or computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class Groups:
    """Group-limited routing: experts lie in `number` equal groups and a token may use `chosen` of them.

    `outside` is the choice score that experts of the other groups get. Most routers use -inf. Some use 0,
    which beats a negative score: then an expert outside the chosen groups can win, and here it does too.
    """

    number: int
    chosen: int
    outside: float = NEVER
    score: Literal["top2", "max"] = "top2"


def forbid(values: Tensor, allowed: Tensor | None) -> Tensor:
    """`values` with -inf for every forbidden expert."""
    return values if allowed is None else values.masked_fill(~allowed, NEVER)


def choose(choice: Tensor, allowed: Tensor | None, top_k: int, in_order: bool = True) -> tuple[Tensor, Tensor]:
    """The best allowed experts by `choice`: ids [tokens, k] int64, and whether each place is filled."""
    candidates = forbid(choice, allowed)
    best, ids = torch.topk(candidates, top_k, dim=-1, sorted=in_order)
    filled = best != NEVER
    return torch.where(filled, ids, candidates.argmax(dim=-1, keepdim=True)), filled


def take(scores: Tensor, ids: Tensor, filled: Tensor) -> Tensor:
    """The scores of the chosen experts [tokens, k]; 0 in places left over."""
    return scores.gather(-1, ids).masked_fill(~filled, 0)


def normalise(weights: Tensor, epsilon: float = 0.0) -> Tensor:
    """Weights that sum to 1 for each token, up to the family's own `epsilon` in the denominator.

    Without one, weights that have all underflowed stay 0 instead of turning to nan.
    """
    total = weights.sum(dim=-1, keepdim=True)
    if epsilon:
        return weights / (total + epsilon)
    return torch.where(total == 0, weights, weights / total)


def limit_to_groups(choice: Tensor, allowed: Tensor | None, groups: Groups, in_order: bool = False) -> Tensor:
    """`choice` with `groups.outside` for every expert outside the token's chosen groups.

    A group is judged by its allowed experts; one without any is never preferred to one with some. Where
    the two best are summed and only one is allowed, the token's worst allowed score stands in for the
    second. Any fixed number would favour or punish such groups depending on the level of the correction
    bias, which own routing ignores: adding a constant to every bias changes no choice.
    """
    shape = (-1, groups.number, choice.shape[-1] // groups.number)
    members = forbid(choice, allowed).view(shape)
    if groups.score == "max":
        group_scores = members.max(dim=-1).values
    else:
        best = members.topk(2, dim=-1)[0]
        if allowed is not None:
            worst = choice.masked_fill(~allowed, float("inf")).amin(dim=-1)[:, None, None]
            empty = best[..., 0] == NEVER
            best = torch.where(best == NEVER, worst, best)
            group_scores = best.sum(dim=-1).masked_fill(empty, NEVER)
        else:
            group_scores = best.sum(dim=-1)
    chosen = torch.topk(group_scores, k=groups.chosen, dim=-1, sorted=in_order)[1]
    inside = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, chosen, True)
    return choice.view(shape).masked_fill(~inside.unsqueeze(-1), groups.outside).view_as(choice)


def softmax_topk(
    logits: Tensor, allowed: Tensor | None, *, top_k: int, renormalise: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Softmax over all experts in float32, then the best k; weights [tokens, k] in `dtype`."""
    shares = torch.nn.functional.softmax(forbid(logits, allowed), dim=-1, dtype=torch.float)
    ids, filled = choose(shares, allowed, top_k)
    weights = take(shares, ids, filled)
    if renormalise:
        weights = normalise(weights)
    return ids, weights.to(dtype)


def biased_softmax_topk(
    logits: Tensor, allowed: Tensor | None, *, top_k: int, bias: Tensor, least_sum: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Softmax over all experts, choice by share + bias, weights over at least `least_sum` (ERNIE)."""
    shares = torch.nn.functional.softmax(forbid(logits, allowed), dim=1, dtype=torch.float)
    ids, filled = choose(shares + bias, allowed, top_k)
    weights = take(shares, ids, filled)
    return ids, (weights / torch.clamp(weights.sum(dim=-1, keepdim=True), min=least_sum)).to(dtype)


def topk_softmax(logits: Tensor, allowed: Tensor | None, *, top_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The best k logits, then softmax over those in `dtype`."""
    ids, filled = choose(logits, allowed, top_k)
    best = logits.gather(-1, ids).masked_fill(~filled, NEVER)
    return ids, torch.nn.functional.softmax(best, dim=-1, dtype=dtype)


def scores_topk(
    scores: Tensor,
    allowed: Tensor | None,
    *,
    top_k: int,
    bias: Tensor | None = None,
    groups: Groups | None = None,
    in_order: bool = False,
) -> tuple[Tensor, Tensor]:
    """The best k by score + correction bias, within groups if there are any; weights are the bare scores."""
    choice = scores if bias is None else scores + bias
    if groups is not None:
        choice = limit_to_groups(choice, allowed, groups, in_order)
    ids, filled = choose(choice, allowed, top_k, in_order)
    return ids, take(scores, ids, filled)


def tabled_topk(scores: Tensor, allowed: Tensor | None, *, tabled: Tensor) -> tuple[Tensor, Tensor]:
    """Experts prescribed by a table (`tabled` [tokens, k]); scores decide their weights only.

    A prescribed expert that is forbidden is replaced by the best-scored allowed one not yet in the row.
    """
    if allowed is None:
        return tabled, scores.gather(1, tabled)
    kept = allowed.expand_as(scores).gather(1, tabled)
    spare, spare_found = choose(scores.scatter(1, tabled, NEVER), allowed, tabled.shape[1])
    turn = ((~kept).cumsum(dim=1) - 1).clamp(min=0)
    filled = kept | spare_found.gather(1, turn)
    ids = torch.where(kept, tabled, spare.gather(1, turn))
    best = forbid(scores, allowed).argmax(dim=-1, keepdim=True)
    ids = torch.where(filled, ids, best)
    return ids, take(scores, ids, filled)
