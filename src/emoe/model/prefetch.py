"""Prefetchers that look at hidden states: what the next layer's own gate would choose now.

They are lossless: what they guess wrong costs a load, never a bit.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from emoe.model.layer import LayerRuntime
from emoe.model.runtime import Runtime
from emoe.residency.worth import Worth

RouterCall = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments that a router was called with, by place and by name."""

IN_FLIGHT = 2
"""Loads ahead of the next layer at once: it comes soon, and demand loads want the link."""


class NextGate:
    """Applies the next MoE layer's router to the input of the running layer's router, and loads what it would choose.

    Residual streams change little from layer to layer, so the guess is often right. Only in steps of one token: a
    prefill needs nearly every expert anyway.
    """

    name = "next-gate"

    def __init__(self, runtime: Runtime, routers: Mapping[int, nn.Module], worth: Worth) -> None:
        """`routers`: decoder layer -> the module that turns hidden states into (logits, weights, ids)."""
        self._layers = runtime.layers
        order = sorted(routers)
        self._next = dict(pairwise(order))
        self._routers = routers
        self._worth = worth
        self._calls: dict[int, RouterCall] = {}
        self.handles = [
            router.register_forward_pre_hook(self._keeper(layer), with_kwargs=True) for layer, router in routers.items()
        ]

    def _keeper(self, layer: int) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls[layer] = (args, kwargs)

        return keep

    def after_take(self, layer: LayerRuntime) -> None:
        """Guess the next layer's experts and ask for those that are missing, best first."""
        following = self._next.get(layer.layer)
        if following is None or not self._worth.active:
            return
        start = time.perf_counter()
        ids = self._guess(layer.layer, following)
        if ids:
            self._layers[following].pool.prefetches.ask([(following, expert) for expert in ids], IN_FLIGHT)
        self._worth.spend(time.perf_counter() - start)

    def _guess(self, layer: int, following: int) -> list[int]:
        """The next router's choice for one token, from its last call's arguments with this layer's hidden state."""
        if layer not in self._calls or following not in self._calls:
            return []
        ids = asked_ahead(self._routers[following], self._calls[following], self._calls[layer])
        if ids is None:  # the next router's last call was a prefill
            return []
        found: list[int] = ids.reshape(-1).tolist()
        return list(dict.fromkeys(found))


def asked_ahead(router: nn.Module, own: RouterCall, earlier: RouterCall) -> torch.Tensor | None:
    """Ids [tokens, k] that `router` chooses with the arguments of its `own` call but the hidden states of an `earlier`
    layer's; None where the two have another shape."""
    hidden, theirs, (args, kwargs) = _hidden_of(*earlier), _hidden_of(*own), own
    if hidden is None or theirs is None or hidden.shape != theirs.shape:
        return None
    if args:
        args = (hidden, *args[1:])
    else:
        kwargs = kwargs | {"hidden_states": hidden}
    with torch.no_grad():
        output = router.forward(*args, **kwargs)  # not called: hooks are for real passes
    return chosen_ids(output)


def chosen_ids(output: Any) -> torch.Tensor:
    """The ids among what a router returns: (logits, weights, ids), in an order that is its family's own."""
    ids: torch.Tensor = next(part for part in output if not part.is_floating_point())
    return ids


def _hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    hidden = args[0] if args else kwargs.get("hidden_states")
    return hidden if isinstance(hidden, torch.Tensor) else None
