"""Many rows of bfloat16 by the C kernels: right, and the same bits whatever the rows, their number and the threads."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from emoe.kernels.choice import Kernel
from emoe.kernels.chunks import NATIVE_ROWS, grouped, many_tokens
from emoe.kernels.experts import ExpertMath
from emoe.kernels.grouping import Grouping
from emoe.kernels.native import build
from emoe.kernels.native.calls import COLUMNS, ROWS, TYPES, Calls, Matrix, Shape
from tests.kernels.test_native import bound, kernel, theirs


@pytest.fixture(scope="module")
def calls() -> Calls:
    try:
        found = Calls(build.built())
    except build.BuildError as error:
        pytest.skip(str(error))
    if not found.knows_many:
        pytest.skip("this processor does not multiply bfloat16 in pairs, or has AMX")
    return found


def product(calls: Calls, weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, form: int) -> torch.Tensor:
    """x W + bias; `weight` [out, in], which form COLUMNS stores the other way round."""
    stored = weight.t().contiguous() if form == COLUMNS else weight
    matrix = Matrix(stored.data_ptr(), None, None if bias is None else bias.data_ptr())
    out = torch.full((x.shape[0] + 1, weight.shape[0]), torch.nan, dtype=x.dtype)
    shape = Shape(weight.shape[1], weight.shape[0], form, TYPES[x.dtype])
    calls.many_products(shape, ctypes.addressof(matrix), x, out[:-1])
    assert out[-1].isnan().all()
    return out[:-1]


@given(
    form=st.sampled_from([ROWS, COLUMNS]),
    columns=st.integers(1, 150),
    rows=st.integers(1, 150),
    tokens=st.integers(1, 40),
    biased=st.booleans(),
    seed=st.integers(0, 999),
)
@example(form=ROWS, columns=2100, rows=9, tokens=5, biased=True, seed=0)  # more than what stays in the cache
@example(form=ROWS, columns=4097, rows=40, tokens=130, biased=False, seed=0)
@example(form=ROWS, columns=1000, rows=75, tokens=64, biased=True, seed=0)  # room for the next rows in the cache
@example(form=COLUMNS, columns=1001, rows=600, tokens=130, biased=True, seed=0)
@example(form=COLUMNS, columns=384, rows=256, tokens=257, biased=False, seed=0)
def test_products_are_right_whatever_the_threads_and_the_rows(
    calls: Calls, form: int, columns: int, rows: int, tokens: int, biased: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).bfloat16()
    x = torch.randn(tokens, columns, generator=generator).bfloat16()
    bias = torch.randn(rows, generator=generator).bfloat16() if biased else None
    expected = x.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    out = product(calls, weight, x, bias, form)
    scale = float((x.double().abs() @ weight.double().abs().t()).max())
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=2e-6 * scale)
    torch.set_num_threads(3)
    again = product(calls, weight, x, bias, form)
    torch.set_num_threads(1)
    assert torch.equal(out, again)
    some = torch.randperm(tokens, generator=generator)[: tokens // 2 + 1]
    assert torch.equal(out[some], product(calls, weight, x[some], bias, form))


def test_nan_and_infinity_come_through(calls: Calls) -> None:
    for form in (ROWS, COLUMNS):
        weight = torch.ones(3, 41).bfloat16()
        weight[1, 3], weight[2, 40] = torch.nan, torch.inf
        x = torch.ones(14, 41).bfloat16()
        x[5, 40] = torch.nan
        out = product(calls, weight, x, None, form)
        assert out[5].isnan().all()
        others = [row for row in range(14) if row != 5]
        assert (out[others, 0] == 41).all() and out[others, 1].isnan().all() and out[others, 2].isinf().all()


@given(
    family=st.sampled_from(["gpt_oss", "qwen3_moe"]),
    hidden=st.integers(1, 90),
    width=st.integers(1, 70),
    tokens=st.integers(NATIVE_ROWS + 1, 60),
    seed=st.integers(0, 999),
)
@example(family="gpt_oss", hidden=65, width=300, tokens=150, seed=0)
@example(family="qwen3_moe", hidden=65, width=48, tokens=300, seed=0)
def test_an_expert_gives_what_transformers_gives(
    calls: Calls, family: str, hidden: int, width: int, tokens: int, seed: int
) -> None:
    torch.manual_seed(seed)
    module = theirs(family, hidden, width, 2, torch.bfloat16)
    math = ExpertMath(module, kernel(calls))
    weights = bound(math, module, 2)
    x, gates = torch.randn(tokens, hidden).bfloat16(), torch.rand(tokens, 1).bfloat16()
    ids = torch.randint(0, 2, (tokens, 1))
    found = []
    for rounded in (True, False):
        grouping = Grouping(ids, 2, rounded=rounded)
        found.append(many_tokens(math, x, grouping, ((e, weights[e]) for e in grouping.by_count()), gates))
    assert torch.equal(*found)
    expected, exact = module(x, ids, gates), module.double()(x.double(), ids, gates.double())
    off, scale = (expected.double() - exact).abs().max(), float(exact.abs().max())
    assert (
        found[0].double() - exact
    ).abs().max() <= 1.5 * off + 2**-6 * scale  # rounded five times, as in test_native.py


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_rows_are_rounded_only_for_torch(calls: Calls, family: str) -> None:
    module = theirs(family, 64, 48, 2, torch.bfloat16)
    math = ExpertMath(module, kernel(calls))
    weights = bound(math, module, 2)
    x, gates = torch.randn(150, 64).bfloat16(), torch.rand(150, 1).bfloat16()
    ids = (torch.arange(150).view(-1, 1) % 5 > 0).long()  # 30 rows and 120, which torch would make 32 and 128
    plain, by_torch = (
        grouped(math, weights[0], x.dtype, ids, 2),
        grouped(ExpertMath(module), weights[0], x.dtype, ids, 2),
    )
    assert plain.blocks == plain.counts == {0: 30, 1: 120}
    assert by_torch.blocks == {0: 32, 1: 128}
    same, theirs_too = (
        many_tokens(math, x, grouping, ((e, weights[e]) for e in grouping.counts), gates)
        for grouping in (plain, by_torch)
    )
    assert torch.equal(same, theirs_too)


def test_what_computes_prompts_is_said(calls: Calls) -> None:
    assert kernel(calls).many_rows(torch.bfloat16).startswith("native: ")
    assert kernel(calls).many_rows(torch.float32).startswith("torch: ")
    assert Kernel("torch", "EMOE_KERNELS says so").many_rows(torch.bfloat16) == "torch: EMOE_KERNELS says so"


def test_an_experts_rows_do_not_depend_on_the_other_experts(calls: Calls) -> None:
    module = theirs("qwen3_moe", 64, 48, 3, torch.bfloat16)
    math = ExpertMath(module, kernel(calls))
    weights = bound(math, module, 3)
    x, gates = torch.randn(60, 64).bfloat16(), torch.ones(60, 1).bfloat16()
    ids = torch.arange(60).view(-1, 1) % 3

    def run(ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        grouping = Grouping(ids, 3)
        return many_tokens(math, x, grouping, ((e, weights[e]) for e in grouping.counts), gates[: len(ids)])

    together = run(ids, x)
    for e in range(3):
        mine = (ids == e).view(-1)
        assert torch.equal(together[mine], run(ids[mine], x[mine]))
