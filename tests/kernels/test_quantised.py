"""Quantised matrices: what they hold is what the format says, and products are the plain formula's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emoe.errors import UnsupportedModelError
from emoe.kernels import quantised
from emoe.kernels.quantised import GROUP, QuantisedMatrix, many_rows, matvec


def random_matrix(bits: int, columns: int, rows: int, seed: int) -> tuple[QuantisedMatrix, torch.Tensor]:
    """A random quantised matrix and the float64 [out, in] values it stands for, made one by one."""
    generator = torch.Generator().manual_seed(seed)
    if bits == 8:
        packed = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
        scale = torch.rand(rows, generator=generator) * 0.01
        return QuantisedMatrix(packed, scale), packed.double() * scale.double()[:, None]
    packed = torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(rows, columns // GROUP, generator=generator) * 0.1).half()
    values = torch.empty(rows, columns, dtype=torch.float64)
    for column in range(columns):
        byte = packed[:, column // 2].int()
        nibble = byte // 16 if column % 2 else byte % 16
        values[:, column] = (nibble - 8) * scale[:, column // GROUP].double()
    return QuantisedMatrix(packed, scale), values


@given(
    bits=st.sampled_from([8, 4]),
    groups=st.integers(1, 5),
    rows=st.integers(1, 40),
    tokens=st.integers(1, 10),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10**6),
)
def test_products_are_integers_times_scales_times_x(
    bits: int, groups: int, rows: int, tokens: int, biased: bool, dtype: torch.dtype, seed: int
) -> None:
    weight, values = random_matrix(bits, groups * GROUP, rows, seed)
    assert weight.shape == (groups * GROUP, rows)
    assert torch.equal(weight.values(torch.float32), values.float())
    x = torch.randn(tokens, groups * GROUP, generator=torch.Generator().manual_seed(seed)).to(dtype)
    bias = torch.randn(rows).to(dtype) if biased else None
    expected = x.double() @ values.t() + (0.0 if bias is None else bias.double())
    out = matvec(x, weight, bias)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype is torch.float32 else 2**-8
    scale = float((x.double().abs() @ values.abs().t()).max())
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=1e-6 * scale)


@given(
    bits=st.sampled_from([8, 4]),
    rows=st.integers(1, 40),
    each=st.integers(1, 41),
    tokens=st.integers(9, 40),
    biased=st.booleans(),
    hooked=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10**6),
)
def test_many_rows_are_multiplied_block_by_block(
    bits: int, rows: int, each: int, tokens: int, biased: bool, hooked: bool, dtype: torch.dtype, seed: int
) -> None:
    weight, values = random_matrix(bits, 64, rows, seed)
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)
    bias = torch.randn(rows).to(dtype) if biased else None
    out = torch.full((tokens, rows), torch.nan, dtype=dtype)
    asked: list[slice] = []

    def unpack(some: slice, into: torch.Tensor) -> None:
        asked.append(some)
        weight.unpack(some, into)

    def multiply(x: torch.Tensor, plain: torch.Tensor, bias: torch.Tensor | None, into: torch.Tensor) -> None:
        assert into.is_contiguous()
        into.copy_(x @ plain if bias is None else torch.addmm(bias, x, plain))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantised, "MULTIPLIED", each * 64)
        many_rows(x, weight, bias, out, unpack, multiply if hooked else None)
    assert [row for some in asked for row in range(some.start, some.stop)] == list(range(rows))
    assert max(some.stop - some.start for some in asked) <= each
    stored = values.to(dtype).double()
    expected = x.double() @ stored.t() + (0.0 if bias is None else bias.double())
    tolerance = 1e-5 if dtype is torch.float32 else 2**-7
    scale = float((x.double().abs() @ stored.abs().t()).max())
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=1e-5 * scale)


@pytest.mark.parametrize(
    ("packed", "scale"),
    [
        (torch.zeros(4, 32, dtype=torch.int8), torch.zeros(5)),
        (torch.zeros(4, 32, dtype=torch.int8), torch.zeros(4).half()),
        (torch.zeros(4, 32, dtype=torch.int16), torch.zeros(4)),
        (torch.zeros(4, 15, dtype=torch.uint8), torch.zeros(4, 1).half()),
        (torch.zeros(4, 16, dtype=torch.uint8), torch.zeros(4, 2).half()),
    ],
)
def test_another_format_is_refused(packed: torch.Tensor, scale: torch.Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match="the kernels know int8"):
        QuantisedMatrix(packed, scale)
