"""Attention of few rows by two products, against the definition in float64 and transformers' eager attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emoe.kernels.attention import FEW_ROWS, LEAST, LEAST_MASKED, few_rows, suits


def defined(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """The definition, in float64, with the key heads repeated."""
    group = query.shape[1] // key.shape[1]
    q, k, v = query.double(), key.double().repeat_interleave(group, 1), value.double().repeat_interleave(group, 1)
    scores = q @ k.transpose(2, 3) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1) @ v).transpose(1, 2)


@given(
    batch=st.integers(1, 3),
    key_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    rows=st.integers(1, FEW_ROWS),
    keys=st.integers(1, 70),
    sizes=st.tuples(st.integers(1, 33), st.integers(1, 33)),
    masked=st.sampled_from(["", "all heads", "each head", "added"]),
    scaling=st.sampled_from([None, 0.3]),
    spread=st.booleans(),
    seed=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_values(
    batch: int,
    key_heads: int,
    group: int,
    rows: int,
    keys: int,
    sizes: tuple[int, int],
    masked: str,
    scaling: float | None,
    spread: bool,
    seed: int,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(seed)
    query = torch.randn(batch, key_heads * group, rows, sizes[0]).to(dtype)
    key, value = (torch.randn(batch, keys, key_heads, size).to(dtype).transpose(1, 2) for size in sizes)
    mask = None
    if masked:
        mask = torch.rand(batch, key_heads * group if masked == "each head" else 1, rows, keys) < 0.7
        mask[..., 0] = True
        if masked == "added":
            mask = torch.where(mask, torch.randn(mask.shape), -torch.inf).to(dtype)
    expected = defined(query, key, value, mask, sizes[0] ** -0.5 if scaling is None else scaling)
    if not spread:
        key, value = key.contiguous(), value.contiguous()
    out = few_rows(query, key, value, mask, scaling)
    assert out.shape == (batch, rows, key_heads * group, sizes[1])
    assert out.dtype == dtype
    assert out.is_contiguous()
    # Scores of up to 16 are rounded to 8 bits, and so are weights and values of up to 4.
    rtol, atol = (1e-5, 1e-5) if dtype is torch.float32 else (2**-7, 2**-5)
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol)


def test_a_row_that_sees_nothing_is_a_number() -> None:
    query, key = torch.randn(1, 2, 2, 8), torch.randn(1, 2, 5, 8)
    hidden = torch.zeros(1, 1, 2, 5, dtype=torch.bool)
    assert few_rows(query, key, key, hidden).isfinite().all()
    assert few_rows(query, key, key, torch.full((1, 1, 2, 5), -torch.inf)).isfinite().all()


def test_what_suits() -> None:
    def shaped(
        keys: int,
        rows: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        mask: torch.Tensor | None = None,
        device: str = "cpu",
        batch: int = 1,
    ) -> bool:
        query = torch.empty(batch, 8, rows, 64, dtype=dtype, device=device)
        return suits(query, torch.empty(1, 4, keys, 64, dtype=dtype, device=device), mask)

    mask = torch.ones(1, 1, 1, 1)
    plain, masked = LEAST // 64 // 8, LEAST_MASKED // 64 // 4
    assert shaped(plain)
    assert not shaped(plain - 1)
    assert shaped(masked, FEW_ROWS, mask=mask)
    assert not shaped(masked - 1, FEW_ROWS, mask=mask)
    assert not shaped(masked, mask=mask[0])
    assert not shaped(masked, FEW_ROWS + 1)
    assert not shaped(masked, 0)
    assert not shaped(masked, dtype=torch.float32)
    assert not shaped(masked, dtype=torch.float16)
    assert not shaped(masked, device="meta")
    assert not shaped(masked, batch=2)


@pytest.mark.parametrize("rows", [1, 3])
def test_transformers_eager_attention_gives_the_same(rows: int) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import eager_attention_forward

    torch.manual_seed(1)
    module = torch.nn.Module().eval()
    module.num_key_value_groups = 4  # type: ignore[assignment]
    query = torch.randn(2, 8, rows, 64).bfloat16()
    key, value = torch.randn(2, 2, 300, 64).bfloat16(), torch.randn(2, 2, 300, 64).bfloat16()
    mask = torch.where(torch.rand(2, 1, rows, 300) < 0.5, 0.0, -torch.inf).bfloat16()
    theirs, _ = eager_attention_forward(module, query, key, value, mask, scaling=0.125)
    torch.testing.assert_close(few_rows(query, key, value, mask, 0.125), theirs, rtol=2**-7, atol=2**-8)
