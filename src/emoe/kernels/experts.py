"""How routed experts are computed. The kernel is chosen by shape alone, never by what is resident.

Few rows of an expert run in C where that can be had (`kernels/native`), at the speed of a plain sum over the same
bytes; more rows, and few where there is no compiler, are torch's: one `mm(out=)` per expert and projection, which was
as fast for one token as any implementation of transformers (`bench/expert_kernels.py`, docs/log.md). Over 256 tokens
grouped_mm is ahead (18.4 ms against 20.9; hidden 1024, 64 experts of 512, top-8, bf16), but it needs every expert at
once, which a budget does not give.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn

from emoe.kernels.choice import Kernel
from emoe.kernels.fetching import Fetch, at_once
from emoe.kernels.gates import gate_of
from emoe.kernels.native.experts import Bound, NativeExperts, bindable
from emoe.kernels.quantised import SCALE, QuantisedMatrix, Unpack, many_rows, matvec

COMBINE_TOKENS = 128
"""Tokens whose expert outputs are weighted and added at once: what is added stays in the processor's cache."""

WORKSPACE_KEPT_BYTES = 32 << 20
"""The largest workspace kept from one layer to the next: attention, which runs in between, needs memory too."""


class Workspace:
    """Memory that chunks are computed in, kept from layer to layer while it is small.

    Taken anew for every layer, rows of a few MiB come back from the operating system each time, and are zeroed page by
    page at their first use: a tenth of a prefill of 512 tokens (see docs/log.md).
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self._held: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def rows(self, name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return a [rows, columns] tensor of anything; it is overwritten when the same name is asked for again."""
        key = (name, dtype, device)
        held = self._held.get(key)
        if held is None or held.numel() < rows * columns:
            # Made in inference mode, it could not be written to outside it.
            with torch.inference_mode(False):
                self._held[key] = held = torch.empty(rows * columns, dtype=dtype, device=device)
        return held[: rows * columns].view(rows, columns)

    def trim(self) -> None:
        """Give the memory back if it is more than `WORKSPACE_KEPT_BYTES`."""
        if sum(held.nbytes for held in self._held.values()) > WORKSPACE_KEPT_BYTES:
            self._held.clear()


Matrix = torch.Tensor | QuantisedMatrix
"""One matrix of an expert, of shape (in, out)."""

Parts = tuple[Matrix, torch.Tensor | None, Matrix, torch.Tensor | None]

NATIVE_ROWS = 8
"""Rows of one expert up to which the C kernels run it, whose results do not depend on how many rows there are."""

QUANTISED_ROWS = 16
"""The same for quantised experts: beyond, a matrix is unpacked block by block and multiplied by torch."""

QUANTISED_FEW = 8
"""Rows up to which torch multiplies a quantised matrix in float32; beyond, it is unpacked to the rows' dtype first."""


class ExpertMath:
    """What one family's experts compute, read off its experts module, over weights that lie in slots."""

    def __init__(self, experts: nn.Module, kernel: Kernel | None = None) -> None:
        """Read the layout flags that transformers' `use_experts_implementation` sets on the module.

        `kernel` computes few tokens; None: torch does.
        """
        module = cast(Any, experts)
        self.gated: bool = module.has_gate
        self.biased: bool = module.has_bias
        self.transposed: bool = module.is_transposed
        self.activate = module._apply_gate if module.has_gate else module.act_fn
        # Only some versions of transformers know of a norm after the experts.
        self.post_norm = module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None
        self.first = "gate_up_proj" if module.has_gate else "up_proj"
        calls = None if kernel is None else kernel.calls
        self.native = None if calls is None else NativeExperts(calls, gate_of(experts))

    def bind(self, views: dict[str, torch.Tensor]) -> Weights:
        """Return one slot's weights as the kernels want them: [in, out] matrices and [out] biases.

        A matrix beside which a part "NAME_scale" lies is a quantised one.

        Raises:
            UnsupportedModelError: a quantised matrix is of a format that no kernel knows.
        """
        first, down = self._matrix(views, self.first), self._matrix(views, "down_proj")
        parts: Parts = (first, None, down, None)
        if self.biased:
            parts = (first, views[f"{self.first}_bias"], down, views["down_proj_bias"])
        return Weights(*parts, Bound(*parts) if self.native is not None and bindable(*parts) else None)

    def natively(self, weights: Weights, dtype: torch.dtype) -> NativeExperts | None:
        """The C kernels, if they can run an expert over few rows of `dtype`; where one can, all of its layer can."""
        return self.native if self.native is not None and self.native.takes(weights.native, dtype) else None

    def _matrix(self, views: dict[str, torch.Tensor], name: str) -> Matrix:
        scale = views.get(name + SCALE)
        if scale is not None:
            return QuantisedMatrix(views[name], scale)
        return views[name] if self.transposed else views[name].t()


