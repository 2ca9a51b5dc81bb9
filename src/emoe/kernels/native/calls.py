"""The C functions of emoe.c, called by ctypes, which releases the GIL meanwhile."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch

from emoe.kernels.native.build import BuildError

ROWS, COLUMNS, INT8, INT4 = range(4)
"""Formats of a matrix: [out, in], [in, out], and the quantised ones of `emoe.kernels.quantised`, rows being outputs."""

TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""What activations may be."""

CHOICES = 7
"""Numbers of threads that are counted: 1, 2, 4, ... 64."""


class Matrix(ctypes.Structure):
    """Where one matrix lies, its scales and its bias (or None)."""

    _fields_ = (("data", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("bias", ctypes.c_void_p))


class Shape(ctypes.Structure):
    """A matrix's sizes and format, and the type of what it is multiplied with."""

    _fields_ = (
        ("columns", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("format", ctypes.c_int32),
        ("type", ctypes.c_int32),
    )


class Expert(ctypes.Structure):
    """One expert's two matrices."""

    _fields_ = (("first", Matrix), ("down", Matrix))


class Layer(ctypes.Structure):
    """What the experts of a layer have in common."""

    _fields_ = (
        ("first", Shape),
        ("down", Shape),
        ("gate", ctypes.c_int32),
        ("alpha", ctypes.c_float),
        ("limit", ctypes.c_float),
    )


class Calls:
    """The functions of one compiled library.

    Tensors must be contiguous, on the CPU, and of one type: nothing is checked here.
    """

    def __init__(self, path: Path) -> None:
        """Load it.

        Raises:
            BuildError: it cannot be loaded.
        """
        try:
            library = ctypes.CDLL(str(path))
            self._one_token, self._experts = library.emoe_one_token, library.emoe_experts
            self._products, self._counts = library.emoe_products, library.emoe_thread_counts
            self._unpack = library.emoe_unpack
        except (OSError, AttributeError) as error:
            raise BuildError(f"{path} cannot be loaded: {error}") from error
        pointer, number = ctypes.c_void_p, ctypes.c_int
        self._one_token.argtypes = [pointer, number, pointer, pointer, pointer, number, pointer, number]
        self._experts.argtypes = [pointer, number, pointer, pointer, pointer, pointer, number]
        self._products.argtypes = [pointer, number, pointer, number, number, pointer, pointer, number]
        self._unpack.argtypes, self._unpack.restype = [pointer, pointer, pointer, number], None

    def one_token(
        self, layer: Layer, experts: Sequence[int], hidden: torch.Tensor, gates: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Write the weighted sum of the experts (addresses of `Expert`) of `hidden` [1, hidden] to `out`."""
        k = len(experts)
        _done(
            self._one_token(
                ctypes.addressof(layer),
                k,
                (ctypes.c_void_p * k)(*experts),
                hidden.data_ptr(),
                gates.data_ptr(),
                TYPES[gates.dtype],
                out.data_ptr(),
                torch.get_num_threads(),
            )
        )

    def experts(
        self, layer: Layer, experts: Sequence[int], counts: Sequence[int], x: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Run experts (addresses of `Expert`) over `counts` rows of `x` each, one after another."""
        n = len(experts)
        pointers, numbers = (ctypes.c_void_p * n)(*experts), (ctypes.c_int32 * n)(*counts)
        threads = torch.get_num_threads()
        _done(self._experts(ctypes.addressof(layer), n, pointers, numbers, x.data_ptr(), out.data_ptr(), threads))

    def products(
        self, shape: Shape, matrices: Sequence[int], x: torch.Tensor, out: torch.Tensor, *, shared: bool = False
    ) -> None:
        """Multiply equally many rows of `x` with each matrix (addresses of `Matrix`), or all of them with each."""
        n = len(matrices)
        rows = x.numel() // shape.columns // (1 if shared else n)
        pointers = (ctypes.c_void_p * n)(*matrices)
        threads = torch.get_num_threads()
        _done(self._products(ctypes.addressof(shape), n, pointers, rows, shared, x.data_ptr(), out.data_ptr(), threads))

    def unpack(self, shape: Shape, matrix: int, out: torch.Tensor) -> None:
        """Write a quantised matrix (the address of a `Matrix`) as a plain one to `out` [rows, columns]."""
        self._unpack(ctypes.addressof(shape), matrix, out.data_ptr(), torch.get_num_threads())

    def thread_counts(self) -> dict[int, int]:
        """How many calls were made with each number of threads (a power of two, or what torch is set to)."""
        counts = (ctypes.c_int64 * CHOICES)()
        self._counts(counts)
        return {1 << i: n for i, n in enumerate(counts) if n}


def _done(failed: int) -> None:
    if failed:
        raise MemoryError("the kernels could not allocate their few hundred KiB of working memory.")
