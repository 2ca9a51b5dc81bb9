"""The input embedding from disk: the rows that a pass needs are read when it begins.

A token needs one row of it, yet in memory it is the largest single tensor of many models (1.16 GB in gpt-oss-20b). Its
bytes are better spent on experts. The module's own arithmetic stays: only the look-up inside its `forward` is answered
from disk, so what a family does around it (scaling, casting) is done as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from emoe.checkpoint.index import ExpertIndex
from emoe.checkpoint.lookup import PART, Lookup
from emoe.checkpoint.readers import Reader
from emoe.config import EMBEDDINGS, Embeddings
from emoe.errors import UnsupportedModelError, UsageError

ROWS_AT_ONCE = 4096
"""Of one call of the reader: bounds what it holds for rows of another dtype than the model's."""


def choose_embeddings(asked: Embeddings, index: ExpertIndex, all_resident: bool) -> tuple[Lookup | None, str]:
    """The embedding that is to stay on disk, None where it is loaded; and why, in words.

    "auto": on disk where experts have to be read from there too, which is where memory is short.

    Raises:
        UsageError: no such choice.
        UnsupportedModelError: "disk" is asked for and this model's embedding cannot be read row by row.
    """
    if asked not in EMBEDDINGS:
        raise UsageError(f"embeddings={asked!r} is no choice: use one of {', '.join(EMBEDDINGS)}.")
    if index.lookup is None:
        reason = "the input embedding is tied to another weight, or not stored as one table"
        if asked == "disk":
            raise UnsupportedModelError(f"embeddings='disk': {reason}, so it stays in memory; leave the option out.")
        return None, reason
    if asked == "disk":
        return index.lookup, "as asked"
    if asked == "auto" and not all_resident:
        return index.lookup, "experts are read from there too"
    return None, "as asked" if asked == "memory" else "every expert is resident"


def keep_at_rest(module: nn.Module) -> None:
    """Take the weight out of an embedding whose tensors hold no numbers yet.

    What stands in its place says its shape and dtype, and nothing can be computed with it: whoever uses it for
    anything but a look-up gets an error of torch's, not a wrong number.
    """
    weight = module._parameters.pop("weight")
    if weight is None:
        raise UnsupportedModelError(f"{type(module).__name__} has no weight to leave on disk")
    kept = torch.empty_like(weight, device="meta", requires_grad=False)
    # Only the weight is never to be initialised: some families keep a scale beside it.
    cast(Any, kept)._is_hf_initialized = True
    module.weight = kept


class RowsOnDisk:
    """Answers the look-ups of one model's embedding."""

    def __init__(self, model: PreTrainedModel, lookup: Lookup, index: ExpertIndex) -> None:
        """Answer from now on. The model was loaded with `lookup` at rest.

        Raises:
            ReadError: the file has gone or changed.
        """
        self.lookup = lookup
        self.rows_read = 0
        self._module = model.get_submodule(lookup.module)
        self._dtype: torch.dtype = getattr(torch, lookup.run_dtype)
        # Rows are read through the page cache whatever is said of experts: they are small, and text repeats words.
        self._reader = Reader("cached", {lookup.entry.file: index.files[lookup.entry.file]})
        self._forward: Callable[..., Any] = self._module.forward
        self._module.forward = self._look_up
        model.resize_token_embeddings = _refuse_to_resize

    def remove(self) -> None:
        """Close the file. Later look-ups raise ReadError."""
        self._reader.close()

    @property
    def bytes_read(self) -> int:
        """Bytes of the rows read so far."""
        return self.rows_read * self.lookup.entry.nbytes // self.lookup.shape[0]

    def _look_up(self, *args: Any, **kwargs: Any) -> Any:
        with _Answers(self._module.weight, self.rows):
            return self._forward(*args, **kwargs)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """[*ids.shape, width] in the run dtype, where `ids` lie. Each row is read once.

        Raises:
            IndexError: an id that is no row's.
            ReadError: the file could not be read, or ended early.
        """
        count, width = self.lookup.shape
        wanted, inverse = np.unique(ids.detach().cpu().numpy().reshape(-1), return_inverse=True)
        if wanted.size and (wanted[0] < 0 or wanted[-1] >= count):
            worst = wanted[0] if wanted[0] < 0 else wanted[-1]
            raise IndexError(f"token id {worst} is no row of the embedding, which has {count}")
        on_gpu = ids.device.type == "cuda"
        found = torch.empty((len(wanted), width), dtype=self._dtype, pin_memory=on_gpu)
        for start in range(0, len(wanted), ROWS_AT_ONCE):
            part = wanted[start : start + ROWS_AT_ONCE]
            pieces = [self.lookup.piece(row, at, rows) for row, at, rows in _runs(part.tolist())]
            self._reader.read_into(pieces, {PART: found[start : start + len(part)]})
        self.rows_read += len(wanted)
        placed = found.to(ids.device, non_blocking=on_gpu)
        return placed[torch.from_numpy(inverse.reshape(ids.shape)).to(ids.device)]


def _runs(rows: Iterable[int]) -> list[tuple[int, int, int]]:
    """(first row, where it goes, how many) of rows in ascending order, neighbours together."""
    found: list[tuple[int, int, int]] = []
    for at, row in enumerate(rows):
        if found and row == found[-1][0] + found[-1][2]:
            first, where, many = found[-1]
            found[-1] = first, where, many + 1
        else:
            found.append((row, at, 1))
    return found


class _Answers(TorchFunctionMode):
    """Answers look-ups in one weight, and does everything else as ever."""

    def __init__(self, weight: torch.Tensor, answer: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._weight, self._answer = weight, answer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.embedding:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            if weight is self._weight:
                return self._answer(args[0] if args else kwargs["input"])
        return func(*args, **kwargs)


def _refuse_to_resize(*args: object, **kwargs: object) -> None:
    raise UsageError(
        "the input embedding lies on disk and cannot be resized: load the model with embeddings='memory', or resize "
        "the checkpoint's once with transformers and save it."
    )
