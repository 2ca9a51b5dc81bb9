"""The weighted sum of what experts give, against a loop; the memory that it is computed in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emoe.kernels import combining
from emoe.kernels.combining import Workspace, combine

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(tokens=st.integers(0, 11), k=st.integers(1, 3), placed=st.booleans(), seed=st.integers(0, 999))
def test_each_tokens_rows_are_weighted_and_added_in_the_routers_order(
    dtype: torch.dtype, tokens: int, k: int, placed: bool, seed: int
) -> None:
    """Four tokens at once; gates of float32 make the products float32, whatever the rows are."""
    generator = torch.Generator().manual_seed(seed)
    rows = tokens * k + 2 * placed
    outer = torch.randn(rows, 5, generator=generator).to(dtype)
    gates = torch.rand(tokens, k, generator=generator)
    place = torch.randperm(rows, generator=generator)[: tokens * k] if placed else None
    workspace = Workspace()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(combining, "COMBINE_TOKENS", 4)
        found = combine(outer, gates, dtype, place, workspace)
        again = combine(outer, gates, dtype, place)
    assert found.dtype == dtype and torch.equal(found, again)
    order = torch.arange(tokens * k) if place is None else place
    for token in range(tokens):
        wanted = torch.zeros(5)
        for choice in range(k):
            wanted = wanted + outer[order[token * k + choice]].float() * gates[token, choice]
        assert torch.equal(found[token], wanted.to(dtype))


def test_memory_is_kept_by_name_and_kind_while_it_is_large_enough() -> None:
    workspace = Workspace()
    first = workspace.rows("a", 4, 6, torch.float32, CPU)
    assert workspace.rows("a", 3, 8, torch.float32, CPU).data_ptr() == first.data_ptr()
    assert workspace.rows("a", 2, 2, torch.float32, CPU).shape == (2, 2)
    others = [workspace.rows("b", 4, 6, torch.float32, CPU), workspace.rows("a", 4, 6, torch.bfloat16, CPU)]
    assert len({each.data_ptr() for each in (first, *others)}) == 3
    with torch.inference_mode():
        larger = workspace.rows("a", 5, 6, torch.float32, CPU)
    larger.fill_(1.0)  # also outside inference mode
    assert workspace.rows("a", 4, 6, torch.float32, CPU).data_ptr() == larger.data_ptr()


def test_more_than_is_kept_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace()
    held = [workspace.rows(name, 4, 4, torch.float32, CPU) for name in "ab"]
    monkeypatch.setattr(combining, "WORKSPACE_KEPT_BYTES", sum(each.nbytes for each in held))
    workspace.trim()
    assert workspace.rows("a", 4, 4, torch.float32, CPU).data_ptr() == held[0].data_ptr()
    monkeypatch.setattr(combining, "WORKSPACE_KEPT_BYTES", sum(each.nbytes for each in held) - 1)
    workspace.trim()
    assert workspace.rows("a", 4, 4, torch.float32, CPU).data_ptr() != held[0].data_ptr()
