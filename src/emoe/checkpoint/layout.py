"""The arithmetic of rearranged tensors, in plain integers: which element came from which source.

A `Layout` tiles a tensor's shape with `Block`s, each a strided view of one source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import NamedTuple

from emoe.errors import UnsupportedModelError

# A conversion that shuffles single elements would need one block each. No reader could serve that.
MAX_BLOCKS = 1 << 17


class Block(NamedTuple):
    """A box of a tensor whose elements are one strided view of one source.

    The element at index `start + i` (per dimension, 0 <= i < sizes) is the source's element number
    `offset + sum(i * strides)`.
    """

    source: int
    offset: int
    start: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """A tensor's shape, and the blocks that tile it exactly."""

    shape: tuple[int, ...]
    blocks: tuple[Block, ...]

    @staticmethod
    def of_source(source: int, shape: Sequence[int]) -> Layout:
        """The layout of a whole source tensor, row-major."""
        shape = tuple(shape)
        return Layout(shape, (Block(source, 0, (0,) * len(shape), shape, contiguous_strides(shape)),))

    def permute(self, dims: Sequence[int]) -> Layout:
        """The dimensions in another order."""
        order = [_axis(dim, len(self.shape)) for dim in dims]
        if sorted(order) != list(range(len(self.shape))):
            raise ValueError(f"{tuple(dims)} is not an order of {len(self.shape)} dimensions")

        def pick(values: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(values[dim] for dim in order)

        blocks = tuple(
            b._replace(start=pick(b.start), sizes=pick(b.sizes), strides=pick(b.strides)) for b in self.blocks
        )
        return Layout(pick(self.shape), blocks)

    def transpose(self, dim0: int, dim1: int) -> Layout:
        """Two dimensions swapped."""
        order = list(range(len(self.shape)))
        dim0, dim1 = _axis(dim0, len(order)), _axis(dim1, len(order))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        return self.permute(order)

    def narrow(self, dim: int, begin: int, length: int) -> Layout:
        """The part `begin : begin + length` of one dimension."""
        dim = _axis(dim, len(self.shape))
        if not 0 <= begin <= begin + length <= self.shape[dim]:
            raise ValueError(f"{begin}:{begin + length} is outside dimension {dim} of {list(self.shape)}")
        blocks = []
        for block in self.blocks:
            first = max(block.start[dim], begin)
            last = min(block.start[dim] + block.sizes[dim], begin + length)
            if first < last:
                blocks.append(
                    block._replace(
                        offset=block.offset + (first - block.start[dim]) * block.strides[dim],
                        start=_put(block.start, dim, first - begin),
                        sizes=_put(block.sizes, dim, last - first),
                    )
                )
        return Layout(_put(self.shape, dim, length), tuple(blocks))

    def drop(self, dim: int) -> Layout:
        """A dimension of size 1 removed."""
        dim = _axis(dim, len(self.shape))
        if self.shape[dim] != 1:
            raise ValueError(f"dimension {dim} of {list(self.shape)} has not size 1")
        return self._splice(dim, 1, 0)

    def add(self, dim: int) -> Layout:
        """A dimension of size 1 inserted before `dim`."""
        return self._splice(_axis(dim, len(self.shape) + 1), 0, 1)

    def select(self, dim: int, index: int) -> Layout:
        """One index of a dimension, which goes."""
        dim = _axis(dim, len(self.shape))
        return self.narrow(dim, _axis(index, self.shape[dim]), 1).drop(dim)

    def split(self, sizes: Sequence[int], dim: int) -> list[Layout]:
        """Consecutive parts of a dimension."""
        dim = _axis(dim, len(self.shape))
        if sum(sizes) != self.shape[dim]:
            raise ValueError(f"{list(sizes)} do not add up to dimension {dim} of {list(self.shape)}")
        begins = [sum(sizes[:i]) for i in range(len(sizes))]
        return [self.narrow(dim, begin, size) for begin, size in zip(begins, sizes, strict=True)]

    @staticmethod
    def cat(layouts: Sequence[Layout], dim: int) -> Layout:
        """The layouts one after the other along a dimension."""
        if not layouts:
            raise ValueError("there is nothing to concatenate")
        first = layouts[0].shape
        dim = _axis(dim, len(first))
        at, blocks = 0, list[Block]()
        for layout in layouts:
            if len(layout.shape) != len(first) or _put(layout.shape, dim, 0) != _put(first, dim, 0):
                raise ValueError(f"{list(first)} and {list(layout.shape)} differ outside dimension {dim}")
            blocks += (b._replace(start=_put(b.start, dim, b.start[dim] + at)) for b in layout.blocks)
            at += layout.shape[dim]
        return Layout(_put(first, dim, at), _limited(blocks))

    @staticmethod
    def stack(layouts: Sequence[Layout], dim: int) -> Layout:
        """Equal layouts along a new dimension."""
        return Layout.cat([layout.add(dim) for layout in layouts], dim)

    def reshape(self, shape: Sequence[int]) -> Layout:
        """The same elements in row-major order under another shape; one size may be -1."""
        target = _resolve(shape, self.shape)
        layout: Layout = self
        # Walk both shapes; where their products meet, a run of old dimensions becomes a run of new ones.
        done = 0
        while done < len(layout.shape) or done < len(target):
            if done == len(target):
                layout = layout.drop(done)
            elif done == len(layout.shape):
                layout = layout.add(done)
                done += 1
            elif layout.shape[done] == target[done]:
                done += 1
            elif layout.shape[done] % target[done] == 0 and target[done]:
                layout = layout._divide(done, target[done])
                done += 1
            elif done + 1 < len(layout.shape):
                layout = layout._merge(done)
            else:
                raise ValueError(f"cannot view {list(self.shape)} as {list(target)}")
        return layout

    def _splice(self, dim: int, removed: int, added: int) -> Layout:
        """Dimensions of size 1 taken out or put in at `dim`."""

        def splice(values: tuple[int, ...], value: int) -> tuple[int, ...]:
            return (*values[:dim], *(value,) * added, *values[dim + removed :])

        blocks = tuple(
            b._replace(start=splice(b.start, 0), sizes=splice(b.sizes, 1), strides=splice(b.strides, 0))
            for b in self.blocks
        )
        return Layout(splice(self.shape, 1), blocks)

    def _merge(self, dim: int) -> Layout:
        """Dimensions `dim` and `dim + 1` as one. A block splits where its rows do not follow each other."""
        inner = self.shape[dim + 1]
        blocks: list[Block] = []
        for block in self.blocks:
            (rows, columns), (row_stride, stride) = block.sizes[dim : dim + 2], block.strides[dim : dim + 2]
            if rows == 1:
                runs = [(0, columns, stride)]
            elif columns == inner == 1:
                runs = [(0, rows, row_stride)]
            elif columns == inner and row_stride == stride * inner:
                runs = [(0, rows * columns, stride)]
            else:
                runs = [(row, columns, stride) for row in range(rows)]
            for row, size, step in runs:
                start = (block.start[dim] + row) * inner + block.start[dim + 1]
                blocks.append(
                    Block(
                        block.source,
                        block.offset + row * row_stride,
                        (*block.start[:dim], start, *block.start[dim + 2 :]),
                        (*block.sizes[:dim], size, *block.sizes[dim + 2 :]),
                        (*block.strides[:dim], step, *block.strides[dim + 2 :]),
                    )
                )
        shape = (*self.shape[:dim], self.shape[dim] * inner, *self.shape[dim + 2 :])
        return Layout(shape, _limited(blocks))

    def _divide(self, dim: int, outer: int) -> Layout:
        """Dimension `dim` as `outer` times what is left. A block splits at rows it covers only in part."""
        inner = self.shape[dim] // outer
        blocks: list[Block] = []
        for block in self.blocks:
            start, size, stride = block.start[dim], block.sizes[dim], block.strides[dim]
            for begin, end in _row_runs(start, start + size, inner):
                rows = max((end - begin) // inner, 1)
                blocks.append(
                    Block(
                        block.source,
                        block.offset + (begin - start) * stride,
                        (*block.start[:dim], begin // inner, begin % inner, *block.start[dim + 1 :]),
                        (*block.sizes[:dim], rows, (end - begin) // rows, *block.sizes[dim + 1 :]),
                        (*block.strides[:dim], stride * inner, stride, *block.strides[dim + 1 :]),
                    )
                )
        return Layout((*self.shape[:dim], outer, inner, *self.shape[dim + 1 :]), _limited(blocks))


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides in elements."""
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _row_runs(begin: int, end: int, width: int) -> list[tuple[int, int]]:
    """`begin:end` cut into a partial first row, whole rows, and a partial last row of `width`."""
    first_whole, last_whole = -(-begin // width) * width, end // width * width
    if first_whole >= last_whole:  # no whole row
        cuts = [begin, first_whole, end] if begin < first_whole < end else [begin, end]
    else:
        cuts = [begin, first_whole, last_whole, end]
    return [(a, b) for a, b in pairwise(cuts) if a < b]


def _axis(dim: int, ndim: int) -> int:
    """`dim` counted from the front. Raises IndexError outside."""
    if not -ndim <= dim < ndim:
        raise IndexError(f"index {dim} is out of range for {ndim}")
    return dim % ndim


def _put(values: tuple[int, ...], at: int, value: int) -> tuple[int, ...]:
    return (*values[:at], value, *values[at + 1 :])


def _limited(blocks: list[Block]) -> tuple[Block, ...]:
    if len(blocks) > MAX_BLOCKS:
        raise UnsupportedModelError(
            "unsupported layout: the checkpoint's order of elements breaks an expert parameter into "
            f"{len(blocks):,} pieces (at most {MAX_BLOCKS:,} are workable)"
        )
    return tuple(blocks)


def _resolve(shape: Sequence[int], old: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` with its -1, if any, worked out."""
    target = tuple(int(size) for size in shape)
    if -1 in target:
        rest = prod(size for size in target if size != -1)
        target = tuple(prod(old) // rest if size == -1 and rest else size for size in target)
    if prod(target) != prod(old) or min(target, default=1) < 0:
        raise ValueError(f"cannot view {list(old)} as {list(shape)}")
    return target
