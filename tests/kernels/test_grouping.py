"""A chunk's pairs as blocks of rows: every pair has one row of its token in its expert's block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emoe.kernels.grouping import Grouping, round_rows, rounds_rows

EXPERTS = 7


@given(st.integers(1, 100_000))
def test_rows_are_rounded_up_to_four_sizes_an_octave(n: int) -> None:
    rows = round_rows(n)
    assert n <= rows <= max(n, 1.25 * n) and round_rows(rows) == rows
    if n > 8:
        assert rows % (1 << ((rows - 1).bit_length() - 3)) == 0


@st.composite
def routes(draw: st.DrawFn) -> torch.Tensor:
    tokens, k = draw(st.integers(1, 40)), draw(st.integers(1, 3))
    of = st.integers(0, draw(st.integers(k - 1, EXPERTS - 1)))
    return torch.tensor([draw(st.lists(of, min_size=k, max_size=k, unique=True)) for _ in range(tokens)])


@given(routes(), st.booleans(), st.integers(0, EXPERTS))
def test_every_pair_has_a_row_of_its_own(ids: torch.Tensor, rounded: bool, cut: int) -> None:
    made = Grouping(ids, EXPERTS, rounded=rounded)
    counts = torch.bincount(ids.reshape(-1), minlength=EXPERTS).tolist()
    assert made.counts == {expert: n for expert, n in enumerate(counts) if n}
    assert list(made.blocks) == sorted(made.counts)
    assert made.blocks == {expert: round_rows(n) if rounded else n for expert, n in made.counts.items()}
    assert made.rows == len(made.gather) == sum(made.blocks.values())
    assert made.rows_each == made.rows / len(made.counts)
    begins, at = {}, 0
    for expert, rows in made.blocks.items():
        begins[expert], at = at, at + rows
    place = made.place.reshape(ids.shape)
    assert len(set(made.place.tolist())) == ids.numel()
    for token, chosen in enumerate(ids.tolist()):
        for choice, expert in enumerate(chosen):
            row = int(place[token, choice])
            assert int(made.gather[row]) == token
            assert begins[expert] <= row < begins[expert] + made.counts[expert]  # what pads comes after
    assert made.by_count() == sorted(made.counts, key=lambda expert: (-counts[expert], expert))
    some = list(made.blocks)[cut:] or list(made.blocks)[-1:]
    part = made.part(begins[some[0]], some)
    assert part.blocks == {expert: made.blocks[expert] for expert in some}
    assert part.counts == {expert: made.counts[expert] for expert in some}
    assert torch.equal(part.gather, made.gather[begins[some[0]] :])
    assert part.rows_each == made.rows_each  # the whole chunk's, so that a part is computed as the whole would be
    assert list(made.blocks) == sorted(made.counts) and made.rows == len(made.gather)  # the whole is as it was


@pytest.mark.parametrize(
    ("device", "dtype", "rounds"),
    [("cpu", "bfloat16", True), ("cpu", "float16", True), ("cpu", "float32", False), ("cuda", "bfloat16", False)],
)
def test_rows_are_rounded_where_products_go_through_onednn(device: str, dtype: str, rounds: bool) -> None:
    assert rounds_rows(torch.device(device), getattr(torch, dtype)) is rounds
