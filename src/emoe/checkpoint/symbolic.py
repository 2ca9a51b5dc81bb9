"""Tensors that hold no numbers, only where each number comes from.

transformers turns a checkpoint's tensors into a model's parameters with its own conversion operations (stack
the experts, concatenate gate and up, de-interleave, transpose). emoe runs those very operations once, on
symbolic tensors, and reads from the result which bytes of which file make up one expert. So no table of
layouts is kept here, and a new family needs no code.

The arithmetic is `Layout`; a `SymbolicTensor` is the dress it wears to pass through torch functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from emoe.checkpoint.layout import Layout
from emoe.errors import UnsupportedModelError


class SymbolicTensor(torch.Tensor):
    """A meta tensor that carries its `layout` through the torch functions conversions use.

    A subclass of torch.Tensor, because conversion operations ask `isinstance(x, torch.Tensor)`. Any function
    that is not a rearrangement of elements raises UnsupportedModelError.
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
        tensors = [tensor for tensor in given if isinstance(tensor, SymbolicTensor)]
        if rule is None or not tensors or len(tensors) != len(given):
            raise UnsupportedModelError(
                f"unsupported layout: the conversion of {_labels(given)} uses torch function {name!r}, which "
                "is not a rearrangement of stored numbers that emoe can read per expert"
            )
        dtypes = {tensor.dtype for tensor in tensors}
        if len(dtypes) > 1:
            raise UnsupportedModelError(f"unsupported layout: {_labels(given)} mix dtypes {dtypes}")

        def wrap(layout: Layout) -> SymbolicTensor:
            return SymbolicTensor.make(layout, tensors[0].dtype, tensors[0].label)

        result = rule(*args, **(kwargs or {}))
        return wrap(result) if isinstance(result, Layout) else tuple(wrap(layout) for layout in result)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"SymbolicTensor({self.label!r}, shape={self.layout_.shape}, blocks={len(self.layout_.blocks)})"


def _labels(tensors: Sequence[Any]) -> str:
    return repr(next((tensor.label for tensor in tensors if isinstance(tensor, SymbolicTensor)), "a tensor"))


# What may be asked of a symbolic tensor without touching its elements.
_METADATA: frozenset[Any] = frozenset(
    {
        torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
        torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
        torch.Tensor.device.__get__,
        torch.Tensor.ndim.__get__,  # type: ignore[attr-defined]
        torch.Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
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
        dtype = value.dtype if isinstance(value, torch.Tensor) else value
        if isinstance(dtype, torch.dtype) and dtype != tensor.dtype:
            raise UnsupportedModelError(
                f"unsupported layout: the conversion of {tensor.label!r} casts {tensor.dtype} to {dtype}"
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
            raise UnsupportedModelError(f"unsupported layout: the conversion of {tensor.label!r} indexes with {part!r}")
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
