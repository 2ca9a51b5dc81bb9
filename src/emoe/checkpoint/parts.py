"""What an expert consists of, in names, shapes and dtypes. No torch: a plan needs these before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

ITEMSIZES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "int8": 1,
    "uint8": 1,
}
"""Bytes of one element, by torch's names."""


@dataclass(frozen=True, slots=True)
class PartSpec:
    """One parameter of an expert: its name in the module, its shape per expert, its torch dtype's name."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return prod(self.shape) * ITEMSIZES[self.dtype]
