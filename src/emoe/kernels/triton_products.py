"""Products of rows with the matrices of slots, in Triton. Import this only where Triton is installed.

Both kernels take the matrices of every slot as one strided tensor [slots, out, in] and a table that says which slot
each row, or block of rows, meets. What one output gets is summed in an order that its matrix's shape alone decides:
neither what else a launch computes nor which slot a matrix lies in can change a bit, so launches may hold whatever is
there.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

FEW_OUT, FEW_IN = 16, 256
"""Outputs that one program of the few-row kernel makes, and columns that it reads at once."""

MANY_OUT, MANY_IN = 64, 64
"""The same of the many-row kernel."""


def block_rows(rows_per_expert: float) -> int:
    """Rows that one program of the many-row kernel takes, by how many an expert of the chunk has on average."""
    return 16 if rows_per_expert <= 16 else 32 if rows_per_expert <= 48 else 64


def _few_body(  # type: ignore[no-untyped-def]
    x, x_row, w, w_slot, w_out, w_in, bias, bias_slot, slots, y, n_out, n_in,
    BIASED: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    slot = tl.load(slots + pair).to(tl.int64)
    outs = tl.program_id(1) * OUT + tl.arange(0, OUT)
    own = outs < n_out
    sums = tl.zeros((OUT, IN), dtype=tl.float32)
    for first in range(0, n_in, IN):
        ins = first + tl.arange(0, IN)
        there = ins < n_in
        values = tl.load(x + pair * x_row + ins, mask=there, other=0.0).to(tl.float32)
        place = w + slot * w_slot + outs[:, None] * w_out + ins[None, :] * w_in
        weights = tl.load(place, mask=own[:, None] & there[None, :], other=0.0).to(tl.float32)
        sums += weights * values[None, :]
    result = tl.sum(sums, axis=1)
    if BIASED:
        result += tl.load(bias + slot * bias_slot + outs, mask=own, other=0.0).to(tl.float32)
    tl.store(y + pair * n_out + outs, result.to(y.dtype.element_ty), mask=own)


def _many_body(  # type: ignore[no-untyped-def]
    x, w, w_slot, w_out, w_in, bias, bias_slot, tiles, y, n_out, n_in,
    BIASED: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 4
    slot = tl.load(tile).to(tl.int64)
    source = tl.load(tile + 1).to(tl.int64)
    target = tl.load(tile + 2).to(tl.int64)
    rows = tl.arange(0, ROWS)
    real = rows < tl.load(tile + 3)
    outs = tl.program_id(1) * OUT + tl.arange(0, OUT)
    own = outs < n_out
    sums = tl.zeros((ROWS, OUT), dtype=tl.float32)
    for first in range(0, n_in, IN):
        ins = first + tl.arange(0, IN)
        there = ins < n_in
        place = x + (source + rows)[:, None] * n_in + ins[None, :]
        values = tl.load(place, mask=real[:, None] & there[None, :], other=0.0)
        place = w + slot * w_slot + outs[None, :] * w_out + ins[:, None] * w_in
        weights = tl.load(place, mask=own[None, :] & there[:, None], other=0.0)
        sums = tl.dot(values, weights, sums, input_precision="ieee")
    if BIASED:
        sums += tl.load(bias + slot * bias_slot + outs, mask=own, other=0.0).to(tl.float32)[None, :]
    place = y + (target + rows)[:, None] * n_out + outs[None, :]
    tl.store(place, sums.to(y.dtype.element_ty), mask=real[:, None] & own[None, :])


_few: Any = triton.jit(_few_body)
_many: Any = triton.jit(_many_body)


def few_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, slots: torch.Tensor, out: torch.Tensor
) -> None:
    """out[j] = weight[slots[j]] @ x[j] + bias[slots[j]], accumulated in float32.

    Args:
        x: [pairs, in], or [1, in]: the same row for all.
        weight: [all slots, out, in], in any strides.
        bias: [all slots, out], rows contiguous, or None.
        slots: [pairs], int32, on the device.
        out: [pairs, out], contiguous.
    """
    pairs, (n_out, n_in) = slots.shape[0], weight.shape[1:]
    grid = (pairs, triton.cdiv(n_out, FEW_OUT))
    given = weight if bias is None else bias
    step = x.stride(0) if x.shape[0] > 1 else 0
    # Triton launches on the current device, wherever the tensors lie.
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _few[grid](
            x, step, weight, *weight.stride(), given, given.stride(0), slots, out, n_out, n_in,
            BIASED=bias is not None, OUT=FEW_OUT, IN=FEW_IN,
        )  # fmt: skip


def many_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tiles: torch.Tensor,
    out: torch.Tensor,
    rows: int,
) -> None:
    """Blocks of rows times a slot's matrix each, accumulated in float32.

    Args:
        x: [*, in], contiguous.
        weight, bias: as in `few_rows`.
        tiles: [tiles, 4], int32, on the device: slot, first row of x, first row of out, rows (at most `rows`).
        out: [*, out], contiguous.
        rows: rows of a block (`block_rows`).
    """
    n_out, n_in = weight.shape[1:]
    grid = (tiles.shape[0], triton.cdiv(n_out, MANY_OUT))
    given = weight if bias is None else bias
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _many[grid](
            x, weight, *weight.stride(), given, given.stride(0), tiles, out, n_out, n_in,
            BIASED=bias is not None, ROWS=rows, OUT=MANY_OUT, IN=MANY_IN,
        )  # fmt: skip
