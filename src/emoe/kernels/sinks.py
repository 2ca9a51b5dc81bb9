"""Attention with sinks over many query rows, without ever writing a prompt's scores out.

A sink is a score of each head that takes part in the softmax and adds no value. From the logarithm of a softmax's sum
it is added afterwards: out * sigmoid(logsum - sink). torch's fused attention on a CPU gives both; elsewhere, and where
keys and values are of unequal size, blocks of rows are computed one after another.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any, cast

import torch
from torch import nn

ROWS = 256
"""Query rows at a time: keys that none of them sees are left out (windows, what is to come)."""

BLOCK_BYTES = 16 << 20
"""Of scores in float32 that are written out at once where torch's fused attention cannot be used."""

PACKED_BYTES = 8 << 20
"""Of keys and values that torch's fused attention packs at once, which it does for each head."""

KEYS = 8192
"""Keys at a time; beyond, results are joined by the logarithms of their sums."""

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def with_sinks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None = None,
    sinks: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Return the attention of `query` over all keys that `mask` leaves, with `sinks` in the softmax.

    Args:
        query: [batch, heads, rows, size].
        key: [batch, key heads, keys, size]; `heads` is a multiple of `key heads`. Any strides.
        value: [batch, key heads, keys, value size].
        mask: [batch or 1, heads or 1, rows, keys]: bool (False hides) or added to the scores; None with as many keys as
            rows, or without `causal`.
        scaling: of the scores; None: 1 / sqrt(size).
        sinks: [heads] the score of each head's sink; None: there is none.
        causal: whether row i sees keys up to i only; beside a mask it says nothing.

    Returns:
        [batch, rows, heads, value size]. A row that sees no key gets 0 with sinks, else the mean of all
        values (of more than `KEYS`, some other number).
    """
    batch, heads, rows, size = query.shape
    scaling = size**-0.5 if scaling is None else scaling
    out = query.new_zeros(batch, rows, heads, value.shape[3])
    fused = query.device.type == "cpu" and value.shape[3] == size and query.dtype.is_floating_point
    for b in range(batch):
        each = None if mask is None else mask[min(b, mask.shape[0] - 1)]
        step = ROWS if fused else max(1, min(ROWS, BLOCK_BYTES // (4 * heads * key.shape[2])))
        for start in range(0, rows, step):
            end = min(start + step, rows)
            block = _block(each, start, end, key.shape[2], causal, query.device)
            first, last = _seen(block, key.shape[2], sinks is None)
            if first >= last:
                continue
            q, k, v = query[b, :, start:end], key[b, :, first:last], value[b, :, first:last]
            m = None if block is None else block[..., first:last]
            (_flash if fused else _plain)(q, k, v, m, scaling, sinks, out[b, start:end])
    return out


def _block(
    mask: torch.Tensor | None, start: int, end: int, keys: int, causal: bool, device: torch.device
) -> torch.Tensor | None:
    """The mask of some rows, [heads or 1, rows, keys]."""
    if mask is not None:
        return mask[:, start:end]
    if not causal:
        return None
    return torch.arange(keys, device=device) <= torch.arange(start, end, device=device)[None, :, None]


def _seen(mask: torch.Tensor | None, keys: int, means: bool) -> tuple[int, int]:
    """The first and the last key (exclusive) that some row sees.

    All of them where finding out would hold a GPU up, and where a row that sees none is to get what all `means`.
    """
    if mask is None or mask.device.type != "cpu":
        return 0, keys
    shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    if means and not bool(shown.any(dim=-1).all()):
        return 0, keys
    columns = shown.any(dim=0).any(dim=0).nonzero()
    return (int(columns[0]), int(columns[-1]) + 1) if columns.numel() else (0, 0)


def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What hides keys when it is added to scores; never -inf, of which a row of nothing else would make NaN."""
    least = torch.finfo(dtype).min
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, least)
    return mask.to(dtype).clamp(min=least)


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Of one sequence, by torch's fused attention, whose batch are key heads, so that no group's keys are copied.

    It packs keys and values for each head anew, so that long ones go through it one key head and `KEYS` keys at a time.
    """
    heads, rows, size = query.shape
    key_heads, keys = key.shape[:2]
    group = heads // key_heads
    added = None if mask is None else _added(mask, query.dtype)
    if added is not None:
        added = added.view(*((1, 1) if added.shape[0] == 1 else (key_heads, group)), *added.shape[1:])
    queries, target = query.view(key_heads, group, rows, size), out.view(rows, key_heads, group, size)
    step = key_heads if 2 * heads * keys * size * query.itemsize <= PACKED_BYTES else 1
    for first in range(0, key_heads, step):
        last = first + step
        shape = (step, group, keys, size)
        k, v = (each[first:last, None].expand(shape) for each in (key, value))
        m = added if added is None or added.shape[0] == 1 else added[first:last]
        result, logsum = _segments(queries[first:last], k, v, m, scaling)
        to = target[:, first:last].permute(1, 2, 0, 3)
        if sinks is None:
            to.copy_(result)
        else:
            sink = sinks.float().view(key_heads, group, 1)[first:last]
            torch.mul(result, torch.sigmoid(logsum - sink).unsqueeze(-1), out=to)


def _segments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over all keys and the logarithm of its sum, from those over `KEYS` keys each."""
    found: tuple[torch.Tensor, torch.Tensor] | None = None
    for start in range(0, key.shape[2], KEYS):
        k, v = key[:, :, start : start + KEYS], value[:, :, start : start + KEYS]
        m = None if mask is None else mask[..., start : start + KEYS]
        result, logsum = _fused(query, k, v, 0.0, False, attn_mask=m, scale=scaling)
        if found is not None:
            both = torch.logaddexp(found[1], logsum)
            new = torch.sigmoid(logsum - found[1]).unsqueeze(-1)
            result, logsum = found[0].float() * (1 - new) + result.float() * new, both
        found = result, logsum
    return cast(tuple[torch.Tensor, torch.Tensor], found)


