"""Writing safetensors files tensor by tensor: the header first, then the data as it is made, nothing kept."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

_CODES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_DATA_ALIGNMENT = 4096
"""The data begins at a multiple of this: what O_DIRECT reads are aligned to."""


@dataclass(frozen=True, slots=True)
class TensorToWrite:
    """One tensor: `blocks()` yields its rows in order, in pieces of any size, in `dtype`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterable[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        numel = 1
        for size in self.shape:
            numel *= size
        return numel * self.dtype.itemsize


def write_sharded(
    tensors: Sequence[TensorToWrite], folder: Path, shard_bytes: int, progress: Progress | None = None
) -> list[Path]:
    """Write `tensors` in hub layout: one `model.safetensors`, or shards of at most `shard_bytes` and their index.

    A tensor larger than `shard_bytes` gets a shard of its own. Memory stays at one block.

    Raises:
        ValueError: a tensor's blocks do not add up to its shape.
    """
    shards = list(_shards(tensors, shard_bytes))
    total = sum(tensor.nbytes for tensor in tensors)
    files, weight_map, before = [], {}, 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        files.append(folder / name)
        before = write_file(shard, folder / name, before, total, progress)
        weight_map.update(dict.fromkeys((tensor.name for tensor in shard), name))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return files


def _shards(tensors: Sequence[TensorToWrite], shard_bytes: int) -> Iterator[list[TensorToWrite]]:
    shard: list[TensorToWrite] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.nbytes
    if shard:
        yield shard


def write_file(
    tensors: Sequence[TensorToWrite], file: Path, before: int = 0, total: int = 0, progress: Progress | None = None
) -> int:
    """Write one safetensors file, its tensors in the order given, and return the bytes of data done so far.

    `before` bytes of `total` were written to other files already; `progress` hears of all of them.

    Raises:
        ValueError: a tensor's blocks do not add up to its shape.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        span = [offset, offset + tensor.nbytes]
        header[tensor.name] = {"dtype": _CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": span}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _DATA_ALIGNMENT)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            written = 0
            for block in tensor.blocks():
                data = block.to(tensor.dtype).contiguous().view(torch.uint8).numpy()
                written += out.write(data.data)
            if written != tensor.nbytes:
                raise ValueError(f"{tensor.name}: {written} bytes were made, {tensor.shape} needs {tensor.nbytes}")
            before += written
            if progress is not None:
                progress(before, total)
        out.flush()
        # On disk before anything is measured: written pages that are still dirty cannot be dropped from the cache.
        os.fsync(out.fileno())
    return before
