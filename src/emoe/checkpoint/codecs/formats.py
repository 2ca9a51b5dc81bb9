"""The codecs by name, and what each makes of an expert's parts. Names and sizes only: torch comes with `encode`.

A matrix is stored with its outputs as rows, whatever the family: what a model keeps as [in, out] (gpt-oss) is turned
round. Biases, and whatever else has one dimension, stay as they are.

    int8    NAME int8 [out, in], NAME_scale float32 [out]                weight = NAME * scale of its row
    int4    NAME uint8 [out, in / 2], NAME_scale float16 [out, in / 32]  weight = (nibble - 8) * scale of its group
            groups of 32 along the inputs; the low nibble of a byte is the even column

Sizes that 32 does not divide are refused: padding would change the matrix that the kernels see, and no published
model needs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from emoe.checkpoint.parts import PartSpec
from emoe.errors import UnsupportedModelError, UsageError

if TYPE_CHECKING:
    import torch

NATIVE = "native"
"""Experts as the checkpoint has them, in the dtype the model runs in: the default, and the only lossless one."""

GROUP = 32
"""Inputs that share a scale in int4."""

SCALE = "_scale"
"""What the name of a matrix's scales ends in."""


class ExpertCodec(Protocol):
    """How one expert is encoded at rest and in its slot. `encode` and `decode` take a matrix [out, in]."""

    @property
    def name(self) -> str:
        """As `--expert-dtype` has it."""
        ...

    def matrix_parts(self, name: str, rows: int, columns: int) -> tuple[PartSpec, ...]:
        """The parts that stand for the matrix [rows, columns] called `name`: packed numbers first, then scales.

        Raises:
            UnsupportedModelError: a size that the codec cannot take.
        """
        ...

    def encode(self, matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors of `matrix_parts`. Raises CheckpointError for numbers that are not finite or too large."""
        ...

    def decode(self, *parts: torch.Tensor) -> torch.Tensor:
        """The float32 matrix that such tensors stand for."""
        ...


class Int8:
    """Symmetric, one scale for each row."""

    name = "int8"

    def matrix_parts(self, name: str, rows: int, columns: int) -> tuple[PartSpec, ...]:
        """See `ExpertCodec`."""
        return PartSpec(name, (rows, columns), "int8"), PartSpec(name + SCALE, (rows,), "float32")

    def encode(self, matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `ExpertCodec`."""
        from emoe.checkpoint.codecs.arithmetic import encode_int8

        return encode_int8(matrix)

    def decode(self, *parts: torch.Tensor) -> torch.Tensor:
        """See `ExpertCodec`."""
        from emoe.checkpoint.codecs.arithmetic import decode_int8

        return decode_int8(*parts)


class Int4:
    """Groups of 32 with a scale each, chosen for the least squared error."""

    name = "int4"

    def matrix_parts(self, name: str, rows: int, columns: int) -> tuple[PartSpec, ...]:
        """See `ExpertCodec`."""
        if columns % GROUP:
            raise UnsupportedModelError(
                f"int4 experts have a scale for every {GROUP} inputs, and {name!r} has {columns} inputs, which {GROUP} "
                "does not divide. Use int8 for this model, or native."
            )
        packed = PartSpec(name, (rows, columns // 2), "uint8")
        return packed, PartSpec(name + SCALE, (rows, columns // GROUP), "float16")

    def encode(self, matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See `ExpertCodec`."""
        from emoe.checkpoint.codecs.arithmetic import encode_int4

        return encode_int4(matrix)

    def decode(self, *parts: torch.Tensor) -> torch.Tensor:
        """See `ExpertCodec`."""
        from emoe.checkpoint.codecs.arithmetic import decode_int4

        return decode_int4(*parts)


CODECS: dict[str, ExpertCodec] = {codec.name: codec for codec in (Int8(), Int4())}
"""All codecs that change numbers. A new one is a class and a word here."""

EXPERT_DTYPES = (NATIVE, *CODECS)
"""What `--expert-dtype` takes."""


def codec_of(expert_dtype: str) -> ExpertCodec | None:
    """The codec of that name; None for "native". Raises UsageError for an unknown one."""
    if expert_dtype not in EXPERT_DTYPES:
        raise UsageError(f"no expert dtype is called {expert_dtype!r}; use one of {', '.join(EXPERT_DTYPES)}")
    return CODECS.get(expert_dtype)


def coded_parts(codec: ExpertCodec | None, parts: Iterable[PartSpec], transposed: bool) -> tuple[PartSpec, ...]:
    """An expert's parts under `codec` (None: as they are); `transposed` says that the model has them as [in, out].

    Raises:
        UnsupportedModelError: a part that the codec cannot take.
    """
    made: list[PartSpec] = []
    for part in parts:
        if codec is None or len(part.shape) == 1:
            made.append(part)
            continue
        if len(part.shape) != 2:
            raise UnsupportedModelError(
                f"{codec.name} experts are matrices, and {part.name!r} has shape {list(part.shape)} for each expert. "
                "Use native for this model."
            )
        rows, columns = reversed(part.shape) if transposed else part.shape
        made += codec.matrix_parts(part.name, rows, columns)
    return tuple(made)