class Weights:
    """One expert's weights: `first` [hidden, 2*intermediate or intermediate], `down` [intermediate, hidden]."""

    __slots__ = ("down", "down_bias", "first", "first_bias", "native")

    def __init__(
        self,
        first: Matrix,
        first_bias: torch.Tensor | None,
        down: Matrix,
        down_bias: torch.Tensor | None,
        native: Bound | None = None,
    ) -> None:
        self.first = first
        self.first_bias = first_bias
        self.down = down
        self.down_bias = down_bias
        self.native = native


def _project(
    x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, out: torch.Tensor, unpack: Unpack | None = None
) -> None:
    if isinstance(weight, QuantisedMatrix):
        if x.shape[0] <= QUANTISED_FEW:
            out.copy_(matvec(x, weight, bias))
        else:
            many_rows(x, weight, bias, out, unpack)
    elif bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias, x, weight, out=out)


def one_token(math: ExpertMath, hidden: torch.Tensor, weights: list[Weights], gates: torch.Tensor) -> torch.Tensor:
    """Run one token through its experts.

    Args:
        math: the family's arithmetic.
        hidden: [1, hidden].
        weights: its k experts, best first as the router gave them.
        gates: [1, k] router weights.

    Returns:
        [1, hidden], the weighted sum in the router's order.
    """
    native = math.natively(weights[0], hidden.dtype)
    if native is not None and native.whole and math.post_norm is None:
        return native.one_token(hidden, [cast(Bound, w.native) for w in weights], gates)
    return one_token_arriving(math, hidden, [(range(len(weights)), weights)], gates)


def one_token_arriving(
    math: ExpertMath, hidden: torch.Tensor, ready: Iterable[tuple[Sequence[int], list[Weights]]], gates: torch.Tensor
) -> torch.Tensor:
    """Run one token through its experts in whatever order they become ready, with the bits of `one_token`.

    What has arrived is computed before more is asked for: all of it where the C kernels know what stands between the
    projections, else the first projections (an elementwise function of one row may round otherwise than of several).

    Args:
        math: the family's arithmetic.
        hidden: [1, hidden].
        ready: (places among the router's k choices, their experts), every place once.
        gates: [1, k] router weights.

    Returns:
        [1, hidden], the weighted sum in the router's order.
    """
    k = gates.shape[1]
    outer = hidden.new_empty(k, hidden.shape[1])
    there: dict[int, Weights] = {}
    inner: torch.Tensor | None = None
    native = whole = None
    for places, weights in ready:
        there.update(zip(places, weights, strict=True))
        native = math.natively(weights[0], hidden.dtype)
        if native is not None and native.whole and math.post_norm is None:
            whole = native
            outer[list(places)] = native.rows(hidden, [cast(Bound, w.native) for w in weights])
            continue
        if inner is None:
            inner = hidden.new_empty(k, weights[0].first.shape[1])
        if native is not None:
            inner[list(places)] = native.first(hidden, [cast(Bound, w.native) for w in weights])
            continue
        for place, w in zip(places, weights, strict=True):
            _project(hidden, w.first, w.first_bias, inner[place : place + 1])
    if whole is not None:
        return whole.combine(outer, cast(Bound, there[0].native), gates)
    inner = math.activate(inner)
    if native is not None:
        native.down(inner, [cast(Bound, there[place].native) for place in range(k)], outer)
    else:
        for place in range(k):
            w = there[place]
            _project(inner[place : place + 1], w.down, w.down_bias, outer[place : place + 1])
    return finish_token(math, outer, gates, hidden.dtype)


