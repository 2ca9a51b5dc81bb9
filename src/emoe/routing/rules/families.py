"""The families' rules: which kind each router follows and where its settings lie in the router module.

One function per way of reading settings; `registry` says which classes it serves. A rule answers with the
dtypes that the router itself returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emoe.errors import UnsupportedModelError, UsageError
from emoe.routing.rules import kinds
from emoe.routing.rules.kinds import Groups


@dataclass(frozen=True, slots=True)
class RouterCall:
    """One call of a router: what it was given and what it returned.

    logits [tokens, experts]; ids [tokens, k] int64 and weights [tokens, k] are the router's own choice.
    """

    router: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    logits: Tensor
    ids: Tensor
    weights: Tensor

    def argument(self, position: int, name: str) -> Any:
        """An argument of the router's forward, however it was passed."""
        return self.kwargs[name] if name in self.kwargs else self.args[position]


@dataclass(frozen=True, slots=True)
class Routed:
    """A rule's answer; `rest`, where given, replaces what the router returns beyond logits, weights, ids."""

    ids: Tensor
    weights: Tensor
    rest: tuple[Tensor, ...] | None = None


Rule = Callable[[RouterCall, Tensor | None], Routed]


# Softmax over all experts, then the best k.


# A rule's `renormalise` is None where the router has a flag for it.


def softmax(call: RouterCall, allowed: Tensor | None, renormalise: bool | None, upcast: bool = False) -> Routed:
    """Softmax over all experts; `renormalise` is None where the router has a flag for it."""
    router = call.router
    # Casting before the softmax and inside it are different kernels on some devices: follow the family.
    logits = call.logits.float() if upcast else call.logits
    ids, weights = kinds.softmax_topk(
        logits,
        allowed,
        top_k=router.top_k,
        renormalise=bool(router.norm_topk_prob) if renormalise is None else renormalise,
        dtype=call.weights.dtype,
    )
    return Routed(ids, weights)


def gemma(call: RouterCall, allowed: Tensor | None) -> Routed:
    """Renormalised shares times a learned scale of each expert."""
    ids, weights = kinds.softmax_topk(
        call.logits, allowed, top_k=call.router.config.top_k_experts, renormalise=True, dtype=torch.float
    )
    return Routed(ids, weights * call.router.per_expert_scale[ids])


def ernie(call: RouterCall, allowed: Tensor | None) -> Routed:
    """ERNIE 4.5: a learned bias helps to choose, and the weights' sum is bounded from below."""
    router = call.router
    bias = router.moe_statics.e_score_correction_bias.squeeze()
    ids, weights = kinds.biased_softmax_topk(
        call.logits,
        allowed,
        top_k=router.top_k,
        bias=bias,
        least_sum=router.norm_min,
        dtype=call.weights.dtype,
    )
    return Routed(ids, weights)


def deepseek_v2(call: RouterCall, allowed: Tensor | None) -> Routed:
    """Shares times a factor, never renormalised; groups where the configuration says so.

    Raises:
        UnsupportedModelError: a `topk_method` without a rule.
    """
    router = call.router
    scores = kinds.forbid(call.logits, allowed).softmax(dim=-1, dtype=torch.float32)
    if router.topk_method == "group_limited_greedy":
        groups = Groups(router.num_group, router.topk_group, outside=0.0, score="max")
        scores = kinds.limit_to_groups(scores, allowed, groups)
    elif router.topk_method != "greedy":
        raise UnsupportedModelError(
            f"topk_method {router.topk_method!r} has no routing rule (greedy and group_limited_greedy have); "
            'use mode="exact"'
        )
    ids, filled = kinds.choose(scores, allowed, router.top_k, in_order=False)
    return Routed(ids, kinds.take(scores, ids, filled) * router.routed_scaling_factor)


def mistral4(call: RouterCall, allowed: Tensor | None, renormalise: bool | None) -> Routed:
    """Shares in the logits' dtype, within the groups whose two best sum highest."""
    router = call.router
    scores = kinds.forbid(call.logits, allowed).softmax(-1)
    groups = Groups(router.num_group, router.topk_group, outside=0.0)
    ids, weights = kinds.scores_topk(scores, allowed, top_k=router.top_k, groups=groups)
    if router.norm_topk_prob if renormalise is None else renormalise:
        weights = kinds.normalise(weights, 1e-20)
    return Routed(ids, weights * router.routed_scaling_factor)


