"""Layouts against torch: whatever rearrangement is made, the blocks must find the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe.checkpoint import layout as layout_module
from emoe.checkpoint.layout import Layout
from emoe.checkpoint.symbolic import SymbolicTensor
from emoe.errors import UnsupportedModelError


def materialise(layout: Layout, sources: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensor a layout describes; every element must be given exactly once."""
    result = torch.full(layout.shape, -1, dtype=torch.int64)
    for block in layout.blocks:
        box = tuple(slice(start, start + size) for start, size in zip(block.start, block.sizes, strict=True))
        region = result[box]
        assert region.shape == block.sizes
        assert bool((region == -1).all()), "two blocks overlap"
        region.copy_(sources[block.source].reshape(-1).as_strided(block.sizes, block.strides, block.offset))
    assert not bool((result == -1).any()), "an element is in no block"
    return result


def sources_of(shape: Sequence[int], count: int) -> tuple[list[torch.Tensor], list[Any]]:
    """`count` tensors with all different elements, and their symbolic twins."""
    real = [torch.arange(prod(shape)).reshape(tuple(shape)) + 100_000 * i for i in range(count)]
    twins = [SymbolicTensor.make(Layout.of_source(i, shape), torch.int64, f"s{i}") for i in range(count)]
    return real, twins


KINDS = ("transpose", "permute", "chunk", "split", "select", "unsqueeze", "squeeze", "slice", "reshape")


@st.composite
def operation(draw: st.DrawFn, shape: tuple[int, ...]) -> Callable[[Any], Any]:
    """A random rearrangement that fits a tensor of `shape`."""
    dims = st.integers(0, len(shape) - 1)
    kind, dim = draw(st.sampled_from(KINDS)), draw(dims)
    if kind == "transpose":
        other = draw(dims)
        return lambda t: t.transpose(dim, other).contiguous()
    if kind == "permute":
        order = draw(st.permutations(range(len(shape))))
        return lambda t: t.permute(*order)
    if kind == "chunk":
        parts, which = draw(st.integers(1, 3)), draw(st.integers(0, 2))
        return lambda t: (chunks := torch.chunk(t, parts, dim=dim))[which % len(chunks)]
    if kind == "split":
        size = draw(st.integers(1, shape[dim]))
        return lambda t: torch.split(t, size, dim=dim)[-1]
    if kind == "select" and len(shape) > 1:
        at = draw(st.integers(-shape[dim], shape[dim] - 1))
        return lambda t: t.select(dim, at)
    if kind == "unsqueeze":
        return lambda t: t.unsqueeze(dim - len(shape))
    if kind == "slice":
        begin = draw(st.integers(0, shape[dim] - 1))
        end = draw(st.integers(begin + 1, shape[dim]))
        return lambda t: t[(slice(None),) * dim + (slice(begin, end),)]
    if kind == "reshape":
        target = draw(st.permutations([*prime_factors(prod(shape)), 1]))
        return lambda t: t.reshape(target)
    return lambda t: t.squeeze(dim)


def prime_factors(number: int) -> list[int]:
    """Any order of these is a shape."""
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors


@settings(max_examples=200)
@given(data=st.data(), dims=st.lists(st.integers(1, 4), min_size=2, max_size=3), count=st.integers(1, 3))
def test_any_rearrangement_finds_the_numbers_torch_finds(data: st.DataObject, dims: list[int], count: int) -> None:
    real, twins = sources_of(dims, count)
    axis = data.draw(st.integers(0, len(dims) - 1))
    join: Callable[..., Any] = data.draw(st.sampled_from([torch.stack, torch.cat]))
    tensor, twin = join(real, dim=axis), join(twins, dim=axis)
    for _ in range(data.draw(st.integers(1, 5))):
        if tensor.ndim == 0:
            break
        change = data.draw(operation(tuple(tensor.shape)))
        tensor, twin = change(tensor), change(twin)
        assert isinstance(twin, SymbolicTensor)
        assert twin.shape == tensor.shape == twin.layout_.shape
    assert torch.equal(materialise(twin.layout_, real), tensor)


def test_fusing_gate_and_up_of_every_expert() -> None:
    def fuse(tensors: list[Any]) -> Any:
        return torch.cat([torch.stack(tensors[:4], dim=0), torch.stack(tensors[4:], dim=0)], dim=1)

    real, twins = sources_of((3, 5), 8)
    assert torch.equal(materialise(fuse(twins).layout_, real), fuse(real))
    assert len(fuse(twins).layout_.blocks) == 8


def test_deinterleaving_makes_two_blocks() -> None:
    def deinterleave(tensor: Any) -> Any:
        return tensor.reshape([4, 3, 2, 5]).transpose(1, 2).reshape(tensor.shape).contiguous()

    (real,), (twin,) = sources_of((4, 6, 5), 1)
    assert torch.equal(materialise(deinterleave(twin).layout_, [real]), deinterleave(real))
    assert len(deinterleave(twin).layout_.blocks) == 2


def test_unbind_and_indexing() -> None:
    (real,), (twin,) = sources_of((3, 4, 5), 1)
    picks: list[Callable[[Any], Any]] = [
        lambda t: t.unbind(1)[2],
        lambda t: t[1],
        lambda t: t[-1, ..., 2:4],
        lambda t: t[:, None, 1],
        lambda t: t.narrow(2, 1, 3),
        lambda t: t.view(-1),
        lambda t: t.to(t.dtype).clone(),
    ]
    for pick in picks:
        assert torch.equal(materialise(pick(twin).layout_, [real]), pick(real))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t + 1, "'add'"),
        (lambda t: t * t, "'mul'"),
        (lambda t: t.index_select(0, torch.tensor([0])), "'index_select'"),
        (lambda t: t.to(torch.float64), "casts torch.int64 to torch.float64"),
        (lambda t: t[::2], "indexes with slice(None, None, 2)"),
        (lambda t: torch.stack([t, torch.zeros(2, 3, dtype=torch.int64)]), "'stack'"),
    ],
)
def test_what_is_no_rearrangement_is_refused_by_name(change: Callable[[Any], Any], named: str) -> None:
    _, (twin,) = sources_of((2, 3), 1)
    with pytest.raises(UnsupportedModelError, match="unsupported layout") as caught:
        change(twin)
    assert named in str(caught.value)
    assert "'s0'" in str(caught.value)


def test_metadata_is_answered_like_a_tensors() -> None:
    _, (twin,) = sources_of((2, 3), 1)
    assert isinstance(twin, torch.Tensor)
    assert (twin.size(1), twin.dim(), twin.numel(), len(twin), twin.dtype) == (3, 2, 6, 2, torch.int64)


def test_impossible_views_are_errors() -> None:
    layout = Layout.of_source(0, (2, 3))
    with pytest.raises(ValueError, match=r"cannot view \[2, 3\] as \[4, 2\]"):
        layout.reshape((4, 2))
    with pytest.raises(ValueError, match="differ outside dimension 0"):
        Layout.cat([layout, Layout.of_source(1, (2, 4))], 0)
    with pytest.raises(IndexError):
        layout.select(0, 2)


def test_a_shuffle_of_single_elements_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "MAX_BLOCKS", 4)
    with pytest.raises(UnsupportedModelError, match="breaks an expert parameter into 6 pieces"):
        Layout.of_source(0, (6, 6)).transpose(0, 1).reshape((36,))
