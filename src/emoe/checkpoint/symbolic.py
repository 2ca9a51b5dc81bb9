"""Tensors that hold no numbers, only where each number comes from.

transformers turns a checkpoint's tensors into a model's parameters with its own conversion operations (stack the
experts, concatenate gate and up, de-interleave, transpose). emoe runs those very operations once, on symbolic
tensors, and reads from the result which bytes of which file make up one expert. So no table of layouts is kept
here, and a new family needs no code.

`Layout` is the arithmetic, in plain integers. `SymbolicTensor` is the dress it wears to pass through torch functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch

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

        blocks = tuple(b._replace(start=pick(b.start), sizes=pick(b.sizes), strides=pick(b.strides)) for b in self.blocks)
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
    return [(a, b) for a, b in zip(cuts, cuts[1:], strict=False) if a < b]


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
            f"unsupported layout: the checkpoint's order of elements breaks an expert parameter into {len(blocks):,} "
            f"pieces (at most {MAX_BLOCKS:,} are workable)"
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


class SymbolicTensor(torch.Tensor):
    """A meta tensor that carries its `layout` through the torch functions conversions use.

    A subclass of torch.Tensor, because conversion operations ask `isinstance(x, torch.Tensor)`. Any function that
    is not a rearrangement of elements raises UnsupportedModelError.
    """

    layout_: Layout
    label: str

    @staticmethod
    def make(layout: Layout, dtype: torch.dtype, label: str) -> SymbolicTensor:
        """A symbolic tensor; `label` names it in errors."""
        tensor = torch.empty(layout.shape, dtype=dtype, device="meta").as_subclass(SymbolicTensor)
        tensor.layout_, tensor.label = layout, label
        return tensor

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Answer a torch function from the layouts."""
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        rule = _RULES.get(name)
        first = args[0] if args else next(iter((kwargs or {}).values()), None)
        given = list(first) if isinstance(first, list | tuple) else [first]
        if rule is None or not all(isinstance(tensor, SymbolicTensor) for tensor in given):
            raise UnsupportedModelError(
                f"unsupported layout: the conversion of {_labels(given)} uses torch function {name!r}, which is not a "
                "rearrangement of stored numbers that emoe can read per expert"
            )
        dtypes = {tensor.dtype for tensor in given}
        if len(dtypes) > 1:
            raise UnsupportedModelError(f"unsupported layout: {_labels(given)} mix dtypes {dtypes}")

        def wrap(layout: Layout) -> SymbolicTensor:
            return SymbolicTensor.make(layout, given[0].dtype, given[0].label)

        result = rule(*args, **(kwargs or {}))
        return wrap(result) if isinstance(result, Layout) else tuple(wrap(layout) for layout in result)

    def __repr__(self, *, tensor_contents: None = None) -> str:
        return f"SymbolicTensor({self.label!r}, shape={self.layout_.shape}, blocks={len(self.layout_.blocks)})"


def _labels(tensors: Sequence[Any]) -> str:
    return repr(next((tensor.label for tensor in tensors if isinstance(tensor, SymbolicTensor)), "a tensor"))


# What may be asked of a symbolic tensor without touching its elements.
_METADATA: frozenset[Any] = frozenset(
    {
        torch.Tensor.shape.__get__,
        torch.Tensor.dtype.__get__,
        torch.Tensor.device.__get__,
        torch.Tensor.ndim.__get__,
        torch.Tensor.requires_grad.__get__,
        torch.Tensor.size,
        torch.Tensor.dim,
        torch.Tensor.numel,
        torch.Tensor.nelement,
        torch.Tensor.element_size,
        torch.Tensor.is_floating_point,
        torch.Tensor.is_complex,
        torch.Tensor.__len__,
        torch.is_floating_point,
        torch.numel,
    }
)


def _same(tensor: SymbolicTensor, *_: Any, **__: Any) -> Layout:
    return tensor.layout_