# The best k, then softmax over those.


def topk_softmax(
    call: RouterCall, allowed: Tensor | None, dtype: torch.dtype | None = None, shared_out: bool = False
) -> Routed:
    """gpt-oss and its like; `dtype` is that of the softmax, else the logits'."""
    top_k = call.router.top_k
    ids, weights = kinds.topk_softmax(call.logits, allowed, top_k=top_k, dtype=dtype or call.logits.dtype)
    if shared_out:  # the block multiplies the output by k again
        weights = weights / top_k
    return Routed(ids, weights.to(call.weights.dtype))


def cohere2(call: RouterCall, allowed: Tensor | None) -> Routed:
    """Softmax or sigmoid of the best k logits, as the configuration says."""
    router = call.router
    if router.expert_selection_fn == "softmax":
        return topk_softmax(call, allowed, torch.float)
    ids, filled = kinds.choose(call.logits, allowed, router.top_k)
    weights = torch.sigmoid(call.logits.gather(-1, ids)).masked_fill(~filled, 0)
    if router.norm_topk_prob:
        weights = kinds.normalise(weights)
    return Routed(ids, weights.to(call.weights.dtype))


# Sigmoid scores, most with a correction bias that decides the choice but not the weights.


def deepseek_v3(call: RouterCall, allowed: Tensor | None, outside: float = kinds.NEVER) -> Routed:
    """In the logits' dtype; `outside` is the choice score of experts outside the chosen groups."""
    router = call.router
    groups = None if router.num_group is None else Groups(router.num_group, router.topk_group, outside)
    ids, weights = kinds.scores_topk(
        call.logits.sigmoid(), allowed, top_k=router.top_k, bias=router.e_score_correction_bias, groups=groups
    )
    if router.norm_topk_prob:
        weights = kinds.normalise(weights, 1e-20)
    return Routed(ids, weights * router.routed_scaling_factor)


def beam(call: RouterCall, allowed: Tensor | None) -> Routed:
    """As `deepseek_v3`, in order of the choice scores and without a factor."""
    router = call.router
    ids, weights = kinds.scores_topk(
        call.logits.sigmoid(),
        allowed,
        top_k=router.top_k,
        bias=router.e_score_correction_bias,
        groups=Groups(router.num_group, router.topk_group),
        in_order=True,
    )
    return Routed(ids, kinds.normalise(weights, 1e-20) if router.norm_topk_prob else weights)


def sigmoid(
    call: RouterCall,
    allowed: Tensor | None,
    *,
    bias: str | None = "e_score_correction_bias",
    bias_is_argument: bool = False,
    epsilon: float = 0.0,
    scale: str | None = None,
    in_order: bool = False,
    renormalise: bool | None = True,
) -> Routed:
    """Sigmoid in float32, choice by score + bias; `bias` and `scale` name where those lie."""
    router = call.router
    offset: Tensor | None = None
    if bias is not None:
        offset = call.argument(1, bias) if bias_is_argument else getattr(router, bias)
    ids, weights = kinds.scores_topk(
        torch.sigmoid(call.logits.float()), allowed, top_k=router.top_k, bias=offset, in_order=in_order
    )
    if router.norm_topk_prob if renormalise is None else renormalise:
        weights = kinds.normalise(weights, epsilon)
    if scale is not None:
        weights = weights * getattr(router, scale)
    return Routed(ids, weights.to(call.weights.dtype))


def scored(call: RouterCall, allowed: Tensor | None) -> Routed:
    """As `sigmoid`, with the score function that the configuration names, in the logits' dtype."""
    router = call.router
    ids, weights = kinds.scores_topk(
        router.score_fn(call.logits), allowed, top_k=router.top_k, bias=router.e_score_correction_bias
    )
    return Routed(ids, kinds.normalise(weights, 1e-20) * router.routed_scaling_factor)


def tabled(call: RouterCall, allowed: Tensor | None) -> Routed:
    """Experts that a table prescribes for each token id; the scores decide only their weights."""
    ids, weights = kinds.tabled_topk(call.router.score_fn(call.logits), allowed, tabled=call.ids)
    return Routed(ids, kinds.normalise(weights, 1e-20) * call.router.routed_scaling_factor)


