"""Attention of few rows by the C kernels, against the definition in float64 and transformers' eager attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emoe.kernels.attention import FEW_ROWS, MANY_KEYS, MANY_SIZE, few_rows, many_rows, suits, suits_many
from emoe.kernels.choice import native_calls
from emoe.kernels.native.calls import Calls


@pytest.fixture(scope="module")
def calls() -> Calls:
    found = native_calls()
    if found is None:
        pytest.skip("there is no C compiler")
    return found


def defined(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """The definition, in float64, with the key heads repeated."""
    group = query.shape[1] // key.shape[1]
    q, k, v = query.double(), key.double().repeat_interleave(group, 1), value.double().repeat_interleave(group, 1)
    scores = q @ k.transpose(2, 3) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
        return (scores.softmax(-1)[..., :-1] @ v).transpose(1, 2)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@given(
    batch=st.integers(1, 3),
    key_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    rows=st.integers(1, FEW_ROWS),
    keys=st.integers(1, 70),
    sizes=st.tuples(st.integers(1, 140), st.integers(1, 140)),
    masked=st.sampled_from(["", "all heads", "each head", "added"]),
    scaling=st.sampled_from([None, 0.3]),
    spread=st.booleans(),
    sunk=st.booleans(),
    seed=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_values_and_bits(
    calls: Calls,
    batch: int,
    key_heads: int,
    group: int,
    rows: int,
    keys: int,
    sizes: tuple[int, int],
    masked: str,
    scaling: float | None,
    spread: bool,
    sunk: bool,
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
    sinks = torch.randn(key_heads * group).to(dtype) * 3 if sunk else None
    expected = defined(query, key, value, mask, sizes[0] ** -0.5 if scaling is None else scaling, sinks)
    if not spread:
        key, value = key.contiguous(), value.contiguous()
    assert suits(query, key, value, mask)
    out = few_rows(calls, query, key, value, mask, scaling, sinks)
    assert out.shape == (batch, rows, key_heads * group, sizes[1])
    assert out.dtype == dtype
    assert out.is_contiguous()
    # In bfloat16 one rounding, of the result.
    rtol, atol = (1e-4, 1e-5) if dtype is torch.float32 else (2**-8, 2**-12)
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol)
    last = None if mask is None else mask[:, :, -1:]
    assert torch.equal(few_rows(calls, query[:, :, -1:], key, value, last, scaling, sinks)[:, 0], out[:, -1])


@given(
    seen=st.integers(1, 40),
    hidden=st.integers(0, 40),
    group=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    threads=st.integers(1, 2),
)
def test_keys_that_are_hidden_change_no_bit(
    calls: Calls, seen: int, hidden: int, group: int, dtype: torch.dtype, threads: int
) -> None:
    torch.manual_seed(seen)
    query = torch.randn(1, 2 * group, 2, 24).to(dtype)
    key, value = (torch.randn(1, 2, seen + hidden, 24).to(dtype) for _ in range(2))
    mask = (torch.arange(seen + hidden) < seen).view(1, 1, 1, -1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = few_rows(calls, query, key, value, mask)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, few_rows(calls, query, key[:, :, :seen], value[:, :, :seen], None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_sees_nothing_gets_a_mean(calls: Calls, dtype: torch.dtype) -> None:
    query, key = torch.randn(1, 2, 2, 8).to(dtype), torch.randn(1, 2, 5, 8).to(dtype)
    mean = key.double().mean(dim=2)[:, None].expand(1, 2, 2, 8)
    for mask in (
        torch.zeros(1, 1, 2, 5, dtype=torch.bool),
        torch.full((1, 1, 2, 5), -torch.inf),
        torch.full((1, 1, 2, 5), torch.finfo(dtype).min, dtype=dtype),
    ):
        out = few_rows(calls, query, key, key, mask)
        torch.testing.assert_close(out.double(), mean, rtol=2**-7, atol=2**-10)
        assert not few_rows(calls, query, key, key, mask, sinks=torch.zeros(2)).any()


def test_what_suits() -> None:
    def shaped(
        rows: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        mask: torch.Tensor | None = None,
        device: str = "cpu",
        batch: int = 1,
        keys: int = 5,
    ) -> bool:
        query = torch.empty(batch, 8, rows, 64, dtype=dtype, device=device)
        key = torch.empty(1, 4, keys, 64, dtype=dtype, device=device)
        return suits(query, key, key, mask)

    mask = torch.ones(1, 1, 1, 5)
    assert shaped()
    assert shaped(FEW_ROWS, mask=mask)
    assert shaped(dtype=torch.float32, mask=mask.bool())
    assert not shaped(mask=mask[0])
    assert not shaped(mask=mask[..., 1:])
    assert not shaped(mask=mask.half())
    assert not shaped(mask=mask.expand(1, 3, 1, 5))
    assert not shaped(keys=0)
    assert not shaped(FEW_ROWS + 1)
    assert not shaped(0)
    assert not shaped(dtype=torch.float16)
    assert not shaped(device="meta")
    assert not shaped(batch=2)


@pytest.mark.parametrize("rows", [1, 3])
def test_transformers_eager_attention_gives_the_same(calls: Calls, rows: int) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import eager_attention_forward

    torch.manual_seed(1)
    module = torch.nn.Module().eval()
    module.num_key_value_groups = 4  # type: ignore[assignment]
    query = torch.randn(2, 8, rows, 64).bfloat16()
    key, value = torch.randn(2, 2, 300, 64).bfloat16(), torch.randn(2, 2, 300, 64).bfloat16()
    mask = torch.where(torch.rand(2, 1, rows, 300) < 0.5, 0.0, -torch.inf).bfloat16()
    theirs, _ = eager_attention_forward(module, query, key, value, mask, scaling=0.125)
    torch.testing.assert_close(few_rows(calls, query, key, value, mask, 0.125), theirs, rtol=2**-7, atol=2**-8)


@pytest.fixture(scope="module")
def knowing(calls: Calls) -> Calls:
    if not calls.knows_many:
        pytest.skip("this processor does not multiply bfloat16 in pairs, or has AMX")
    return calls


@given(
    batch=st.integers(1, 2),
    key_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    rows=st.integers(1, 40),
    before=st.integers(0, 70),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 140)),
    masked=st.sampled_from(["causal", "", "window", "some", "each head", "added"]),
    sunk=st.booleans(),
    seed=st.integers(0, 9),
)
def test_many_rows_are_right_and_each_has_its_own_bits(
    knowing: Calls,
    batch: int,
    key_heads: int,
    group: int,
    rows: int,
    before: int,
    sizes: tuple[int, int],
    masked: str,
    sunk: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    heads, size, value_size = key_heads * group, 2 * sizes[0], sizes[1]
    rows, keys = rows + FEW_ROWS, rows + FEW_ROWS + (0 if masked == "causal" else before)
    query = torch.randn(batch, rows, heads, size).bfloat16().transpose(1, 2)
    key, value = (torch.randn(batch, keys, key_heads, n).bfloat16().transpose(1, 2) for n in (size, value_size))
    tril = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)[None, None]
    shown = {
        "causal": tril,
        "": torch.ones_like(tril),
        "window": tril & ~tril.tril(keys - rows - 7),
        "each head": torch.rand(batch, heads, rows, keys) < 0.5,
    }.get(masked, torch.rand(batch, 1, rows, keys) < 0.3)
    shown = shown | torch.eye(rows, keys, dtype=torch.bool)
    mask = torch.where(shown, torch.randn(shown.shape), -torch.inf).bfloat16() if masked == "added" else shown
    sinks = torch.randn(heads) * 3 if sunk else None
    causal = masked == "causal"
    given_mask = None if masked in ("", "causal") else mask
    assert suits_many(knowing, query, key, value, given_mask, causal)
    out = many_rows(knowing, query, key, value, given_mask, None, sinks, causal=causal)
    expected = defined(query, key, value, mask, size**-0.5, sinks)
    # Weights are rounded to bfloat16 too: an error of 2^-9 of each value's share.
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=2**-8 * float(value.abs().max()))
    before_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(out, many_rows(knowing, query, key, value, given_mask, None, sinks, causal=causal))
    finally:
        torch.set_num_threads(before_threads)
    # The same from a mask, and of some of the rows.
    assert torch.equal(out, many_rows(knowing, query, key, value, mask, None, sinks))
    last = mask[:, :, -FEW_ROWS - 1 :]
    assert torch.equal(
        out[:, -FEW_ROWS - 1 :], many_rows(knowing, query[:, :, -FEW_ROWS - 1 :], key, value, last, None, sinks)
    )


@pytest.mark.parametrize(("batch", "key_heads", "group", "rows"), [(1, 1, 8, 203), (1, 3, 2, 300), (2, 1, 1, 400)])
@pytest.mark.parametrize("causal", [True, False])
def test_few_key_heads_are_shared_among_threads(
    knowing: Calls, batch: int, key_heads: int, group: int, rows: int, causal: bool
) -> None:
    """Parts of a key head's rows are units of their own: no bit of a row depends on how many there are."""
    torch.manual_seed(rows)
    query = torch.randn(batch, key_heads * group, rows, 16).bfloat16()
    key, value = (torch.randn(batch, key_heads, rows, size).bfloat16() for size in (16, 24))
    mask = None if causal else torch.ones(rows, rows, dtype=torch.bool).tril().triu(-40)[None, None]
    before = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            outs.append(many_rows(knowing, query, key, value, mask, causal=causal))
    finally:
        torch.set_num_threads(before)
    shown = torch.ones(rows, rows, dtype=torch.bool).tril()[None, None] if mask is None else mask
    expected = defined(query, key, value, shown, 0.25, None)
    torch.testing.assert_close(outs[0].double(), expected, rtol=2**-8, atol=2**-8 * float(value.abs().max()))
    assert all(torch.equal(outs[0], out) for out in outs[1:])


