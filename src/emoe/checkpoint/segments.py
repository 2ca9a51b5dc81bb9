"""One expert's reads: ranges of files, the memory each goes to, and what is made from them afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emoe.checkpoint.layout import contiguous_strides
from emoe.checkpoint.pieces import Piece
from emoe.checkpoint.skeleton import SLOT_DTYPES
from emoe.errors import ReadError, UsageError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

# Offsets, lengths and addresses of O_DIRECT reads are multiples of the device's block, at most this.
ALIGNMENT = 4096
# Pieces that are converted or rearranged pass through memory of at most about this size per thread.
GATHER_BYTES = 16 << 20


@dataclass(slots=True)
class Segment:
    """One range of a file and the memory it goes to; `pieces` are those to make from it afterwards."""

    tensor: str
    file: Path
    offset: int
    nbytes: int
    memory: Bytes | None
    pieces: list[Piece]


Run = list[Segment]
"""Segments that adjoin in one file: one read, where the system takes so many buffers."""


def segments_of(pieces: Sequence[Piece], parts: Mapping[str, torch.Tensor]) -> list[Segment]:
    """What to read, by file and offset. Pieces that share a range share a segment, unless they are `direct`."""
    straight: list[Segment] = []
    shared: dict[tuple[Path, int, int], Segment] = {}
    for piece in pieces:
        part = parts.get(piece.part)
        if part is None or part.device.type != "cpu" or not part.is_contiguous():
            raise UsageError(f"part {piece.part!r} must be given as a contiguous CPU tensor")
        if len(piece.dst_index) != part.ndim or any(
            index.stop > size for index, size in zip(piece.dst_index, part.shape, strict=True)
        ):
            raise UsageError(f"part {piece.part!r} has shape {list(part.shape)}, too small for {piece.dst_index}")
        segment = Segment(piece.entry_name, piece.file, piece.offset, piece.nbytes, None, [piece])
        if piece.direct:
            segment.memory, segment.pieces = _region_bytes(piece, part), []
            straight.append(segment)
        else:
            known = shared.setdefault((piece.file, piece.offset, piece.nbytes), segment)
            if known is not segment:
                known.pieces.append(piece)
    return sorted([*straight, *shared.values()], key=lambda segment: (segment.file, segment.offset))


def _region_bytes(piece: Piece, part: torch.Tensor) -> Bytes:
    """The bytes of the part that a direct piece fills."""
    if part.dtype != SLOT_DTYPES[piece.dtype]:
        raise UsageError(f"part {piece.part!r} is {part.dtype}, but its piece is to be read as {piece.dtype}")
    strides = contiguous_strides(tuple(part.shape))
    start = sum(index.start * stride for index, stride in zip(piece.dst_index, strides, strict=True))
    memory: Bytes = part.view(-1).view(torch.uint8).numpy()
    return memory[start * part.itemsize : start * part.itemsize + piece.nbytes]


def gather_nbytes(pieces: Sequence[Piece]) -> int:
    """Bytes of scratch memory that reading `pieces` takes."""
    shared = {(piece.file, piece.offset, piece.nbytes) for piece in pieces if not piece.direct}
    sizes = [align_up(nbytes) for _, _, nbytes in shared]
    return min(sum(sizes), max(GATHER_BYTES, *sizes, 0))


def batches(segments: Sequence[Segment], scratch: Callable[[int], Bytes]) -> Iterator[list[Run]]:
    """Runs of segments that adjoin in one file; those without memory of their own are given some.

    The runs of a batch may be read at once. Scratch memory is reused by the next batch, so each batch is finished
    before the next is asked for.
    """
    batch: list[Run] = []
    gathered = 0
    for segment in segments:
        size = 0 if segment.memory is not None else align_up(segment.nbytes)
        if gathered and gathered + size > GATHER_BYTES:
            yield _with_memory(batch, gathered, scratch)
            batch, gathered = [], 0
        last = batch[-1][-1] if batch else None
        if last is not None and last.file == segment.file and last.offset + last.nbytes == segment.offset:
            batch[-1].append(segment)
        else:
            batch.append([segment])
        gathered += size
    if batch:
        yield _with_memory(batch, gathered, scratch)


def _with_memory(batch: list[Run], nbytes: int, scratch: Callable[[int], Bytes]) -> list[Run]:
    """The batch, with scratch memory for the segments that have none, each at an aligned place."""
    memory = scratch(nbytes) if nbytes else None
    at = 0
    for run in batch:
        for segment in run:
            if segment.memory is None and memory is not None:
                segment.memory = memory[at : at + segment.nbytes]
                at += align_up(segment.nbytes)
    return batch


def finish(segment: Segment, parts: Mapping[str, torch.Tensor]) -> None:
    """Rearrange and convert what was read into the parts of the segment's pieces."""
    for piece in segment.pieces:
        stored = torch.from_numpy(segment.memory).view(SLOT_DTYPES[piece.dtype])
        view = stored.as_strided(piece.shape, piece.src_strides, piece.src_offset)
        parts[piece.part][piece.dst_index].copy_(view)


def buffers_of(run: Run) -> list[Bytes]:
    """The memory that a run fills, in its order."""
    return [segment.memory for segment in run if segment.memory is not None]


def first_bytes(buffers: Sequence[Bytes], nbytes: int) -> list[Bytes]:
    """The first `nbytes` of the buffers."""
    found: list[Bytes] = []
    for buffer in buffers:
        if nbytes <= 0:
            break
        found.append(buffer[:nbytes])
        nbytes -= buffer.size
    return found


def drop_bytes(buffers: list[Bytes], nbytes: int) -> None:
    """Take the first `nbytes` away."""
    while buffers and nbytes >= buffers[0].size:
        nbytes -= buffers.pop(0).size
    if nbytes:
        buffers[0] = buffers[0][nbytes:]


def tensors_of(run: Run) -> str:
    """The tensors a run reads, for errors."""
    more = len(run) - 1
    return f"tensor {run[0].tensor!r}" + (f" and {more} more" if more else "")


def ended_early(run: Run, descriptor: int, offset: int) -> ReadError:
    """The error for a file that ends before the bytes its header promised."""
    wanted = next(segment for segment in run if offset < segment.offset + segment.nbytes)
    missing = wanted.offset + wanted.nbytes - offset
    return ReadError(
        f"{wanted.file} ends early: tensor {wanted.tensor!r} wants {missing:,} more bytes from byte {offset:,} on, "
        f"and the file now has {os.fstat(descriptor).st_size:,}. It was truncated or replaced since it was "
        "indexed; restore it and load the model again."
    )


def align_down(offset: int) -> int:
    """The last block boundary at or before `offset`."""
    return offset // ALIGNMENT * ALIGNMENT


def align_up(offset: int) -> int:
    """The first block boundary at or after `offset`."""
    return -(-offset // ALIGNMENT) * ALIGNMENT
