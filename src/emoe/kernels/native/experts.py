"""Experts of few tokens by the C kernels: slots bound once as pointers, then a call or two for a layer."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from emoe.kernels.gates import Gate
from emoe.kernels.native.calls import COLUMNS, INT4, INT8, ROWS, TYPES, Calls, Expert, Layer, Matrix, Shape
from emoe.kernels.quantised import QuantisedMatrix

PLAIN = (ROWS, COLUMNS)
"""Formats of matrices that are not quantised."""


class Bound:
    """One expert's matrices as the C kernels want them: pointers into a slot, which never moves.

    Attributes:
        expert: the address of the pointers.
        first, down: (columns, rows, format) of the two matrices, rows being outputs.
        dtype: of the plain weights and the biases; None where both are quantised and there are none.
    """

    __slots__ = ("_pointers", "down", "down_matrix", "dtype", "expert", "first", "first_matrix")

    def __init__(
        self,
        first: torch.Tensor | QuantisedMatrix,
        first_bias: torch.Tensor | None,
        down: torch.Tensor | QuantisedMatrix,
        down_bias: torch.Tensor | None,
    ) -> None:
        """Bind [in, out] matrices, as `Weights` has them."""
        self._pointers = Expert(_matrix(first, first_bias), _matrix(down, down_bias))
        self.expert = ctypes.addressof(self._pointers)
        self.first_matrix = self.expert + Expert.first.offset
        self.down_matrix = self.expert + Expert.down.offset
        self.first, self.down = _layout(first), _layout(down)
        dtypes = {part.dtype for part in (first, first_bias, down, down_bias) if isinstance(part, torch.Tensor)}
        self.dtype = dtypes.pop() if dtypes else None


def bindable(*parts: torch.Tensor | QuantisedMatrix | None) -> bool:
    """Whether the C kernels can take such an expert: on the CPU, whole, and of types they know."""
    plain = [part for part in parts if isinstance(part, torch.Tensor)]
    stored = [*plain, *(tensor for part in parts if isinstance(part, QuantisedMatrix) for tensor in part.parts)]
    return (
        all(tensor.device.type == "cpu" and (tensor.is_contiguous() or tensor.t().is_contiguous()) for tensor in stored)
        and len({tensor.dtype for tensor in plain}) <= 1
        and all(tensor.dtype in TYPES for tensor in plain)
    )


class NativeExperts:
    """What the experts of one layer compute, by the C kernels."""

    def __init__(self, calls: Calls, gate: Gate | None) -> None:
        """With `gate` None only the products are theirs."""
        self._calls = calls
        self._gate = gate
        self._layers: dict[torch.dtype, Layer] = {}

    @property
    def whole(self) -> bool:
        """Whether a layer is one call, with what stands between the projections in it."""
        return self._gate is not None

    def takes(self, bound: Bound | None, dtype: torch.dtype) -> bool:
        """Whether an expert can be run over activations of `dtype`."""
        return bound is not None and dtype in TYPES and bound.dtype in (dtype, None)

    def one_token(self, hidden: torch.Tensor, experts: Sequence[Bound], gates: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum [1, hidden] of the experts of one token."""
        if gates.dtype not in TYPES:
            gates = gates.float()
        out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        layer = self._layer(experts[0], hidden.dtype)
        addresses = [bound.expert for bound in experts]
        self._calls.one_token(layer, addresses, hidden.contiguous(), gates.contiguous(), out)
        return out

    def rows(self, hidden: torch.Tensor, experts: Sequence[Bound]) -> torch.Tensor:
        """Return what each of the experts of one token gives: [experts, hidden], to be given to `combine`."""
        out = hidden.new_empty(len(experts), hidden.shape[1])
        self._calls.rows(
            self._layer(experts[0], hidden.dtype), [bound.expert for bound in experts], hidden.contiguous(), out
        )
        return out

    def rest(self, inner: torch.Tensor, experts: Sequence[Bound]) -> torch.Tensor:
        """Return what `rows` does, from `inner`, what `first` returned for one token: [experts, hidden]."""
        layer = self._layer(experts[0], inner.dtype)
        out = inner.new_empty(len(experts), layer.down.rows)
        self._calls.rest(layer, [bound.expert for bound in experts], inner, out)
        return out

    def combine(self, rows: torch.Tensor, gates: torch.Tensor, place: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weighted sums [tokens, hidden] of tokens' rows, as `one_token` adds them; `gates` [tokens, k].

        `place` int64 [tokens * k] says which rows they are; None: one token's after another.
        """
        if gates.dtype not in TYPES:
            gates = gates.float()
        out = rows.new_empty(gates.shape[0], rows.shape[1])
        self._calls.combine(rows.contiguous(), gates.contiguous(), out, None if place is None else place.contiguous())
        return out

    def run(self, bound: Bound, x: torch.Tensor, out: torch.Tensor) -> None:
        """Run one expert over rows `x` into the rows `out`, both contiguous."""
        self._calls.experts(self._layer(bound, x.dtype), (bound.expert,), (x.shape[0],), x, out)

    def runs_many(self, bound: Bound, dtype: torch.dtype) -> bool:
        """Whether `many` takes an expert over rows of `dtype`."""
        plain = bound.first[2] in PLAIN and bound.down[2] in PLAIN
        return self.whole and self.multiplies_many(dtype) and plain and bound.dtype is dtype

    def multiplies_many(self, dtype: torch.dtype) -> bool:
        """Whether `multiply` takes rows of `dtype`."""
        return self._calls.knows_many and dtype is torch.bfloat16

    def many(self, bound: Bound, x: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
        """Run one expert over the rows `index` (int64) of `x` into the rows `out`, all contiguous."""
        self._calls.many(self._layer(bound, x.dtype), bound.expert, x, index, out)

    def multiply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        """Write many rows `x` times a plain matrix [in, out], plus `bias`, to the rows `out`."""
        matrix = _matrix(weight, bias)
        self._calls.many_products(
            Shape(*_layout(weight), TYPES[x.dtype]), ctypes.addressof(matrix), x.contiguous(), out
        )

    def first(self, x: torch.Tensor, experts: Sequence[Bound]) -> torch.Tensor:
        """Return the first projections of all rows by each of `experts`: [experts * rows, out]."""
        layer = self._layer(experts[0], x.dtype)
        out = x.new_empty(len(experts) * x.shape[0], layer.first.rows)
        matrices = [bound.first_matrix for bound in experts]
        self._calls.products(layer.first, matrices, x.contiguous(), out, shared=True)
        return out

    def down(self, x: torch.Tensor, experts: Sequence[Bound], out: torch.Tensor) -> None:
        """Write the second projections, each expert's of its own rows, to `out` [rows, hidden]."""
        layer = self._layer(experts[0], x.dtype)
        self._calls.products(layer.down, [bound.down_matrix for bound in experts], x.contiguous(), out)

    def unpack(self, bound: Bound, down: bool, rows: slice, out: torch.Tensor) -> None:
        """Write some rows of one of an expert's quantised matrices as plain values to `out` [rows, in]."""
        layer = self._layer(bound, out.dtype)
        shape, matrix = (layer.down, bound.down_matrix) if down else (layer.first, bound.first_matrix)
        self._calls.unpack(shape, matrix, out, rows.start)

    def _layer(self, bound: Bound, dtype: torch.dtype) -> Layer:
        layer = self._layers.get(dtype)
        if layer is None:
            shapes = [Shape(*sizes, TYPES[dtype]) for sizes in (bound.first, bound.down)]
            layer = self._layers[dtype] = Layer(*shapes, *(self._gate or (0, 0.0, 0.0)))
        return layer


def _layout(matrix: torch.Tensor | QuantisedMatrix) -> tuple[int, int, int]:
    if isinstance(matrix, QuantisedMatrix):
        return (*matrix.shape, INT8 if matrix.bits == 8 else INT4)
    return (*matrix.shape, COLUMNS if matrix.is_contiguous() else ROWS)


def _matrix(matrix: torch.Tensor | QuantisedMatrix, bias: torch.Tensor | None) -> Matrix:
    offset = None if bias is None else bias.data_ptr()
    if isinstance(matrix, QuantisedMatrix):
        packed, scale = matrix.parts
        return Matrix(packed.data_ptr(), scale.data_ptr(), offset)
    return Matrix(matrix.data_ptr(), None, offset)