def rows_of_token(math: ExpertMath, hidden: torch.Tensor, weights: list[Weights]) -> torch.Tensor:
    """[experts, hidden]: what each expert makes of one token [1, hidden], for `finish_token`."""
    native = math.natively(weights[0], hidden.dtype)
    bound = [cast(Bound, w.native) for w in weights]
    if native is not None and native.whole and math.post_norm is None:
        return native.rows(hidden, bound)
    outer = hidden.new_empty(len(weights), hidden.shape[1])
    if native is not None:
        native.down(math.activate(native.first(hidden, bound)), bound, outer)
        return outer
    inner = hidden.new_empty(len(weights), weights[0].first.shape[1])
    for j, w in enumerate(weights):
        _project(hidden, w.first, w.first_bias, inner[j : j + 1])
    inner = math.activate(inner)
    for j, w in enumerate(weights):
        _project(inner[j : j + 1], w.down, w.down_bias, outer[j : j + 1])
    return outer


def finish_token(
    math: ExpertMath, outer: torch.Tensor, gates: torch.Tensor, dtype: torch.dtype, like: Weights | None = None
) -> torch.Tensor:
    """Norm (where a family has one), weight and add the rows of one token, where the layer lies, as `one_token` does.

    `like`: weights of one of its experts, where not all experts of a layer are computed by slot number.
    """
    native = None if like is None else math.natively(like, dtype)
    if native is not None and native.whole and math.post_norm is None:
        return native.combine(outer, cast(Bound, cast(Weights, like).native), gates)
    return combine(outer if math.post_norm is None else math.post_norm(outer), gates, dtype)


