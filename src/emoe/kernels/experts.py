"""How routed experts are computed. The kernel is chosen by shape alone, never by what is resident.

Few rows of an expert run in C where that can be had (`kernels/native`), at the speed of a plain sum over the same
bytes, and many rows of bfloat16 on processors that multiply it in pairs (`native/many.h`); others are torch's: one
`mm(out=)` per expert and projection (`bench/expert_kernels.py`, docs/log.md). grouped_mm needs every expert at once,
which a budget does not give.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn

from emoe.kernels.choice import Kernel
from emoe.kernels.combining import combine
from emoe.kernels.gates import gate_of
from emoe.kernels.native.experts import Bound, NativeExperts, bindable
from emoe.kernels.quantised import SCALE, QuantisedMatrix, Unpack, many_rows, matvec

Matrix = torch.Tensor | QuantisedMatrix
"""One matrix of an expert, of shape (in, out)."""

Parts = tuple[Matrix, torch.Tensor | None, Matrix, torch.Tensor | None]

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

    def all_natively(self, weights: Weights, dtype: torch.dtype) -> bool:
        """Whether the C kernels run such experts over any number of rows of `dtype`, without torch."""
        native = self.natively(weights, dtype)
        return native is not None and weights.native is not None and native.runs_many(weights.native, dtype)

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


class FirstOnly(list[Weights]):
    """Weights of which only the first projections are there yet."""


def project(
    x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, out: torch.Tensor, unpack: Unpack | None = None
) -> None:
    """Write x [rows, in] times `weight` [in, out] plus `bias` to `out` by torch; `unpack`: of a quantised one."""
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
        ready: (places among the router's k choices, their experts), every place once; before that, where they are
            told by `FirstOnly`, those whose first projections can be computed already.
        gates: [1, k] router weights.

    Returns:
        [1, hidden], the weighted sum in the router's order.
    """
    k = gates.shape[1]
    outer = hidden.new_empty(k, hidden.shape[1])
    there: dict[int, Weights] = {}
    begun: tuple[Sequence[int], torch.Tensor | None] = ((), None)
    inner: torch.Tensor | None = None
    native = whole = None
    for places, weights in ready:
        there.update(zip(places, weights, strict=True))
        native = math.natively(weights[0], hidden.dtype)
        early, done = isinstance(weights, FirstOnly), places == begun[0]
        if native is not None and native.whole and math.post_norm is None:
            whole, bound = native, [cast(Bound, w.native) for w in weights]
            if early:
                begun = places, native.first(hidden, bound)
            elif done and begun[1] is not None:
                outer[list(places)] = native.rest(begun[1], bound)
            else:
                outer[list(places)] = native.rows(hidden, bound)
            continue
        if done:
            continue
        if early:
            begun = places, None
        if inner is None:
            inner = hidden.new_empty(k, weights[0].first.shape[1])
        if native is not None:
            inner[list(places)] = native.first(hidden, [cast(Bound, w.native) for w in weights])
            continue
        for place, w in zip(places, weights, strict=True):
            project(hidden, w.first, w.first_bias, inner[place : place + 1])
    if whole is not None:
        return whole.combine(outer, gates)
    inner = math.activate(inner)
    if native is not None:
        native.down(inner, [cast(Bound, there[place].native) for place in range(k)], outer)
    else:
        for place in range(k):
            w = there[place]
            project(inner[place : place + 1], w.down, w.down_bias, outer[place : place + 1])
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
        project(hidden, w.first, w.first_bias, inner[j : j + 1])
    inner = math.activate(inner)
    for j, w in enumerate(weights):
        project(inner[j : j + 1], w.down, w.down_bias, outer[j : j + 1])
    return outer


def finish_token(
    math: ExpertMath, outer: torch.Tensor, gates: torch.Tensor, dtype: torch.dtype, like: Weights | None = None
) -> torch.Tensor:
    """Norm (where a family has one), weight and add the rows of one token, where the layer lies, as `one_token` does.

    `like`: weights of one of its experts, where not all experts of a layer are computed by slot number.
    """
    native = None if like is None else math.natively(like, dtype)
    if native is not None and native.whole and math.post_norm is None:
        return native.combine(outer, gates)
    return combine(outer if math.post_norm is None else math.post_norm(outer), gates, dtype)
