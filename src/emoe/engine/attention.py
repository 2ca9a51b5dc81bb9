"""Attention of a packed step, request by request.

transformers packs a step's requests into one sequence and attends with one mask of [tokens, keys of all requests]: cost
and memory grow with the square of the batch. Here the pages are written and read by transformers' cache, and each
request then attends alone, with exactly the arguments that `generate()` would have used for it: same kernel, same bits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

IMPLEMENTATION = "emoe_paged_sdpa"
"""The name under which transformers finds `packed_attention`."""

Update = Callable[[torch.Tensor, torch.Tensor, int, dict[str, Any]], tuple[torch.Tensor, torch.Tensor]]
"""Writes a step's keys and values [1, heads, tokens, size] of one layer, and reads [1, heads, keys, size]."""


@dataclass(slots=True)
class Packed:
    """What `packed_attention` has to know of the step under way; lies on the cache as `emoe`.

    Attributes:
        update: the cache's own update, see `Update`.
        queries, keys: how many each request has in this step, in the order of the packed sequence. Keys are those of
            before and the step's own.
    """

    update: Update
    queries: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over a packed step; the arguments are those of transformers' attention functions.

    Args:
        module: the attention layer.
        query: [1, heads, tokens, size].
        key, value: [1, key heads, tokens, size].
        attention_mask: none: every request attends causally to its own past.
        dropout, scaling, kwargs: as transformers passes them; `cache` is the paged cache.

    Returns:
        [1, tokens, heads, size], None.
    """
    cache = kwargs.pop("cache")
    packed: Packed = cache.emoe
    key, value = packed.update(key, value, int(module.layer_idx), kwargs)  # type: ignore[arg-type]
    if len(packed.queries) == 1:
        return _alone(module, query, key, value, dropout, scaling), None
    parts = zip(
        torch.split(query, packed.queries, dim=2),
        torch.split(key, packed.keys, dim=2),
        torch.split(value, packed.keys, dim=2),
        strict=True,
    )
    return torch.cat([_alone(module, q, k, v, dropout, scaling) for q, k, v in parts], dim=1), None


def _alone(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, scaling: Any
) -> torch.Tensor:
    """One request: a whole prompt or one token needs no mask, a later chunk of a prompt does."""
    queries, keys = query.shape[2], key.shape[2]
    mask = None
    if 1 < queries < keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril_(keys - queries)[None, None]
    output: torch.Tensor = sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, is_causal=True)[0]
    return output


def slides(model: PreTrainedModel) -> bool:
    """Whether some layer attends to a window only."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return "sliding_attention" in kinds
    return getattr(config, "sliding_window", None) is not None


def update_of(cache: Any) -> Update:
    """The cache's update behind one signature."""
    if "kwargs" in inspect.signature(cache.update).parameters:

        def update(
            key: torch.Tensor, value: torch.Tensor, layer: int, kwargs: dict[str, Any]
        ) -> tuple[torch.Tensor, torch.Tensor]:
            found: tuple[torch.Tensor, torch.Tensor] = cache.update(key, value, layer, kwargs)
            return found

        return update

    def update_by_index(  # transformers < 5.19
        key: torch.Tensor, value: torch.Tensor, layer: int, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = cache.update(key, value, layer, kwargs["read_index"], kwargs["write_index"])
        key, value = (states.transpose(0, 1).unsqueeze(0) for states in found)
        return key, value

    return update_by_index


AttentionInterface.register(IMPLEMENTATION, packed_attention)
