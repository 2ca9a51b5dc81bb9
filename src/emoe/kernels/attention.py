"""Attention of few query rows in bfloat16 on a CPU, by two matrix products.

torch's `scaled_dot_product_attention` takes several times as long there as reading the keys and values does, because it
prepares blocks for queries that are not there (docs/log.md).
"""

from __future__ import annotations

import torch

FEW_ROWS = 8
"""Query rows up to which the products are faster."""

LEAST, LEAST_MASKED = 1 << 15, 1 << 17
"""From where they are faster; below, their four operations take longer to call than torch's one. Without a mask:
products in a row's scores, since torch then reads the keys once a head; with one: numbers in the keys, since
transformers then packs the heads of a group (measured: bench/engine_attention.py --layers)."""


def suits(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether `few_rows` is the faster way for these; decided by shapes, dtypes and devices alone."""
    rows = query.shape[2]
    return (
        query.dtype is torch.bfloat16
        and key.dtype is torch.bfloat16
        and query.device.type == "cpu"
        and 0 < rows <= FEW_ROWS
        and query.shape[0] == key.shape[0]
        and query.shape[1] % key.shape[1] == 0
        and (
            query.numel() // rows * key.shape[2] >= LEAST
            if mask is None
            else mask.dim() == 4 and key.numel() >= LEAST_MASKED
        )
    )


def few_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None = None,
) -> torch.Tensor:
    """Return the attention of `query` over all keys that `mask` leaves; the keys of a group are read once.

    The scores are rounded to the input's dtype, as transformers' eager attention does; the softmax is in float32.

    Args:
        query: [batch, heads, rows, size].
        key: [batch, key heads, keys, size]; `heads` is a multiple of `key heads`. Any strides.
        value: [batch, key heads, keys, value size].
        mask: [batch or 1, heads or 1, rows or 1, keys]: bool (False hides) or added to the scores.
        scaling: of the scores; None: 1 / sqrt(size).

    Returns:
        [batch, rows, heads, value size]. A row that sees no key gets a mean of values, never NaN.
    """
    batch, heads, rows, size = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    group = heads // key_heads
    grouped = query.reshape(batch, key_heads, group * rows, size)
    # The keys stand on the left: so torch reads them in place whatever their strides.
    scores = torch.matmul(key, grouped.transpose(2, 3)).transpose(2, 3).float()
    scores = scores * (size**-0.5 if scaling is None else scaling)
    if mask is not None:
        least = torch.finfo(scores.dtype).min
        apart = scores.reshape(batch, key_heads, group, rows, keys)
        each = (
            mask.unsqueeze(2) if mask.shape[1] == 1 else mask.reshape(mask.shape[0], key_heads, group, *mask.shape[2:])
        )
        apart = apart.masked_fill(~each, least) if mask.dtype == torch.bool else (apart + each).clamp(min=least)
        scores = apart.reshape(batch, key_heads, group * rows, keys)
    weights = torch.softmax(scores, dim=-1).to(query.dtype)
    out = torch.matmul(weights, value).view(batch, heads, rows, value.shape[-1])
    return out.transpose(1, 2).contiguous()
