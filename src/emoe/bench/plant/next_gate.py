"""Planting how often the next layer's router, asked with this layer's states, is right.

The residual stream stays at the token's embedding, so as a rule that router is right every time: no trained model's is.
What a router sees, though, is the stream times the weight of its layer's norm. Here these weights are 1 or -1: from one
layer to the next the signs of some channels turn, and each router is solved on its own layer's signs. Its own states
then keep their lengths and stay orthogonal, to the bit, so every route is what it was. Another layer's states differ in
the turned channels: the guess keeps 1 - 2 * (share of channels turned) of each logit, and gets a bit of every other
token's. More turned channels, more wrong guesses.

Found for trained models, as the share of a token's experts that are guessed (source: model or its size):

- 79 %: DeepSeek-V2-Lite (Fate, arXiv 2502.12224);
- 89 % and 81 %: 48 layers of 128 experts, 40 layers of 256 (BigMoeOnEdge, pull request 101);
- 72 to 74 %: GLM-5.2 (colibri, issue 866 and pull request 204);
- 96 %: Mixtral, of the best expert alone (HOBBIT, arXiv 2411.01433).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from emoe.bench.plant.routers import router_weight
from emoe.errors import UsageError
from emoe.model.prefetch import RouterCall, asked_ahead, chosen_ids
from emoe.routing.rules import has_rule

TOLERANCE = 0.03
"""How far what is planted may lie from the share that was asked for: few tokens leave steps."""

RECORDED = 0.01
"""How far what is recorded may lie from what was planted. Rounding turns a guess in a thousand; one layer without its
signs among six moves the share by 0.015."""

NEAR = 64
"""Channels after those that bisection found which are tried one by one: shares do not fall evenly."""

CLOSE = 0.002
"""A share as near as this to the one asked for is looked for no longer."""


@dataclass(frozen=True, slots=True)
class Signs:
    """int8 [MoE layers, hidden], 1 or -1: weights of the norms before the experts; and the `share` of a token's experts
    that is guessed right, over all layers but the first."""

    of_layers: torch.Tensor
    share: float


def plant_signs(
    logits: Callable[[int], torch.Tensor], layers: int, rows: torch.Tensor, top_k: int, share: float, seed: int
) -> Signs:
    """Signs with which every layer's router, asked one layer early, finds `share` of a token's experts.

    Args:
        logits: of the MoE layer with this number, [tokens, experts].
        layers: MoE layers.
        rows: the tokens' embeddings, [tokens, hidden].
        top_k: experts for each token.
        share: above 0, at most 1.
        seed: of the order in which channels turn.

    Raises:
        UsageError: no such share, nothing to guess, or too few tokens to plant it within `TOLERANCE`.
    """
    if not 0 < share <= 1:
        raise UsageError(f"the share that the next gate guesses must be above 0 and at most 1, not {share:g}")
    if layers < 2:
        raise UsageError("with one layer of experts there is no next gate; plant two layers or more")
    rng = torch.Generator().manual_seed(seed)
    hidden = rows.shape[1]
    signs, shares = [torch.ones(hidden, dtype=torch.int8)], []
    for layer in range(1, layers):
        order = torch.randperm(hidden, generator=rng)
        turned, found = _turned(logits(layer), rows, top_k, share, order)
        signs.append(torch.where(turned, -signs[-1], signs[-1]))
        shares.append(found)
    worst = max(shares, key=lambda found: abs(found - share))
    if abs(worst - share) > TOLERANCE:
        raise UsageError(
            f"a next gate that guesses {share:.0%} cannot be planted with {len(rows)} tokens: the nearest is "
            f"{worst:.0%}; ask for more tokens or another share"
        )
    return Signs(torch.stack(signs), sum(shares) / len(shares))


def _turned(
    logits: torch.Tensor, rows: torch.Tensor, top_k: int, share: float, order: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """bool [hidden]: channels, the first of `order` above all, that make a router of these logits guess `share`; and
    what it then guesses."""
    # As they are written: what the rounding of weights adds belongs to the guess.
    weight, states = (part.bfloat16().double() for part in (router_weight(logits, rows), rows))
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, logits.topk(top_k).indices, True)

    def guessed(channels: torch.Tensor) -> float:
        signs = torch.ones(len(order))
        signs[channels] = -1
        guess = (states * signs) @ weight.T
        return float(chosen.gather(1, guess.topk(top_k).indices).float().mean())

    low, high = 0, len(order)  # none turned is always right, all turned is the opposite
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if guessed(order[:middle]) >= share else (low, middle)
    best = order[:low]
    found = guessed(best)
    for channel in order[low : low + NEAR]:
        if abs(found - share) <= CLOSE:
            break
        more = torch.cat([best, channel[None]])
        if abs(guessed(more) - share) < abs(found - share):
            best, found = more, guessed(more)
    turned = torch.zeros(len(order), dtype=torch.bool)
    turned[best] = True
    return turned, found


class Guesses:
    """Counts what each router of a model would have chosen with the states of the layer before, while the model runs.

    Model: of emoe or of plain transformers. Undo with `remove`.
    """

    def __init__(self, model: nn.Module) -> None:
        routers = [module for module in model.modules() if has_rule(module)]
        self._calls: dict[nn.Module, RouterCall] = {}
        self._before = {router: before for before, router in pairwise(routers)}
        self._right = self._all = 0
        self._handles = [router.register_forward_hook(self._count, with_kwargs=True) for router in routers]

    @property
    def share(self) -> float | None:
        """Of a token's experts, guessed right; None where nothing could be guessed."""
        return self._right / self._all if self._all else None

    def remove(self) -> None:
        """Stop counting."""
        for handle in self._handles:
            handle.remove()

    def _count(self, router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._calls[router] = (args, kwargs)
        if router not in self._before:
            return
        before = self._calls.pop(self._before[router])  # states of every layer would be 200 MB of Qwen3-30B-A3B
        guess, chosen = asked_ahead(router, (args, kwargs), before), chosen_ids(output)
        if guess is not None:
            self._right += int((chosen[:, :, None] == guess[:, None, :]).sum())
            self._all += chosen.numel()
