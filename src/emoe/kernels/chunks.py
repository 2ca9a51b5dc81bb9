"""Many tokens through their experts, one expert after another, in whatever order these become ready."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import cast

import torch

from emoe.kernels.combining import Workspace, combine
from emoe.kernels.experts import ExpertMath, Weights, project
from emoe.kernels.fetching import Fetch, at_once
from emoe.kernels.grouping import Grouping, rounds_rows
from emoe.kernels.native.calls import TYPES
from emoe.kernels.quantised import QuantisedMatrix, Unpack, many_rows

NATIVE_ROWS = 8
"""Rows of one expert up to which the C kernels run it, whose results do not depend on how many rows there are."""

QUANTISED_ROWS = 16
"""The same for quantised experts: beyond, a matrix is unpacked block by block."""

UNPACKED_ROWS = 64
"""Rows up to which the C kernels multiply such blocks; beyond, torch is faster: C prepares the rows for each anew."""


def grouped(
    math: ExpertMath, like: Weights, dtype: torch.dtype, ids: torch.Tensor, experts: int, fetch: Fetch = at_once
) -> Grouping:
    """Group a chunk's `ids` [tokens, k] for `many_tokens` over activations of `dtype`; `like`: any of the experts.

    Rows are rounded only for torch: the C kernels take any number of them, and a row's bits are its own.
    """
    rounded = rounds_rows(ids.device, dtype) and not math.all_natively(like, dtype)
    return Grouping(ids, experts, rounded=rounded, fetch=fetch)


def many_tokens(
    math: ExpertMath,
    hidden: torch.Tensor,
    grouping: Grouping,
    ready: Iterable[tuple[int, Weights]],
    gates: torch.Tensor,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """Run a chunk of tokens, expert by expert, in whatever order the experts become ready.

    Every (token, choice) pair has its own row of the output, and rows are added in the router's order at the end, so
    the order of computing cannot change a bit.

    Args:
        math: the family's arithmetic.
        hidden: [tokens, hidden].
        grouping: the chunk's pairs by expert.
        ready: (expert, weights) of every expert of the grouping, once.
        gates: [tokens, k] router weights.
        workspace: where to compute; None takes memory of its own.

    Returns:
        [tokens, hidden].
    """
    if not grouping.counts:
        return torch.zeros_like(hidden)
    workspace = workspace or Workspace()
    outer = rows_of_chunk(math, hidden, grouping, ready, workspace)
    return finish_chunk(math, outer, grouping, gates, hidden.dtype, workspace)


def rows_of_chunk(
    math: ExpertMath,
    hidden: torch.Tensor,
    grouping: Grouping,
    ready: Iterable[tuple[int, Weights]],
    workspace: Workspace,
) -> torch.Tensor:
    """[rows of the grouping, hidden]: what experts make of their tokens, before any norm and weighting."""
    hidden = hidden.contiguous()
    outer = workspace.rows("outer", grouping.gather.numel(), hidden.shape[1], hidden.dtype, hidden.device)
    sizes = list(grouping.blocks.values())
    pairs = zip(torch.split(grouping.gather, sizes), torch.split(outer, sizes), strict=True)
    blocks = dict(zip(grouping.blocks, pairs, strict=True))
    for expert, w in ready:
        index, out = blocks[expert]
        count = grouping.counts[expert]
        native = math.natively(w, hidden.dtype)
        if (
            native is not None
            and w.native is not None
            and count > NATIVE_ROWS
            and native.runs_many(w.native, hidden.dtype)
        ):
            native.many(w.native, hidden, index[:count], out[:count])
        else:
            rows = workspace.rows("rows", index.numel(), hidden.shape[1], hidden.dtype, hidden.device)
            _one_expert(math, w, torch.index_select(hidden, 0, index, out=rows), out, count)
    return outer


def finish_chunk(
    math: ExpertMath,
    outer: torch.Tensor,
    grouping: Grouping,
    gates: torch.Tensor,
    dtype: torch.dtype,
    workspace: Workspace,
) -> torch.Tensor:
    """[tokens, hidden]: norm (where a family has one), weight and add the rows of a chunk."""
    if math.post_norm is not None:
        outer = math.post_norm(outer)
    if math.native is not None and outer.device.type == "cpu" and outer.dtype is dtype and dtype in TYPES:
        return math.native.combine(outer, gates, grouping.place)
    return combine(outer, gates, dtype, grouping.place, workspace)


def _one_expert(math: ExpertMath, w: Weights, x: torch.Tensor, out: torch.Tensor, count: int) -> None:
    """Run one expert over the `count` first rows of its block; what is in the others is read by nobody."""
    native, bound = math.natively(w, x.dtype), w.native
    quantised = isinstance(w.first, QuantisedMatrix) and isinstance(w.down, QuantisedMatrix)
    if native is not None and bound is not None and count <= (QUANTISED_ROWS if quantised else NATIVE_ROWS):
        x, out = x[:count], out[:count]
        if native.whole:
            native.run(bound, x, out)
        else:
            native.down(math.activate(native.first(x, [bound])), [bound], out)
        return
    inner = x.new_empty(x.shape[0], w.first.shape[1])
    plain = isinstance(w.first, torch.Tensor) and isinstance(w.down, torch.Tensor)
    if native is not None and plain and native.multiplies_many(x.dtype):
        native.multiply(x[:count], cast(torch.Tensor, w.first), w.first_bias, inner[:count])
        native.multiply(math.activate(inner[:count]), cast(torch.Tensor, w.down), w.down_bias, out[:count])
        return
    unpack: list[Unpack | None] = [None, None]
    if native is not None and bound is not None and quantised:
        unpack = [functools.partial(native.unpack, bound, down) for down in (False, True)]
        if native.multiplies_many(x.dtype) and count <= UNPACKED_ROWS:
            first, last = cast(QuantisedMatrix, w.first), cast(QuantisedMatrix, w.down)
            many_rows(x[:count], first, w.first_bias, inner[:count], unpack[0], native.multiply)
            many_rows(math.activate(inner[:count]), last, w.down_bias, out[:count], unpack[1], native.multiply)
            return
    project(x, w.first, w.first_bias, inner, unpack[0])
    project(math.activate(inner), w.down, w.down_bias, out, unpack[1])
