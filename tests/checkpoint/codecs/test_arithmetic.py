"""Quantised matrices: the stated formats, the stated error bounds, and better than the plain way."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emoe.checkpoint.codecs.arithmetic import decode_int4, decode_int8, encode_int4, encode_int8
from emoe.checkpoint.codecs.formats import CODECS, EXPERT_DTYPES, GROUP, codec_of, coded_parts
from emoe.checkpoint.parts import PartSpec
from emoe.errors import CheckpointError, UnsupportedModelError, UsageError
from emoe.kernels.quantised import QuantisedMatrix

KINDS = ("normal", "heavy", "sparse", "one sign", "tiny", "huge", "zero")


def matrix_of(kind: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    if kind == "heavy":
        values = values**5
    elif kind == "sparse":
        values = values * (torch.rand(rows, columns, generator=generator) < 0.05)
    elif kind == "one sign":
        values = values.abs()
    elif kind == "tiny":
        values = values * 1e-7
    elif kind == "huge":
        values = values * 3e4
    elif kind == "zero":
        values = values * 0
    return values


@given(st.sampled_from(KINDS), st.integers(1, 9), st.integers(1, 70), st.integers(0, 10**6))
def test_int8_is_off_by_half_a_step_at_most(kind: str, rows: int, columns: int, seed: int) -> None:
    values = matrix_of(kind, rows, columns, seed)
    packed, scale = encode_int8(values)
    assert (packed.dtype, scale.dtype) == (torch.int8, torch.float32)
    for row in range(rows):
        largest = max(abs(float(v)) for v in values[row])
        assert float(scale[row]) == pytest.approx(largest / 127)
        for column in range(columns):  # the format, number by number
            stands_for = int(packed[row, column]) * float(scale[row])
            assert abs(stands_for - float(values[row, column])) <= float(scale[row]) * 0.5001 + 1e-38
            assert float(decode_int8(packed, scale)[row, column]) == pytest.approx(stands_for, rel=1e-6)


@given(st.sampled_from(KINDS), st.integers(1, 6), st.integers(1, 4), st.integers(0, 10**6))
def test_int4_holds_what_the_format_says_within_the_bound(kind: str, rows: int, groups: int, seed: int) -> None:
    values = matrix_of(kind, rows, groups * GROUP, seed)
    packed, scale = encode_int4(values)
    assert (packed.dtype, packed.shape) == (torch.uint8, (rows, groups * GROUP // 2))
    assert (scale.dtype, scale.shape) == (torch.float16, (rows, groups))
    decoded = decode_int4(packed, scale)
    for row in range(rows):
        for group in range(groups):
            squares = 0.0
            numbers = values[row, group * GROUP : (group + 1) * GROUP]
            for at, number in enumerate(numbers.tolist()):
                column = group * GROUP + at
                byte = int(packed[row, column // 2])
                nibble = byte >> 4 if column % 2 else byte & 15
                stands_for = (nibble - 8) * float(scale[row, group])
                assert float(decoded[row, column]) == stands_for
                squares += (stands_for - number) ** 2
            largest = float(numbers.abs().max())
            # The stated bound, float16's rounding of the scale, and what it cannot hold.
            assert math.sqrt(squares / GROUP) <= largest / 13.58 + largest * 2**-9 + 8 * 2**-25


@given(st.sampled_from(("normal", "heavy", "one sign")), st.integers(0, 10**6))
def test_int4_leaves_less_error_than_the_largest_number_to_seven(kind: str, seed: int) -> None:
    values = matrix_of(kind, 64, 8 * GROUP, seed)
    groups = values.view(64, 8, GROUP)
    step = groups.abs().amax(-1, keepdim=True) / 7
    plain = (groups / step).round().clamp(-8, 7) * step
    chosen = decode_int4(*encode_int4(values))
    assert (chosen - values).square().sum() < 0.9 * (plain - groups).square().sum()


@given(st.integers(0, 10**6))
def test_int4_hardly_shortens_products(seed: int) -> None:
    """Least squares alone takes 0.7 % off the weights' length along themselves."""
    values = matrix_of("normal", 64, 8 * GROUP, seed)
    decoded = decode_int4(*encode_int4(values))
    assert float((decoded * values).sum() / values.square().sum()) == pytest.approx(1, abs=0.004)


@pytest.mark.parametrize("name", sorted(CODECS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_read_what_codecs_write(name: str, dtype: torch.dtype) -> None:
    codec = CODECS[name]
    values = matrix_of("normal", 300, 256, seed=5).to(dtype)
    before = values.clone()
    parts = codec.encode(values.t().contiguous().t())  # as the transposed families give it
    assert torch.equal(values, before)
    specs = codec.matrix_parts("down_proj", 300, 256)
    assert [spec.name for spec in specs] == ["down_proj", "down_proj_scale"]
    assert [(spec.shape, spec.dtype) for spec in specs] == [(tuple(p.shape), str(p.dtype)[6:]) for p in parts]
    assert [spec.nbytes for spec in specs] == [p.nbytes for p in parts]
    assert torch.equal(QuantisedMatrix(*parts).values(torch.float32), codec.decode(*parts))


@pytest.mark.parametrize("name", sorted(CODECS))
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused(name: str, bad: float) -> None:
    values = torch.ones(3, GROUP)
    values[1, 7] = bad
    with pytest.raises(CheckpointError, match="finite and at most"):
        CODECS[name].encode(values)


def test_int4_refuses_what_its_scales_cannot_hold() -> None:
    with pytest.raises(CheckpointError, match="500000"):
        encode_int4(torch.full((1, GROUP), 5e5))


def test_int4_refuses_inputs_that_groups_do_not_divide() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'down_proj' has 24 inputs.*int8"):
        CODECS["int4"].matrix_parts("down_proj", 32, 24)


def test_rows_are_outputs_in_either_orientation() -> None:
    parts = (PartSpec("up_proj", (64, 96), "bfloat16"), PartSpec("up_proj_bias", (96,), "bfloat16"))
    turned = coded_parts(CODECS["int4"], parts, transposed=True)
    assert [part.shape for part in turned] == [(96, 32), (96, 2), (96,)]
    assert turned[2] is parts[1]
    assert coded_parts(None, parts, transposed=True) == parts
    with pytest.raises(UnsupportedModelError, match="has shape"):
        coded_parts(CODECS["int8"], (PartSpec("odd", (2, 3, 4), "float32"),), transposed=False)


def test_codecs_are_found_by_name() -> None:
    assert EXPERT_DTYPES == ("native", "int8", "int4")
    assert codec_of("native") is None
    assert codec_of("int4") is CODECS["int4"]
    with pytest.raises(UsageError, match="'int3'; use one of native, int8, int4"):
        codec_of("int3")
