"""One expert as pieces of files: which bytes to read, and where each goes in the expert's parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

from emoe.checkpoint.headers import DTYPE_BITS, TensorEntry
from emoe.checkpoint.layout import Block, Layout, contiguous_strides
from emoe.errors import UnsupportedModelError

# Rows of gate and up that the checkpoint interleaves are read once, together. Beyond this much waste the
# expert lies across the tensor (experts in the last dimension, say), and reading it means reading all the
# others.
MAX_READ_AMPLIFICATION = 2.0


@dataclass(frozen=True, slots=True)
class Piece:
    """A part's region, and the bytes of a file it comes from.

    Read `nbytes` at `offset` of `file`: elements of `dtype` (a safetensors name). The region
    `part[dst_index]` is the view of them with `shape`, `src_strides` and first element `src_offset` (in
    elements). Pieces with the same file and range share one read. `direct` says that the bytes are the
    region, in order and in the part's dtype, and that the region is contiguous in the part: they can be read
    straight into place.
    """

    part: str
    entry_name: str
    file: Path
    offset: int
    nbytes: int
    dtype: str
    src_offset: int
    src_strides: tuple[int, ...]
    shape: tuple[int, ...]
    dst_index: tuple[slice, ...]
    direct: bool


@dataclass(frozen=True, slots=True)
class Step:
    """A piece without its file: which of the assignment's sources, and elements instead of bytes."""

    source: int
    span_start: int
    span_length: int
    src_offset: int
    src_strides: tuple[int, ...]
    shape: tuple[int, ...]
    dst_index: tuple[slice, ...]
    exact: bool

    def bind(self, part: str, entry: TensorEntry, run_dtype: str) -> Piece:
        """The piece for one layer's tensor. `run_dtype` is the part's dtype as safetensors calls it."""
        itemsize = DTYPE_BITS[entry.dtype] // 8
        return Piece(
            part,
            entry.name,
            entry.file,
            entry.offset + self.span_start * itemsize,
            self.span_length * itemsize,
            entry.dtype,
            self.src_offset,
            self.src_strides,
            self.shape,
            self.dst_index,
            self.exact and entry.dtype == run_dtype,
        )


Recipe = tuple[tuple[Step, ...], ...]
"""The steps that make each expert of one parameter; layers alike share it."""


def recipe(layout: Layout, target: str) -> Recipe:
    """How to make each expert (the first dimension of `layout`) from the sources. `target` names it in
    errors.

    Raises:
        UnsupportedModelError: one expert cannot be read without reading much of the others.
    """
    experts: list[list[Block]] = [[] for _ in range(layout.shape[0])]
    for block in layout.blocks:
        for row in range(block.sizes[0]):
            offset = block.offset + row * block.strides[0]
            experts[block.start[0] + row].append(
                Block(block.source, offset, block.start[1:], block.sizes[1:], block.strides[1:])
            )
    return tuple(_steps(blocks, layout.shape[1:], target) for blocks in experts)


@cache
def whole_tensors(experts: int, shape: tuple[int, ...]) -> Recipe:
    """The recipe of a part of `shape` that is a tensor of its own for each expert, in the part's order."""
    region = tuple(slice(0, size) for size in shape)
    strides = tuple(stride if size > 1 else 0 for size, stride in zip(shape, contiguous_strides(shape), strict=True))
    return tuple((Step(expert, 0, prod(shape), 0, strides, shape, region, True),) for expert in range(experts))


def _steps(blocks: Sequence[Block], shape: tuple[int, ...], target: str) -> tuple[Step, ...]:
    """One expert's steps, in the order of sources and offsets."""
    by_source: defaultdict[int, list[Block]] = defaultdict(list)
    for block in blocks:
        by_source[block.source].append(block)
    steps: list[Step] = []
    for source in sorted(by_source):
        for span in _spans(by_source[source]):
            begin = min(block.offset for block in span)
            length = max(_end(block) for block in span) - begin
            used = sum(prod(block.sizes) for block in span)
            if length > MAX_READ_AMPLIFICATION * used:
                raise UnsupportedModelError(
                    f"unsupported layout: one expert of {target!r} is {used:,} numbers spread over "
                    f"{length:,} of the checkpoint's tensor, so reading it would mean reading other experts "
                    "too. Save the model once with transformers' save_pretrained()."
                )
            for block in span:
                strides = tuple(
                    stride if size > 1 else 0 for size, stride in zip(block.sizes, block.strides, strict=True)
                )
                region = tuple(slice(s, s + n) for s, n in zip(block.start, block.sizes, strict=True))
                exact = len(span) == 1 and _row_major(block) and _contiguous_region(block.sizes, shape)
                steps.append(Step(source, begin, length, block.offset - begin, strides, block.sizes, region, exact))
    return tuple(steps)


def _spans(blocks: Sequence[Block]) -> list[list[Block]]:
    """The blocks of one source, those together whose ranges overlap."""
    spans: list[list[Block]] = []
    end = -1
    for block in sorted(blocks, key=lambda block: block.offset):
        if block.offset < end:
            spans[-1].append(block)
        else:
            spans.append([block])
        end = max(end, _end(block))
    return spans


def _end(block: Block) -> int:
    """One past the last element the block touches."""
    return block.offset + sum((n - 1) * s for n, s in zip(block.sizes, block.strides, strict=True)) + 1


def _row_major(block: Block) -> bool:
    """Whether the block's elements lie in order without gaps."""
    expected = contiguous_strides(block.sizes)
    return all(n == 1 or s == e for n, s, e in zip(block.sizes, block.strides, expected, strict=True))


def _contiguous_region(sizes: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a box of `sizes` is one run of memory in a row-major tensor of `shape`."""
    partial = [dim for dim, (size, full) in enumerate(zip(sizes, shape, strict=True)) if size != full]
    return not partial or all(size == 1 for size in sizes[: partial[-1]])
