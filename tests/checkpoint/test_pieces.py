"""Recipes: whatever the layout, each expert's steps rebuild it, and what is called exact is one run of bytes."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emoe.checkpoint.layout import Layout
from emoe.checkpoint.pieces import recipe
from emoe.errors import UnsupportedModelError
from tests.checkpoint.test_layout import materialise

SHAPE = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))


def check(layout: Layout, sources: list[torch.Tensor]) -> None:
    """Rebuild every expert from its steps."""
    whole = materialise(layout, sources)
    for expert, steps in enumerate(recipe(layout, "a parameter")):
        part = torch.full(layout.shape[1:], -1, dtype=torch.int64)
        for step in steps:
            end = step.span_start + step.span_length
            span = sources[step.source].reshape(-1)[step.span_start : end].clone()
            region = part[step.dst_index]
            assert bool((region == -1).all())
            region.copy_(span.as_strided(step.shape, step.src_strides, step.src_offset))
            if step.exact:
                flat = part.view(-1)
                start = int((flat == span[0]).nonzero()[0])
                assert torch.equal(flat[start : start + span.numel()], span)
        assert torch.equal(part, whole[expert])


def tensors(shape: tuple[int, ...], count: int) -> list[torch.Tensor]:
    return [torch.arange(prod(shape)).reshape(shape) + 1000 * i for i in range(count)]


@given(shape=SHAPE, along=st.sampled_from([1, 2]), swap=st.booleans())
def test_gate_and_up_of_each_expert(shape: tuple[int, int, int], along: int, swap: bool) -> None:
    """Two tensors per expert, joined along rows or along columns, transposed or not."""
    experts, *matrix = shape
    sources = tensors(tuple(matrix), 2 * experts)
    layouts = [Layout.of_source(i, matrix) for i in range(2 * experts)]
    joined = Layout.cat([Layout.stack(layouts[:experts], 0), Layout.stack(layouts[experts:], 0)], along)
    check(joined.transpose(1, 2) if swap else joined, sources)


@given(shape=SHAPE, swap=st.booleans(), interleave=st.sampled_from([0, 1, 2]))
def test_fused_tensors(shape: tuple[int, int, int], swap: bool, interleave: int) -> None:
    experts, rows, columns = shape
    layout = Layout.of_source(0, (experts, 2 * rows, 2 * columns))
    if interleave:
        half = layout.shape[interleave] // 2
        split = (*layout.shape[:interleave], half, 2, *layout.shape[interleave + 1 :])
        layout = layout.reshape(split).transpose(interleave, interleave + 1).reshape(layout.shape)
    check(layout.transpose(1, 2) if swap else layout, tensors((experts, 2 * rows, 2 * columns), 1))


def test_what_can_be_read_straight_into_place() -> None:
    gate, up = Layout.of_source(0, (4, 3, 5)), Layout.of_source(1, (4, 3, 5))
    by_rows = recipe(Layout.cat([gate, up], 1), "p")
    assert [step.exact for step in by_rows[2]] == [True, True]
    by_columns = recipe(Layout.cat([gate, up], 2), "p")
    assert [step.exact for step in by_columns[2]] == [False, False]
    transposed = recipe(gate.transpose(1, 2), "p")
    assert [(step.exact, step.span_start, step.span_length) for step in transposed[2]] == [(False, 30, 15)]


def test_experts_across_a_tensor_are_not_read_with_all_the_others() -> None:
    experts_last = Layout.of_source(0, (32, 24, 8)).permute((2, 0, 1))
    with pytest.raises(UnsupportedModelError, match="is 768 numbers spread over 6,137 of the checkpoint's tensor"):
        recipe(experts_last, "model.layers.0.mlp.experts.down_proj")
