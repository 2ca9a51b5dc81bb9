"""Attention of a packed step, request by request.

transformers packs a step's requests into one sequence and attends with one mask of [tokens, keys of all requests]: cost
and memory grow with the square of the batch. Here the pages are written and read by transformers' cache, and each
request then attends alone, with exactly the arguments that `generate()` would have used for it: same kernel, same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

IMPLEMENTATION = "emoe_paged_sdpa"
"""The name under which transformers finds `packed_attention`."""

Rows = Callable[[int], tuple[torch.Tensor, torch.Tensor, int]]
"""A layer's keys and values in the cache, [rows, key heads, size] each, and the number of the layer's group."""


@dataclass(slots=True)
class Packed:
    """What `packed_attention` has to know of the step under way; lies on the cache as `emoe`.

    Attributes:
        rows: where a layer's keys and values lie, see `Rows`.
        attend: the attention function of one request, the one that `generate()` uses.
        queries, keys: how many each request has in this step, in the order of the packed sequence. Keys are those of
            before and the step's own.
    """

    rows: Rows
    attend: Callable[..., tuple[torch.Tensor, None]] = sdpa_attention_forward
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
    packed: Packed = kwargs["cache"].emoe
    keys, values, group = packed.rows(int(module.layer_idx))  # type: ignore[arg-type]
    write, read = kwargs["write_index"][group], kwargs["read_index"][group]
    keys.index_copy_(0, write, key[0].transpose(0, 1))
    values.index_copy_(0, write, value[0].transpose(0, 1))
    outputs = []
    for query_, key_, value_, own in zip(
        torch.split(query, packed.queries, dim=2),
        torch.split(key, packed.queries, dim=2),
        torch.split(value, packed.queries, dim=2),
        torch.split(read, packed.keys) if read.numel() else [None] * len(packed.keys),
        strict=True,
    ):
        # Without anything to read the step is made of whole prompts, and their own keys and values are all there are.
        # Read for one request after the other, what is attended to lies in the processor's cache.
        k = key_ if own is None else keys.index_select(0, own).transpose(0, 1)[None]
        v = value_ if own is None else values.index_select(0, own).transpose(0, 1)[None]
        outputs.append(_alone(packed, module, query_, k, v, dropout, scaling))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1), None


def _alone(
    packed: Packed,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: Any,
) -> torch.Tensor:
    """One request: a whole prompt or one token needs no mask, a later chunk of a prompt does."""
    queries, keys = query.shape[2], key.shape[2]
    mask = None
    if 1 < queries < keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril_(keys - queries)[None, None]
    return packed.attend(module, query, key, value, mask, dropout, scaling, is_causal=True)[0]


def slides(model: PreTrainedModel) -> bool:
    """Whether some layer attends to a window only."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return "sliding_attention" in kinds
    return getattr(config, "sliding_window", None) is not None


def rows_of(cache: Any) -> Rows:
    """Where the paged cache keeps a layer's keys and values."""

    def rows(layer: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        allocator = cache.layer_to_allocator[layer]
        keys, values = allocator._kv_token_views[layer]
        return keys, values, int(allocator.index)

    def rows_by_group(layer: int) -> tuple[torch.Tensor, torch.Tensor, int]:  # transformers 5.17
        group, number = cache.layer_index_to_group_indices[layer]
        return cache.key_cache[number], cache.value_cache[number], int(group)

    return rows if hasattr(cache, "layer_to_allocator") else rows_by_group


AttentionInterface.register(IMPLEMENTATION, packed_attention)
