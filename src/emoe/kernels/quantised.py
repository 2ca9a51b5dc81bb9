"""Matrices of small integers with scales, as experts of `--expert-dtype int8` and `int4` have them in their slots.

The format, for each matrix part NAME of an expert. Rows are outputs, whatever layout the family's checkpoint has:

    int8   NAME int8 [out, in]         NAME_scale float32 [out]            value = integer * scale of its row
    int4   NAME uint8 [out, in / 2]    NAME_scale float16 [out, in / 32]   value = (nibble - 8) * scale of its group

The low nibble of a byte is the even column. A product is (integers * scales) @ x, accumulated in float32 over x in
bfloat16 or float32, and rounded once to x's dtype.
"""

from __future__ import annotations

import torch

from emoe.checkpoint.codecs.arithmetic import decode_int4, decode_int8
from emoe.checkpoint.codecs.formats import GROUP, SCALE
from emoe.errors import UnsupportedModelError

__all__ = ["GROUP", "SCALE", "QuantisedMatrix", "matvec"]

UNPACKED = 1 << 17
"""Numbers unpacked at once on a CPU: 512 KiB of float32.

A matrix of 1536 x 2048 as int4 takes 2.5 ms, and 3.0 to 5.3 in one go (docs/log.md).
"""


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
        for some in self._blocks():
            out[some] = self._unpacked(some)
        return out

    def _unpacked(self, some: slice) -> torch.Tensor:
        decode = decode_int8 if self.bits == 8 else decode_int4
        return decode(self.packed[some], self.scale[some])

    def _blocks(self) -> list[slice]:
        """Its rows, as many at a time as suit the device: a CPU unpacks within its cache, and holds little else."""
        columns, rows = self.shape
        each = max(1, UNPACKED // columns) if self.packed.device.type == "cpu" else rows
        return [slice(start, min(start + each, rows)) for start in range(0, rows, each)]


def matvec(x: torch.Tensor, weight: QuantisedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x [rows, in] times the matrix, [rows, out] in x's dtype, accumulated in float32 (plain torch)."""
    wide = x.float()
    out = wide.new_empty(x.shape[0], weight.shape[1])
    for some in weight._blocks():
        out[:, some] = wide @ weight._unpacked(some).t()
    return (out if bias is None else out + bias.float()).to(x.dtype)