def lfm2(call: RouterCall, allowed: Tensor | None) -> Routed:
    """The bias is an argument of the router, used if the configuration says so."""
    router = call.router
    bias = call.argument(1, "expert_bias") if router.use_expert_bias else None
    ids, weights = kinds.scores_topk(call.logits.sigmoid(), allowed, top_k=router.top_k, bias=bias, in_order=True)
    if router.norm_topk_prob:
        weights = kinds.normalise(weights, 1e-6)
    return Routed(ids, weights * router.routed_scaling_factor)


def kolibri1(call: RouterCall, allowed: Tensor | None) -> Routed:
    """Chosen by logits + bias; the weights are sigmoids of the bare logits."""
    router = call.router
    ids, filled = kinds.choose(call.logits + router.e_score_correction_bias, allowed, router.top_k)
    weights = call.logits.gather(1, ids).sigmoid().masked_fill(~filled, 0)
    return Routed(ids, kinds.normalise(weights) if router.norm_topk_prob else weights)


# Routers of one family.


def phimoe(call: RouterCall, allowed: Tensor | None) -> Routed:
    """SparseMixer: the second choice, and who counts in its softmax, depend on the first."""
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    router = call.router
    if router.training:
        raise UsageError("the router of a PhiMoE model draws at random in training mode; call model.eval() first")
    logits = kinds.forbid(call.logits, allowed)
    weights, ids = sparsemixer(logits, jitter_eps=router.router_jitter_noise, training=False, top_k=router.top_k)
    if allowed is not None:  # with one expert allowed there is no second, and its softmax is over nothing
        filled = logits.gather(-1, ids) != kinds.NEVER
        filled[:, 1] &= ids[:, 1] != ids[:, 0]
        ids = torch.where(filled, ids, ids[:, :1])
        weights = weights.masked_fill(~filled, 0)
    return Routed(ids, weights)


def inkling(call: RouterCall, allowed: Tensor | None) -> Routed:
    """Routed and shared experts are weighed together, so the shared experts' weights change too."""
    router = call.router
    hidden = call.argument(0, "hidden_states")
    with torch.autocast(device_type=hidden.device.type, enabled=False):
        # The router keeps its shared experts' logits to itself: repeat its own projection.
        flat = hidden.reshape(-1, router.hidden_dim)
        logits = torch.nn.functional.linear(flat.float(), router.weight.float())
        routed, shared = logits[..., : -router.n_shared_experts], logits[..., -router.n_shared_experts :]
        choice = logits.sigmoid()[..., : -router.n_shared_experts] + router.e_score_correction_bias.float()
        ids, filled = kinds.choose(choice, allowed, router.top_k, in_order=False)
        chosen = routed.gather(-1, ids).masked_fill(~filled, kinds.NEVER)
        shares = torch.nn.functional.logsigmoid(torch.cat([chosen, shared], dim=-1))
        weights = torch.exp(shares - torch.logsumexp(shares, dim=-1, keepdim=True))
        weights = (weights * router.route_scale * router.global_scale.float()).to(call.weights.dtype)
    gammas = weights[..., -router.n_shared_experts :].contiguous()
    return Routed(ids, weights[..., : router.top_k].contiguous(), (gammas,))


def zaya(call: RouterCall, allowed: Tensor | None) -> Routed:
    """One class more than experts: the last means "no expert", is always allowed, and shows as weight 0."""
    router = call.router
    experts = router.num_experts
    classes = None
    if allowed is not None:
        classes = torch.cat([allowed, torch.ones_like(allowed[..., :1])], dim=-1)
    shares = torch.softmax(kinds.forbid(call.logits, classes), dim=-1)
    choice = shares.detach().to(torch.float32) + router.balancing_biases
    ids, filled = kinds.choose(choice, classes, router.top_k)
    skipped = ids == experts
    weights = kinds.take(shares, ids, filled & ~skipped)
    idle = torch.zeros_like(ids[:, :1])
    if allowed is not None:
        best = kinds.forbid(choice[:, :experts], allowed).argmax(dim=-1, keepdim=True)
        idle = torch.where(allowed.expand_as(choice[:, :experts])[:, :1], idle, best)
    return Routed(torch.where(skipped, idle, ids), weights)
