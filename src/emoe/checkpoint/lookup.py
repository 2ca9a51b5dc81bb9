"""The input embedding at rest: where its rows lie, for models that read it as a table and as nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from emoe.checkpoint.headers import DTYPE_BITS, TensorEntry
from emoe.checkpoint.pieces import Piece
from emoe.checkpoint.skeleton import TORCH_DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from emoe.checkpoint.conversion import Assignment

PART = "rows"
"""What pieces call the memory that rows are read into."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """An embedding that is not tied to another parameter and lies in the checkpoint as it stands.

    module: its path in the model; entry: its tensor [rows, width]; run_dtype: what the model runs it in, a torch name.
    """

    module: str
    entry: TensorEntry
    run_dtype: str

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and their width."""
        rows, width = self.entry.shape
        return rows, width

    @property
    def nbytes(self) -> int:
        """Bytes of the whole table in the run dtype."""
        dtype: torch.dtype = getattr(torch, self.run_dtype)
        return prod(self.entry.shape) * dtype.itemsize

    def piece(self, row: int, at: int, rows: int) -> Piece:
        """`rows` of the table from `row` on, to lie from row `at` on in memory of the run dtype."""
        width = self.entry.shape[1]
        itemsize = DTYPE_BITS[self.entry.dtype] // 8
        strides = (width if rows > 1 else 0, 1 if width > 1 else 0)
        return Piece(
            part=PART,
            entry_name=self.entry.name,
            file=self.entry.file,
            offset=self.entry.offset + row * width * itemsize,
            nbytes=rows * width * itemsize,
            dtype=self.entry.dtype,
            src_offset=0,
            src_strides=strides,
            shape=(rows, width),
            dst_index=(slice(at, at + rows), slice(0, width)),
            direct=TORCH_DTYPES[self.entry.dtype] == getattr(torch, self.run_dtype),
        )


def find_lookup(model: PreTrainedModel, assignments: Mapping[str, Assignment], run_dtype: Any) -> Lookup | None:
    """The model's input embedding as a `Lookup`, None where it cannot be one.

    Args:
        model: from `skeleton`.
        assignments: which tensors make which parameter, by the parameter's name.
        run_dtype: (name, dtype of the parameter) to the dtype it runs in.
    """
    table = model.get_input_embeddings()
    if not isinstance(table, nn.Embedding) or table.max_norm is not None:
        return None
    homes = [name for name, module in model.named_modules() if module._parameters.get("weight") is table.weight]
    if len(homes) != 1:  # the output projection's too
        return None
    name = f"{homes[0]}.weight"
    if any(name in pair for pair in getattr(model, "all_tied_weights_keys", {}).items()):
        return None
    found = assignments.get(name)
    if found is None or found.converter is not None or len(found.entries()) != 1:
        return None
    entry, dtype = found.entries()[0], run_dtype(name, table.weight.dtype)
    if entry.shape != tuple(table.weight.shape) or entry.dtype not in TORCH_DTYPES:
        return None
    return Lookup(homes[0], entry, str(dtype).removeprefix("torch."))
