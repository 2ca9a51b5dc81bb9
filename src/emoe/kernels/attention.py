"""Attention on a CPU by the C kernels: of few query rows over keys and values as they lie in the cache, and of many.

torch's `scaled_dot_product_attention` takes several times as long for few rows as reading the keys and values does,
because it prepares blocks for queries that are not there; for many rows of bfloat16 its products reach a tenth of what
the processor can do (docs/log.md).
"""

from __future__ import annotations

import torch

from emoe.kernels.native.calls import MASKS, TYPES, Calls

FEW_ROWS = 8
"""Query rows up to which `few_rows` takes them."""

MANY_KEYS = 8192
"""Keys up to which `many_rows` takes them: it holds a key head's keys and values packed, and 12 rows of scores."""

MANY_SIZE = 256
"""The largest value that `many_rows` takes."""


def suits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether `few_rows` takes these; decided by shapes, dtypes and devices alone."""
    return 0 < query.shape[2] <= FEW_ROWS and _known(query, key, value, mask)


def suits_many(
    calls: Calls,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
) -> bool:
    """Whether `many_rows` takes these on this processor; decided by shapes, dtypes and devices alone."""
    return (
        calls.knows_many
        and query.dtype is torch.bfloat16
        and query.shape[2] > FEW_ROWS
        and query.shape[3] % 2 == 0
        and key.shape[2] <= MANY_KEYS
        and value.shape[3] <= MANY_SIZE
        and (mask is not None or not causal or query.shape[2] == key.shape[2])
        and _known(query, key, value, mask)
    )


def _known(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    batch, heads, rows, _ = query.shape
    return (
        query.dtype in TYPES
        and key.dtype is query.dtype
        and value.dtype is query.dtype
        and query.device.type == "cpu"
        and key.shape[2] > 0
        and batch == key.shape[0]
        and heads % key.shape[1] == 0
        and (
            mask is None
            or (
                mask.dim() == 4
                and mask.dtype in MASKS
                and mask.shape[0] in (1, batch)
                and mask.shape[1] in (1, heads)
                and mask.shape[2] in (1, rows)
                and mask.shape[3] == key.shape[2]
            )
        )
    )


def few_rows(
    calls: Calls,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention of `query` over all keys that `mask` leaves; the keys of a group are read once.

    Scores, softmax and sums are in float32, and only the result is rounded. A query's bits do not depend on how many
    rows there are, nor on keys behind its last one that are hidden from it, nor on the number of threads.

    Args:
        calls: the C kernels.
        query: [batch, heads, rows, size].
        key: [batch, key heads, keys, size]; `heads` is a multiple of `key heads`. Any strides.
        value: [batch, key heads, keys, value size].
        mask: [batch or 1, heads or 1, rows or 1, keys]: bool (False hides) or added to the scores.
        scaling: of the scores; None: 1 / sqrt(size).
        sinks: [heads] a score for each head that takes its share of the softmax and adds no value; None: there is none.

    Returns:
        [batch, rows, heads, value size]. A row that sees no key gets the mean of all values (0 with sinks), never NaN.
    """
    return _attend(calls, query, key, value, mask, scaling, sinks)


def many_rows(
    calls: Calls,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None = None,
    sinks: torch.Tensor | None = None,
    *,
    causal: bool = False,
) -> torch.Tensor:
    """The same for many rows of bfloat16, as `suits_many` says; the weights of the softmax are rounded to bfloat16.

    A query's bits do not depend on the other rows, nor on (finite) keys that are hidden from it, nor on the number of
    threads; they are not those of `few_rows`. `causal`: without a mask, row i sees keys up to i, and there
    are as many keys as rows.
    """
    return _attend(calls, query, key, value, mask, scaling, sinks, many=True, causal=causal)


def _attend(
    calls: Calls,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    sinks: torch.Tensor | None,
    *,
    many: bool = False,
    causal: bool = False,
) -> torch.Tensor:
    batch, heads, rows, size = query.shape
    query, key, value = (each if each.stride(3) == 1 else each.contiguous() for each in (query, key, value))
    if mask is not None and mask.stride(3) != 1:
        mask = mask.contiguous()
    out = query.new_empty(batch, rows, heads, value.shape[3])
    if sinks is not None:
        sinks = sinks.float().contiguous()
    scaling = size**-0.5 if scaling is None else scaling
    calls.attention(query, key, value, mask, sinks, scaling, out, many=many, causal=causal and mask is None)
    return out