def _plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Of one sequence, with the scores written out in float32."""
    heads, rows, size = query.shape
    key_heads = key.shape[0]
    group = heads // key_heads
    scores = torch.matmul(query.reshape(key_heads, group * rows, size), key.transpose(1, 2)).float() * scaling
    scores = scores.view(heads, rows, -1)
    if mask is not None:
        scores += _added(mask, torch.float32)
    most = scores.amax(dim=-1, keepdim=True)
    sink = None if sinks is None else sinks.float().view(heads, 1, 1)
    most = most if sink is None else torch.maximum(most, sink)
    scores = scores.sub_(most).exp_()
    total = scores.sum(dim=-1, keepdim=True)
    if sink is not None:
        total += (sink - most).exp()
    weights = scores.div_(total).to(value.dtype).view(key_heads, group * rows, -1)
    out.copy_(torch.matmul(weights, value).view(heads, rows, -1).transpose(0, 1))


def sunk(model: nn.Module) -> list[nn.Module]:
    """The attention layers of a transformers model that hand their sinks to the attention function, as `s_aux`."""
    return [module for module in model.modules() if "s_aux=" in _code(type(module).forward)]


def changes_mask(attention: nn.Module) -> bool:
    """Whether a layer's code does more with its mask than take it and pass it on: it then wants eager's."""
    return _code(type(attention).forward).count("attention_mask") != 2


def same_as_eager(attention: nn.Module) -> bool:
    """Whether a layer's own eager attention computes what `with_sinks` does: found by trying it."""
    sinks = getattr(attention, "sinks", None)
    eager = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
    group = getattr(attention, "num_key_value_groups", None)
    if eager is None or not isinstance(group, int):
        return False
    key_heads = 2 if sinks is None else sinks.numel() // group
    device = next((parameter.device for parameter in attention.parameters()), torch.device("cpu"))
    made = torch.Generator().manual_seed(0)
    query = torch.randn(1, key_heads * group, 3, 8, generator=made).to(device)
    key, value = torch.randn(2, 1, key_heads, 5, 8, generator=made).to(device)
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool, device=device).tril(2)
    added = torch.zeros(mask.shape, device=device).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.no_grad():
        theirs = eager(attention, query, key, value, added, scaling=0.4, dropout=0.0)[0]
        ours = with_sinks(query, key, value, mask, 0.4, sinks)
    return theirs.shape == ours.shape and torch.allclose(theirs.float(), ours, rtol=1e-3, atol=1e-4)


def _code(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""