def round_rows(n: int) -> int:
    """Return the number of rows that n tokens of one expert are computed with: 1..8, 10, 12, 14, 16, 20, 24, 28...

    oneDNN compiles and keeps a kernel for every number of rows it meets (0.4 to 0.75 MiB and about 1 ms each, see
    docs/log.md), so without rounding a process grows with every prompt of another length. Rows cost time in proportion
    beyond the first 36 or so, so four sizes to an octave (6 % more rows on average) and not two (12 %).
    """
    if n <= 8:
        return n
    step = 1 << ((n - 1).bit_length() - 3)
    return -(-n // step) * step


class Grouping:
    """A chunk's (token, choice) pairs as rows sorted by expert, each expert's rows a block.

    With `rounded`, blocks are padded to `round_rows` rows, which repeat the first token; nothing reads their results.

    Attributes:
        blocks: rows of each expert's block, in the order of the blocks (experts ascending).
        counts: tokens of each expert that has any.
        gather: [rows] the token that each row holds.
        place: [tokens * k] the row of each pair.
    """

    def __init__(self, ids: torch.Tensor, experts: int, *, rounded: bool = False, fetch: Fetch = at_once) -> None:
        """Group `ids` [tokens, k]. On a device `fetch` brings the counts: the one time that the program waits for it.

        (bincount waits twice by itself, for the least and the largest number.)
        """
        flat = ids.reshape(-1)
        self.top_k = ids.shape[1]
        self._rows_each = 0.0
        ordered, order = torch.sort(flat, stable=True)
        ends = torch.searchsorted(ordered, torch.arange(1, experts + 1, dtype=flat.dtype, device=ids.device))
        arriving = fetch(ends)
        row = torch.arange(flat.numel(), device=ids.device)
        token = order // self.top_k
        self.place = torch.empty_like(order)
        if not rounded:
            self.place[order] = row
            self.gather = token
        (at,) = arriving()
        stops: list[int] = at.tolist()
        every = [stop - start for start, stop in zip([0, *stops], stops, strict=False)]
        self.counts = {expert: n for expert, n in enumerate(every) if n}
        sizes = [round_rows(n) if rounded else n for n in every]
        self.blocks = {expert: sizes[expert] for expert in self.counts}
        if rounded:  # on a CPU
            padding = torch.tensor(sizes, device=ids.device) - torch.tensor(every, device=ids.device)
            row += (padding.cumsum(0) - padding)[ordered]
            self.place[order] = row
            self.gather = order.new_zeros(sum(sizes))
            self.gather[row] = token

    @property
    def rows(self) -> int:
        """Rows of all blocks."""
        return sum(self.blocks.values())

    @property
    def rows_each(self) -> float:
        """Rows of an expert of the whole chunk on average."""
        return self._rows_each or self.rows / len(self.counts)

    def part(self, start: int, experts: Sequence[int]) -> Grouping:
        """The rows of some neighbouring experts, the first of which begin at row `start`."""
        part = copy.copy(self)
        part.blocks = {expert: self.blocks[expert] for expert in experts}
        part.counts = {expert: self.counts[expert] for expert in experts}
        part.gather = self.gather[start : start + part.rows]
        part._rows_each = self.rows_each
        return part

    def at(self, gather: torch.Tensor) -> Grouping:
        """The same with its rows' tokens on another device."""
        part = copy.copy(self)
        part.gather = gather
        return part

    def by_count(self) -> list[int]:
        """Experts, most tokens first, ties by number."""
        return sorted(self.counts, key=lambda e: (-self.counts[e], e))


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
    shape = (grouping.gather.numel(), hidden.shape[1], hidden.dtype, hidden.device)
    rows = torch.index_select(hidden, 0, grouping.gather, out=workspace.rows("rows", *shape))
    outer = workspace.rows("outer", *shape)
    sizes = list(grouping.blocks.values())
    pairs = zip(torch.split(rows, sizes), torch.split(outer, sizes), strict=True)
    blocks = dict(zip(grouping.blocks, pairs, strict=True))
    for expert, w in ready:
        _one_expert(math, w, *blocks[expert], grouping.counts[expert])
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
    return combine(outer, gates, dtype, grouping.place, workspace)


def _one_expert(math: ExpertMath, w: Weights, x: torch.Tensor, out: torch.Tensor, count: int) -> None:
    """Run one expert over the `count` first rows of its block; what is in the others is read by nobody."""
    quantised = isinstance(w.first, QuantisedMatrix) and isinstance(w.down, QuantisedMatrix)
    native = math.natively(w, x.dtype)
    if native is not None and w.native is not None and count <= (QUANTISED_ROWS if quantised else NATIVE_ROWS):
        x, out = x[:count], out[:count]
        if native.whole:
            native.run(w.native, x, out)
        else:
            native.down(math.activate(native.first(x, [w.native])), [w.native], out)
        return
    unpack: list[Unpack | None] = [None, None]
    if native is not None and w.native is not None and quantised:
        unpack = [functools.partial(native.unpack, w.native, down) for down in (False, True)]
    inner = x.new_empty(x.shape[0], w.first.shape[1])
    _project(x, w.first, w.first_bias, inner, unpack[0])
    _project(math.activate(inner), w.down, w.down_bias, out, unpack[1])


def rounds_rows(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether chunks are computed with rounded rows: where matrix products go through oneDNN."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)


def combine(
    outer: torch.Tensor,
    gates: torch.Tensor,
    dtype: torch.dtype,
    place: torch.Tensor | None = None,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """Weight expert outputs [rows, hidden] by [tokens, k] gates and add each token's in the router's order.

    `place` [tokens * k] says in which row each (token, choice) pair lies; None: in that order.
    """
    tokens, k = gates.shape
    workspace = workspace or Workspace()
    result = outer.new_empty(tokens, outer.shape[1], dtype=dtype)
    weighted_dtype = torch.promote_types(outer.dtype, gates.dtype)
    for start in range(0, tokens, COMBINE_TOKENS):
        end = min(start + COMBINE_TOKENS, tokens)
        shape = ((end - start) * k, outer.shape[1])
        pairs = outer[start * k : end * k]
        if place is not None:
            pairs = workspace.rows("pairs", *shape, outer.dtype, outer.device)
            torch.index_select(outer, 0, place[start * k : end * k], out=pairs)
        weighted = workspace.rows("weighted", *shape, weighted_dtype, outer.device)
        torch.mul(pairs, gates[start:end].reshape(-1, 1), out=weighted)
        result[start:end] = weighted.view(end - start, k, -1).sum(dim=1)
    return result
