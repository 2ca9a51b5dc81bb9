"""Matrices of small integers with scales, as experts of `--expert-dtype int8` and `int4` have them in their slots.

The format, for each matrix part NAME of an expert. Rows are outputs, whatever layout the family's checkpoint has:

    int8   NAME int8 [out, in]         NAME_scale float32 [out]            value = integer * scale of its row
    int4   NAME uint8 [out, in / 2]    NAME_scale float16 [out, in / 32]   value = (nibble - 8) * scale of its group

The low nibble of a byte is the even column. A product is (integers * scales) @ x, accumulated in float32 over x in
bfloat16 or float32, and rounded once to x's dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from emoe.checkpoint.codecs.arithmetic import decode_int4, decode_int8
from emoe.checkpoint.codecs.formats import GROUP, SCALE
from emoe.errors import UnsupportedModelError

__all__ = ["GROUP", "SCALE", "QuantisedMatrix", "many_rows", "matvec"]

UNPACKED = 1 << 17
"""Numbers unpacked at once on a CPU: 512 KiB of float32.

A matrix of 1536 x 2048 as int4 takes 2.5 ms, and 3.0 to 5.3 in one go (docs/log.md).
"""

MULTIPLIED = 1 << 20
"""Numbers unpacked to the rows' dtype at once on a CPU, for many rows: 2 MiB of bfloat16, near the cores' caches."""

Unpack = Callable[[slice, torch.Tensor], None]
"""Called with (rows of the matrix, where their values go: [rows, in])."""

Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor], None]
"""Called with (x [rows, in], a plain matrix [in, out], its bias or None, where x times it goes: [rows, out], whole)."""


class QuantisedMatrix:
    """One matrix in one of the formats above, a view of a slot. It never moves.

    Attributes:
        packed, scale: the parts.
        bits: 8 or 4.
        shape: (in, out), as the kernels of plain weights see theirs.
    """

    __slots__ = ("bits", "packed", "scale", "shape")

    def __init__(self, packed: torch.Tensor, scale: torch.Tensor) -> None:
        """Bind to the two parts.

        Raises:
            UnsupportedModelError: they are not of a format above.
        """
        formats = {torch.int8: (8, torch.float32), torch.uint8: (4, torch.float16)}
        self.bits, scale_dtype = formats.get(packed.dtype, (0, None))
        rows, columns = packed.shape[0], packed.shape[1] * (2 if self.bits == 4 else 1)
        groups = (rows,) if self.bits == 8 else (rows, columns // GROUP)
        if not self.bits or scale.dtype != scale_dtype or scale.shape != groups or (self.bits == 4 and columns % GROUP):
            raise UnsupportedModelError(
                f"a quantised expert holds {packed.dtype} {list(packed.shape)} with scales {scale.dtype} "
                f"{list(scale.shape)}; the kernels know int8 [out, in] with float32 [out], and uint8 [out, in / 2] "
                f"with float16 [out, in / {GROUP}]."
            )
        self.packed, self.scale = packed, scale
        self.shape = (columns, rows)

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`packed` and `scale`."""
        return self.packed, self.scale

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix [out, in] in `dtype`: integers times scales in float32, rounded once."""
        columns, rows = self.shape
        out = torch.empty(rows, columns, dtype=dtype, device=self.packed.device)
        self.unpack(slice(0, rows), out)
        return out

    def unpack(self, rows: slice, out: torch.Tensor) -> None:
        """Write the values of some rows to `out` [rows, in]: integers times scales in float32, rounded once."""
        for some in self.blocks(UNPACKED, rows):
            out[some.start - rows.start : some.stop - rows.start] = self._unpacked(some)

    def _unpacked(self, some: slice) -> torch.Tensor:
        decode = decode_int8 if self.bits == 8 else decode_int4
        return decode(self.packed[some], self.scale[some])

    def blocks(self, numbers: int, within: slice | None = None) -> list[slice]:
        """Its rows (or those `within`), as many at a time as hold `numbers` on a CPU; elsewhere all at once."""
        columns, rows = self.shape
        begin, end = (0, rows) if within is None else (within.start, within.stop)
        each = max(1, numbers // columns) if self.packed.device.type == "cpu" else end - begin
        return [slice(start, min(start + each, end)) for start in range(begin, end, each)]


def matvec(x: torch.Tensor, weight: QuantisedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x [rows, in] times the matrix, [rows, out] in x's dtype, accumulated in float32 (plain torch)."""
    wide = x.float()
    out = wide.new_empty(x.shape[0], weight.shape[1])
    for some in weight.blocks(UNPACKED):
        out[:, some] = wide @ weight._unpacked(some).t()
    return (out if bias is None else out + bias.float()).to(x.dtype)


def many_rows(
    x: torch.Tensor,
    weight: QuantisedMatrix,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    unpack: Unpack | None = None,
    multiply: Multiply | None = None,
) -> None:
    """Write x [rows, in] times the matrix, unpacked to x's dtype, to `out` [rows, out].

    Unpacked whole, a matrix of 4096 x 2048 goes to memory and back, in pages that may be new each time.

    Args:
        x: the rows.
        weight: the matrix.
        bias: [out] or None.
        out: where to.
        unpack: what unpacks; None: `weight.unpack`.
        multiply: what multiplies; None: torch.
    """
    blocks = weight.blocks(MULTIPLIED)
    held = x.new_empty(blocks[0].stop, weight.shape[0])
    for some in blocks:
        values = held[: some.stop - some.start]
        (unpack or weight.unpack)(some, values)
        if multiply is not None:
            part = x.new_empty(x.shape[0], values.shape[0])
            multiply(x, values.t(), None if bias is None else bias[some], part)
            out[:, some] = part
        elif bias is None:
            torch.mm(x, values.t(), out=out[:, some])
        else:
            torch.addmm(bias[some], x, values.t(), out=out[:, some])
