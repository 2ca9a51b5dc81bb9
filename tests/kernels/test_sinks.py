"""Attention with sinks over many rows, against the definition in float64 and transformers' eager attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emoe.kernels import sinks
from emoe.kernels.sinks import with_sinks
from emoe.planner.live_bytes import LiveBytes


def defined(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    sunk: torch.Tensor | None,
) -> torch.Tensor:
    """The definition, in float64, with the key heads repeated: what is hidden is far away, but not infinitely."""
    group = query.shape[1] // key.shape[1]
    q, k, v = query.double(), key.double().repeat_interleave(group, 1), value.double().repeat_interleave(group, 1)
    scores = q @ k.transpose(2, 3) * scaling
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -1e38)
    elif mask is not None:
        scores = (scores + mask.double()).masked_fill(mask <= torch.finfo(mask.dtype).min, -1e38)
    if sunk is None:
        return (scores.softmax(-1) @ v).transpose(1, 2)
    scores = torch.cat([scores, sunk.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return (scores.softmax(-1)[..., :-1] @ v).transpose(1, 2)


@given(
    batch=st.integers(1, 3),
    key_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    rows=st.integers(1, 20),
    keys=st.integers(1, 20),
    sizes=st.tuples(st.integers(1, 20), st.one_of(st.none(), st.integers(1, 20))),
    masked=st.sampled_from(["", "causal", "all heads", "each head", "added", "window"]),
    scaling=st.sampled_from([None, 0.3]),
    sunk=st.booleans(),
    step=st.sampled_from([3, 8, 256]),
    block=st.sampled_from([100, 1 << 24]),
    segment=st.sampled_from([3, 8192]),
    seed=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_values(
    batch: int,
    key_heads: int,
    group: int,
    rows: int,
    keys: int,
    sizes: tuple[int, int | None],
    masked: str,
    scaling: float | None,
    sunk: bool,
    step: int,
    block: int,
    segment: int,
    seed: int,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(seed)
    keys = rows if masked == "causal" else keys
    size, value_size = sizes[0], sizes[1] or sizes[0]
    heads = key_heads * group
    query = torch.randn(batch, rows, heads, size).to(dtype).transpose(1, 2)
    key, value = (torch.randn(batch, keys, key_heads, each).to(dtype).transpose(1, 2) for each in (size, value_size))
    seen = torch.arange(rows)[:, None] + keys - rows - torch.arange(keys)[None]
    mask = None
    if masked == "window":
        mask = ((seen >= 0) & (seen < 5)).expand(1, 1, rows, keys).clone()
    elif masked in ("all heads", "each head", "added"):
        mask = torch.rand(batch, heads if masked == "each head" else 1, rows, keys) < 0.7
        if masked == "added":
            mask = torch.where(mask, torch.randn(mask.shape), torch.finfo(dtype).min).to(dtype)
    if mask is not None and segment < keys and not sunk:
        mask[..., 0] = True if mask.dtype == torch.bool else 0.0  # every row sees one
    sink = torch.randn(heads).to(dtype) * 2 if sunk else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sinks, "ROWS", step)
        patch.setattr(sinks, "BLOCK_BYTES", block)
        patch.setattr(sinks, "PACKED_BYTES", block)
        patch.setattr(sinks, "KEYS", segment)
        out = with_sinks(query, key, value, mask, scaling, sink, masked == "causal")
    assert out.shape == (batch, rows, heads, value_size)
    assert out.dtype == dtype
    assert out.is_contiguous()
    full = (seen >= 0).expand(1, 1, rows, keys) if masked == "causal" else mask
    expected = defined(query, key, value, full, size**-0.5 if scaling is None else scaling, sink)
    rtol, atol = (1e-4, 1e-5) if dtype is torch.float32 else (2**-6, 2**-6)
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol)


def prompt(rows: int, window: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values, a mask: of a prompt, 16 heads over 4."""
    torch.manual_seed(3)
    query = torch.randn(1, rows, 16, 32).bfloat16().transpose(1, 2)
    key, value = torch.randn(2, 1, rows, 4, 32).bfloat16().transpose(2, 3)
    seen = torch.arange(rows)[:, None] - torch.arange(rows)[None]
    mask = (seen >= 0) & (seen < (window or rows))
    return query, key, value, mask[None, None]


@pytest.mark.parametrize("window", [None, 40])
def test_it_is_no_further_from_the_truth_than_transformers(window: int | None) -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    query, key, value, mask = prompt(300, window)
    module = torch.nn.Module().eval()
    module.num_key_value_groups = 4  # type: ignore[assignment]
    module.sinks = torch.nn.Parameter(torch.randn(16).bfloat16(), requires_grad=False)
    added = torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill_(~mask, torch.finfo(torch.bfloat16).min)
    theirs, _ = eager_attention_forward(module, query, key, value, added, scaling=0.2)
    ours = with_sinks(query, key, value, mask, 0.2, module.sinks)
    truth = defined(query, key, value, mask, 0.2, module.sinks)
    assert (ours - truth).pow(2).mean() < (theirs - truth).pow(2).mean()


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("causal", [True, False])
def test_no_scores_of_a_whole_prompt_are_held(window: int | None, causal: bool) -> None:
    query, key, value, mask = prompt(1024, window)
    with LiveBytes() as live:
        with_sinks(query, key, value, None if causal else mask, 0.2, torch.zeros(16), causal)
    assert live.peak < 16 * 1024 * 1024 * 2 / 8  # an eighth of one tensor of scores


def test_unequal_sizes_stay_in_their_block() -> None:
    query, key, value, mask = prompt(1024, None)
    with pytest.MonkeyPatch.context() as patch, LiveBytes() as live:
        patch.setattr(sinks, "BLOCK_BYTES", 1 << 20)
        with_sinks(query, key, value[..., :24], mask, 0.2, torch.zeros(16))
    assert live.peak < 4 * (1 << 20) + 2 * query.nbytes