def test_of_many_rows_too_one_that_sees_nothing_gets_a_mean(knowing: Calls) -> None:
    query, key = torch.randn(1, 2, 20, 8).bfloat16(), torch.randn(1, 2, 50, 8).bfloat16()
    mean = key.double().mean(dim=2)
    for hidden in (torch.tensor(False), torch.tensor(-torch.inf), torch.tensor(torch.finfo(torch.bfloat16).min)):
        mask = (
            torch.zeros(1, 1, 20, 50, dtype=hidden.dtype)
            if hidden.is_floating_point()
            else torch.ones(1, 1, 20, 50) > 0
        )
        mask = mask.bfloat16() if hidden.is_floating_point() else mask
        mask[:, :, 3], mask[:, :, :, 40:] = hidden, hidden
        out = many_rows(knowing, query, key, key, mask)
        assert not out.isnan().any()
        torch.testing.assert_close(out[:, 3].double(), mean, rtol=2**-7, atol=2**-8)
        assert not many_rows(knowing, query, key, key, mask, sinks=torch.zeros(2))[:, 3].any()


def test_what_suits_many(knowing: Calls) -> None:
    def shaped(
        rows: int = 20, keys: int = 20, size: int = 64, values: int = 64, causal: bool = True, **kind: Any
    ) -> bool:
        query = torch.empty(1, 8, rows, size, **{"dtype": torch.bfloat16, **kind})
        key, value = (torch.empty(1, 4, keys, n, **{"dtype": torch.bfloat16, **kind}) for n in (size, values))
        return suits_many(knowing, query, key, value, None, causal)

    assert shaped() and shaped(keys=30, causal=False) and shaped(values=MANY_SIZE)
    assert not shaped(rows=FEW_ROWS, keys=FEW_ROWS)
    assert not shaped(keys=30)
    assert not shaped(size=63)
    assert not shaped(values=MANY_SIZE + 1)
    assert not shaped(keys=MANY_KEYS + 1, causal=False)
    assert not shaped(dtype=torch.float32)
    assert not shaped(device="meta")
