"""Linear layers of few rows, and norms, by the C kernels: attention projections, shared experts, the head.

torch's bfloat16 linear reads a matrix at half the memory's bandwidth where there is one row, takes 1.1 to 2 times
as long for 9 to 128 rows, and a norm is six of its operations (docs/log.md).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import nn

from emoe.kernels.choice import Kernel
from emoe.kernels.native.calls import ROWS, TYPES, Calls, Matrix, Shape
from emoe.kernels.norms import norm_forward, norm_of

DENSE_ROWS = 8
"""Rows up to which the C kernels read a matrix faster than torch."""

DENSE_MANY_ROWS = 128
"""Rows of bfloat16 up to which their products are faster, where there are such; beyond, torch computes."""


class DenseKernels:
    """The linear layers of a model that run few rows by the C kernels, until `remove`."""

    def __init__(self, model: nn.Module, kernel: Kernel) -> None:
        """Replace the forward of every plain `nn.Linear` on the CPU whose type the kernels know; others stay."""
        self._linears: list[nn.Linear] = []
        self._norms: list[nn.Module] = []
        if kernel.calls is None:
            return
        for module in model.modules():
            if type(module) is nn.Linear and "forward" not in module.__dict__ and _known(module):
                module.forward = _forward(module, kernel.calls)  # type: ignore[method-assign, assignment]
                self._linears.append(module)
            norm = None if "forward" in module.__dict__ else norm_of(module, kernel.calls)
            if norm is not None:
                module.forward = norm_forward(module, norm, kernel.calls)
                self._norms.append(module)

    def __len__(self) -> int:
        """How many linear layers there are."""
        return len(self._linears)

    @property
    def norms(self) -> int:
        """How many norms there are."""
        return len(self._norms)

    def remove(self) -> None:
        """Give the layers torch's forward back."""
        while self._linears:
            del self._linears.pop().forward
        while self._norms:
            del self._norms.pop().forward


def _known(linear: nn.Linear) -> bool:
    parts = [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
    return all(
        part.device.type == "cpu" and part.dtype in TYPES and part.dtype == parts[0].dtype and part.is_contiguous()
        for part in parts
    )


def _forward(linear: nn.Linear, calls: Calls) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward for `linear`, which does not hold it: a model must go when its last user lets go."""
    parameters, dtype = linear._parameters, linear.weight.dtype
    columns, rows = linear.in_features, linear.out_features
    few = DENSE_ROWS * columns
    most = DENSE_MANY_ROWS * columns if calls.knows_many and dtype is torch.bfloat16 else few
    held = [None if parameters[name] is None else _address(parameters[name]) for name in ("weight", "bias")]
    matrix, shape = Matrix(held[0], None, held[1]), Shape(columns, rows, ROWS, TYPES[dtype])
    matrices = (ctypes.addressof(matrix),)

    def forward(input: torch.Tensor) -> torch.Tensor:
        weight, bias = parameters["weight"], parameters["bias"]
        if (
            type(input) is not torch.Tensor
            or not 0 < input.numel() <= most
            or input.dtype is not dtype
            or input.shape[-1] != columns
            or _address(weight) != matrix.data  # moved, or changed to another type
            or (None if bias is None else _address(bias)) != matrix.bias
            or torch.compiler.is_compiling()
            or (torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad))  # type: ignore[union-attr]
            or torch.is_autocast_enabled("cpu")
        ):
            return nn.functional.linear(input, weight, bias)  # type: ignore[arg-type]
        out = input.new_empty(*input.shape[:-1], rows)
        if input.numel() <= few:
            calls.products(shape, matrices, input.contiguous(), out, shared=True)
        else:
            calls.many_products(shape, matrices[0], input.contiguous(), out)
        return out

    return forward


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
