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

MASKS = {torch.bool: 1, torch.float32: 2, torch.bfloat16: 3}
"""What a mask of attention may be; 0: there is none."""

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


class Attention(ctypes.Structure):
    """Sizes of queries, keys and values, their strides and a mask's in values, and types."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "key_heads", "group", "rows", "keys", "size", "value_size")),
        *((f"{of}_{part}", ctypes.c_int64) for of in "qkvm" for part in ("batch", "head", "row")),
        ("type", ctypes.c_int32),
        ("mask_type", ctypes.c_int32),
        ("scaling", ctypes.c_float),
        ("causal", ctypes.c_int32),
    )


class Calls:
    """The functions of one compiled library.

    Tensors must be contiguous, on the CPU, and of one type: nothing is checked here.

    Attributes:
        knows_many: whether many rows of bfloat16 have kernels: where the processor multiplies it in pairs, and has no
            tiles (AMX), with which oneDNN is faster.
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
            self._unpack, self._attention, self._norm = library.emoe_unpack, library.emoe_attention, library.emoe_norm
            self._rows, self._rest, self._combine = library.emoe_rows, library.emoe_rest, library.emoe_combine
            self._many_attention = library.emoe_many_attention
            self._many, self._many_products = library.emoe_many, library.emoe_many_products
            self.knows_many = bool(library.emoe_knows_many())
        except (OSError, AttributeError) as error:
            raise BuildError(f"{path} cannot be loaded: {error}") from error
        pointer, number = ctypes.c_void_p, ctypes.c_int
        self._one_token.argtypes = [pointer, number, pointer, pointer, pointer, number, pointer, number]
        self._rows.argtypes = self._rest.argtypes = [pointer, number, pointer, pointer, pointer, number]
        self._combine.argtypes = [number, *[ctypes.c_long] * 2, number, *[pointer] * 3, number, pointer, number]
        self._combine.restype = None
        self._experts.argtypes = [pointer, number, pointer, pointer, pointer, pointer, number]
        self._products.argtypes = [pointer, number, pointer, number, number, pointer, pointer, number]
        self._norm.argtypes = [number, number, *[ctypes.c_long] * 2, ctypes.c_float, *[pointer] * 3, number]
        self._norm.restype = None
        self._attention.argtypes = self._many_attention.argtypes = [pointer] * 7 + [number]
        self._many.argtypes = [pointer, pointer, ctypes.c_long, pointer, pointer, pointer, number]
        self._many_products.argtypes = [pointer, pointer, ctypes.c_long, pointer, pointer, number]
        self._unpack.argtypes = [pointer, pointer, ctypes.c_long, ctypes.c_long, pointer, number]
        self._unpack.restype = None

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

    def rows(self, layer: Layer, experts: Sequence[int], hidden: torch.Tensor, out: torch.Tensor) -> None:
        """Write what each expert (addresses of `Expert`) makes of `hidden` [1, hidden] to `out` [experts, hidden]."""
        k = len(experts)
        pointers = (ctypes.c_void_p * k)(*experts)
        threads = torch.get_num_threads()
        _done(self._rows(ctypes.addressof(layer), k, pointers, hidden.data_ptr(), out.data_ptr(), threads))

    def rest(self, layer: Layer, experts: Sequence[int], inner: torch.Tensor, out: torch.Tensor) -> None:
        """Write what `rows` writes from the experts' first projections `inner` [experts, rows of `first`]."""
        k = len(experts)
        pointers = (ctypes.c_void_p * k)(*experts)
        threads = torch.get_num_threads()
        _done(self._rest(ctypes.addressof(layer), k, pointers, inner.data_ptr(), out.data_ptr(), threads))

    def combine(
        self, rows: torch.Tensor, gates: torch.Tensor, out: torch.Tensor, place: torch.Tensor | None = None
    ) -> None:
        """Write the weighted sum of each token's rows to `out` [tokens, hidden]; `gates` [tokens, k].

        `place` int64 [tokens * k] says which rows they are; None: one token's after another.
        """
        (tokens, k), hidden = gates.shape, rows.shape[1]
        at = None if place is None else place.data_ptr()
        sizes, threads = (TYPES[rows.dtype], hidden, tokens, k), torch.get_num_threads()
        self._combine(*sizes, rows.data_ptr(), at, gates.data_ptr(), TYPES[gates.dtype], out.data_ptr(), threads)

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

    def many(self, layer: Layer, expert: int, x: torch.Tensor, index: torch.Tensor, out: torch.Tensor) -> None:
        """Run an expert (the address of an `Expert`) of plain bfloat16 over the rows `index` (int64) of `x`, many of
        them, where `knows_many`."""
        address, threads = ctypes.addressof(layer), torch.get_num_threads()
        addresses = (x.data_ptr(), index.data_ptr(), out.data_ptr())
        _done(self._many(address, expert, index.numel(), *addresses, threads))

    def many_products(self, shape: Shape, matrix: int, x: torch.Tensor, out: torch.Tensor) -> None:
        """Multiply many rows of bfloat16 `x` with a matrix (its address), where `knows_many`."""
        rows, threads = x.numel() // shape.columns, torch.get_num_threads()
        address = ctypes.addressof(shape)
        _done(self._many_products(address, matrix, rows, x.data_ptr(), out.data_ptr(), threads))

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        sinks: torch.Tensor | None,
        scaling: float,
        out: torch.Tensor,
        *,
        many: bool = False,
        causal: bool = False,
    ) -> None:
        """Write the attention of `query` [batch, heads, rows, size] to `out` [batch, rows, heads, value size].

        Any strides but the last, which is 1. `mask` has four dimensions, each as long as it is or 1; `sinks` are
        float32, one for each head. `many` rows need `knows_many`; only they can be `causal`, without a mask.
        """
        batch, heads, rows, size = query.shape
        key_heads, keys = key.shape[1], key.shape[2]
        m: tuple[int, ...] = (0, 0, 0)
        if mask is not None:
            m = tuple(0 if n == 1 else step for n, step in zip(mask.shape[:3], mask.stride(), strict=False))
        shape = Attention(
            *(batch, key_heads, heads // key_heads, rows, keys, size, value.shape[3]),
            *(*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *m),
            *(TYPES[query.dtype], 0 if mask is None else MASKS[mask.dtype], scaling, causal),
        )
        _done(
            (self._many_attention if many else self._attention)(
                ctypes.addressof(shape),
                *(query.data_ptr(), key.data_ptr(), value.data_ptr()),
                *(None if mask is None else mask.data_ptr(), None if sinks is None else sinks.data_ptr()),
                *(out.data_ptr(), torch.get_num_threads()),
            )
        )

    def norm(self, form: int, epsilon: float, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """Write the norm of each row of `x` [..., size], times `weight`, to `out`; `form` as in native/norm.h."""
        size = weight.numel()
        rows = x.numel() // size
        threads = torch.get_num_threads()
        addresses = (x.data_ptr(), weight.data_ptr(), out.data_ptr())
        self._norm(TYPES[x.dtype], form, rows, size, epsilon, *addresses, threads)

    def unpack(self, shape: Shape, matrix: int, out: torch.Tensor, first: int = 0) -> None:
        """Write rows of a quantised matrix (the address of a `Matrix`), from `first`, as plain ones to `out`."""
        rows, threads = out.shape[0], torch.get_num_threads()
        self._unpack(ctypes.addressof(shape), matrix, first, rows, out.data_ptr(), threads)

    def thread_counts(self) -> dict[int, int]:
        """How many calls were made with each number of threads (a power of two, or what torch is set to)."""
        counts = (ctypes.c_int64 * CHOICES)()
        self._counts(counts)
        return {1 << i: n for i, n in enumerate(counts) if n}


def _done(failed: int) -> None:
    if failed:
        raise MemoryError("the kernels could not allocate their few hundred KiB of working memory.")