def _to(tensor: SymbolicTensor, *args: Any, **kwargs: Any) -> Layout:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            value = value.dtype
        if isinstance(value, torch.dtype) and value != tensor.dtype:
            raise UnsupportedModelError(
                f"unsupported layout: the conversion of {tensor.label!r} casts {tensor.dtype} to {value}"
            )
    return tensor.layout_


def _sizes(first: Any, rest: tuple[int, ...]) -> Sequence[int]:
    """A shape given as one sequence or as several numbers."""
    return (first, *rest) if isinstance(first, int) else tuple(first)


def _split(tensor: SymbolicTensor, split_size: int | Sequence[int], dim: int = 0) -> list[Layout]:
    length = tensor.layout_.shape[dim]
    if isinstance(split_size, int):
        split_size = [min(split_size, length - begin) for begin in range(0, length, split_size)]
    return tensor.layout_.split(split_size, dim)


def _chunk(tensor: SymbolicTensor, chunks: int, dim: int = 0) -> list[Layout]:
    return _split(tensor, -(-tensor.layout_.shape[dim] // chunks), dim)


def _unbind(tensor: SymbolicTensor, dim: int = 0) -> list[Layout]:
    return [tensor.layout_.select(dim, index) for index in range(tensor.layout_.shape[dim])]


def _squeeze(tensor: SymbolicTensor, dim: int | None = None) -> Layout:
    layout = tensor.layout_
    if dim is not None:
        return layout.drop(dim) if layout.shape[dim] == 1 else layout
    for axis in reversed(range(len(layout.shape))):
        layout = layout.drop(axis) if layout.shape[axis] == 1 else layout
    return layout


def _getitem(tensor: SymbolicTensor, key: Any) -> Layout:
    layout, dim = tensor.layout_, 0
    keys = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in keys:
        at = keys.index(Ellipsis)
        used = sum(part is not None and part is not Ellipsis for part in keys)
        keys[at : at + 1] = [slice(None)] * (len(layout.shape) - used)
    for part in keys:
        if part is None:
            layout, dim = layout.add(dim), dim + 1
        elif isinstance(part, int):
            layout = layout.select(dim, part)
        elif isinstance(part, slice) and part.step in (None, 1):
            begin, end, _ = part.indices(layout.shape[dim])
            layout, dim = layout.narrow(dim, begin, max(end - begin, 0)), dim + 1
        else:
            raise UnsupportedModelError(
                f"unsupported layout: the conversion of {tensor.label!r} indexes with {part!r}"
            )
    return layout


_RULES: dict[str, Callable[..., Layout | list[Layout]]] = {
    "contiguous": _same,
    "clone": _same,
    "detach": _same,
    "to": _to,
    "stack": lambda tensors, dim=0: Layout.stack([tensor.layout_ for tensor in tensors], dim),
    **dict.fromkeys(
        ("cat", "concat", "concatenate"),
        lambda tensors, dim=0: Layout.cat([tensor.layout_ for tensor in tensors], dim),
    ),
    **dict.fromkeys(("transpose", "swapaxes"), lambda tensor, dim0, dim1: tensor.layout_.transpose(dim0, dim1)),
    "permute": lambda tensor, dims, *rest: tensor.layout_.permute(_sizes(dims, rest)),
    "reshape": lambda tensor, shape, *rest: tensor.layout_.reshape(_sizes(shape, rest)),
    "view": lambda tensor, shape, *rest: tensor.layout_.reshape(_sizes(shape, rest)),
    "narrow": lambda tensor, dim, start, length: tensor.layout_.narrow(dim, start, length),
    "select": lambda tensor, dim, index: tensor.layout_.select(dim, index),
    "unsqueeze": lambda tensor, dim: tensor.layout_.add(dim),
    "squeeze": _squeeze,
    "split": _split,
    "chunk": _chunk,
    "unbind": _unbind,
    "__getitem__": _getitem,
}
