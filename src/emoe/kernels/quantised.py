"""Matrices of small integers with scales, as experts of `--expert-dtype int8` and `int4` have them in their slots.

The format, for each matrix part NAME of an expert. Rows are outputs, whatever layout the family's checkpoint has:

    int8   NAME int8 [out, in]         NAME_scale float32 [out]            value = integer * scale of its row
    int4   NAME uint8 [out, in / 2]    NAME_scale float16 [out, in / 32]   value = (nibble - 8) * scale of its group

The low nibble of a byte is the even column. A product is (integers * scales) @ x, accumulated in float32 over x in
bfloat16 or float32, and rounded once to x's dtype.
"""

from __future__ import annotations

import torch

from emoe.errors import UnsupportedModelError

GROUP = 32
"""Columns of a row that share one scale in int4."""

SCALE = "_scale"
"""What the part with a matrix's scales is called beyond the matrix's own name."""


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

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix [out, in] in `dtype`: integers times scales in float32, rounded once."""
        if self.bits == 8:
            return (self.packed.float() * self.scale[:, None]).to(dtype)
        columns, rows = self.shape
        integers = torch.stack((self.packed & 15, self.packed >> 4), dim=-1).view(rows, -1, GROUP)
        return ((integers.float() - 8.0) * self.scale[..., None].float()).view(rows, columns).to(dtype)


def matvec(x: torch.Tensor, weight: QuantisedMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x [rows, in] times the matrix, [rows, out] in x's dtype, accumulated in float32 (plain torch)."""
    out = x.float() @ weight.values(torch.float32).t()
    return (out if bias is None else out + bias.float()).to(x.dtype)
