"""Attach a routing rule to a model's own router module, so that its block passes on allowed experts only.

rule = rule_for(block, experts)
attachment = rule.attach(allowed=lambda: mask, observe=print)
...
attachment.remove()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from emoe.errors import UnsupportedModelError, UsageError
from emoe.routing.rules.families import Routed, RouterCall
from emoe.routing.rules.registry import ENTRIES, Entry, class_key

Allowed = Callable[[], Tensor | None]
Observe = Callable[[Tensor, Tensor], None]

_EXACT = 'use mode="exact", which needs no rule'


def has_rule(router: nn.Module) -> bool:
    """Whether this router's class has a routing rule."""
    return class_key(router) in ENTRIES


def rule_for(block: nn.Module, experts: nn.Module) -> RouterRule:
    """The rule of the router beside `experts` in `block`, the module that calls both.

    Raises UnsupportedModelError where the family has none: another router class, or one that lacks a
    setting the rule reads, as in another version of transformers.
    """
    others = {name: child for name, child in block.named_children() if child is not experts}
    routers = [name for name, child in others.items() if has_rule(child)]
    if len(routers) != 1:
        seen = ", ".join(f"{name} ({class_key(child)})" for name, child in others.items()) or "nothing"
        count = "no" if not routers else "more than one"
        raise UnsupportedModelError(
            f"{class_key(block)} has {count} router with a routing rule; beside its experts it has {seen}; {_EXACT}"
        )
    router = others[routers[0]]
    key = class_key(router)
    entry = ENTRIES[key]
    missing = [name for name in entry.needs if not hasattr(router, name)]
    if missing:
        raise UnsupportedModelError(
            f"{key} lacks {', '.join(missing)}, which its routing rule reads: this version of transformers "
            f"routes differently; {_EXACT}"
        )
    settings: Any = experts
    num_experts = int(settings.num_experts)
    _check_groups(key, router, num_experts)
    return RouterRule(key, entry, router, num_experts)


def _check_groups(key: str, router: Any, num_experts: int) -> None:
    """Refuse group limits under which the family's own router would pick experts it has ruled out."""
    number = getattr(router, "num_group", None)
    if number is None or getattr(router, "topk_method", "") == "greedy":
        return
    within = router.topk_group * (num_experts // number)
    if within < router.top_k:
        raise UnsupportedModelError(
            f"{key} chooses {router.top_k} experts from {router.topk_group} of {number} groups, which hold "
            f"only {within}; {_EXACT}"
        )


class RouterRule:
    """One router and the rule that tells what it would choose among fewer experts.

    kind: the rule in words; family: `folder.Class` of the router; router: the module; num_experts:
    experts in the layer, the length of every mask.
    """

    def __init__(self, family: str, entry: Entry, router: nn.Module, num_experts: int) -> None:
        self.family = family
        self.kind = entry.kind
        self.router = router
        self.num_experts = num_experts
        self._entry = entry

    def __repr__(self) -> str:
        return f"RouterRule({self.family}, {self.kind!r}, experts={self.num_experts})"

    def route(self, call: RouterCall, allowed: Tensor | None) -> Routed:
        """What the router would return for `call` with only `allowed` experts, a bool mask
        [experts] or [tokens, experts]; None restricts nothing."""
        return self._entry.rule(call, allowed)

    def attach(self, allowed: Allowed, observe: Observe | None = None) -> Attachment:
        """Restrict the router from now on, until the attachment is removed.

        On each call of the router, `observe(ids, weights)` first gets the model's own choice, [tokens, k]
        each; then `allowed()` gives the mask, [experts] or [tokens, experts] on any device, True for
        experts that may run. With None the router's output passes untouched. Every token needs at least
        one allowed expert; that is checked for masks on the CPU (on a GPU it would stall the stream).

        The first restricted call also checks that the rule, with every expert allowed, repeats the
        router's own result exactly. UnsupportedModelError is raised from the forward pass if it does not.
        """
        hooks = self.router._forward_hooks.values()
        if any(isinstance(hook, _Restriction) for hook in hooks):
            raise UsageError(f"{self.family} already has a routing rule attached; remove that one first")
        restriction = _Restriction(self, allowed, observe)
        handles = [self.router.register_forward_hook(restriction, with_kwargs=True)]
        if self._entry.logits_from:
            source = self.router.get_submodule(self._entry.logits_from)
            handles.append(source.register_forward_hook(restriction.keep_logits))
        return Attachment(handles)


class Attachment:
    """A rule at work on a router; `remove()` restores the router, and may be called again."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Take the rule off the router."""
        while self._handles:
            self._handles.pop().remove()


class _Restriction:
    """The forward hook: replaces the router's choice where a mask is given."""

    def __init__(self, rule: RouterRule, allowed: Allowed, observe: Observe | None) -> None:
        self.rule = rule
        self.allowed = allowed
        self.observe = observe
        self.logits: Tensor | None = None
        self.proved = False

    def keep_logits(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.logits = output

    def __call__(
        self, router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        # Some versions return (ids, weights, logits), the others (logits, weights, ids); only ids are
        # integers.
        ids_first = not output[0].is_floating_point()
        returned, weights, ids = output[:3][::-1] if ids_first else output[:3]
        if self.observe is not None:
            self.observe(ids, weights)
        mask = self.allowed()
        logits, self.logits = returned if self.logits is None else self.logits, None
        if mask is None:
            return None
        call = RouterCall(router, args, kwargs, logits, ids, weights)
        mask = self._checked(mask, call)
        if not self.proved:
            self._prove(call)
            self.proved = True
        routed = self.rule.route(call, mask)
        first = (returned, routed.weights, routed.ids)
        rest = output[3:] if routed.rest is None else routed.rest
        return (*(first[::-1] if ids_first else first), *rest)

    def _checked(self, mask: Tensor, call: RouterCall) -> Tensor:
        experts, tokens = self.rule.num_experts, call.ids.shape[0]
        if mask.dtype != torch.bool or tuple(mask.shape) not in {(experts,), (tokens, experts)}:
            raise UsageError(
                f"the mask of allowed experts must be bool with shape ({experts},) or ({tokens}, {experts}), "
                f"not {mask.dtype} {tuple(mask.shape)}"
            )
        if mask.device.type == "cpu" and not bool(mask.any(dim=-1).all()):
            raise UsageError(f"every token needs at least one allowed expert of {experts}; the mask allows none")
        return mask.to(call.logits.device, non_blocking=True)

    def _prove(self, call: RouterCall) -> None:
        everyone = torch.ones(self.rule.num_experts, dtype=torch.bool, device=call.logits.device)
        routed = self.rule.route(call, everyone)
        same = (
            routed.weights.dtype == call.weights.dtype
            and torch.equal(routed.ids, call.ids)
            # Where all a token's weights underflow, some routers return nan and the rule returns 0.
            and torch.equal(routed.weights.nan_to_num(0), call.weights.nan_to_num(0))
        )
        if not same:
            raise UnsupportedModelError(
                f"{self.rule.family} does not route as its rule does ({self.rule.kind}): a replaced kernel "
                f"(use_kernels=True) or another version of transformers; {_EXACT}"
            )
