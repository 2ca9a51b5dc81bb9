"""The C kernels against plain formulas and transformers' own experts; skipped where there is no compiler."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from transformers import GptOssConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from emoe.kernels import choice, experts
from emoe.kernels.chunks import NATIVE_ROWS, many_tokens
from emoe.kernels.experts import ExpertMath, FirstOnly, Weights, one_token, one_token_arriving
from emoe.kernels.gates import CLAMPED, SILU, apply_gate, gate_of
from emoe.kernels.grouping import Grouping
from emoe.kernels.native import build
from emoe.kernels.native.calls import COLUMNS, INT4, INT8, ROWS, TYPES, Calls, Matrix, Shape
from emoe.kernels.quantised import GROUP, QuantisedMatrix
from tests.kernels.test_quantised import random_matrix

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", params=["this processor", "any processor"])
def calls(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Calls:
    """The library for this processor, and one without its vector instructions."""
    try:
        if request.param == "this processor":
            return Calls(build.built())
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
            return Calls(build.built(["-O1", *(flag for flag in build.FLAGS if flag[:3] not in ("-ma", "-O3"))]))
    except build.BuildError as error:
        pytest.skip(str(error))


def product(calls: Calls, weight: Any, x: torch.Tensor, bias: torch.Tensor | None, form: int) -> torch.Tensor:
    """x W + bias; `weight` [out, in], which form COLUMNS stores the other way round."""
    if isinstance(weight, QuantisedMatrix):
        rows, stored, scale = weight.shape[1], weight.packed, weight.scale.data_ptr()
    else:
        rows, stored, scale = weight.shape[0], weight.t().contiguous() if form == COLUMNS else weight, None
    shape = Shape(x.shape[1], rows, form, TYPES[x.dtype])
    matrix = Matrix(stored.data_ptr(), scale, None if bias is None else bias.data_ptr())
    out = torch.full((x.shape[0], rows), torch.nan, dtype=x.dtype)
    calls.products(shape, [_address(matrix)], x, out)
    return out


def _address(structure: Any) -> int:
    return ctypes.addressof(structure)


@given(
    form=st.sampled_from([ROWS, COLUMNS, INT8, INT4]),
    columns=st.integers(1, 150),
    rows=st.integers(1, 150),
    tokens=st.integers(1, 9),
    biased=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)
@example(form=COLUMNS, columns=9, rows=1100, tokens=5, biased=True, dtype=torch.bfloat16, seed=0)
@example(form=COLUMNS, columns=9, rows=1111, tokens=1, biased=True, dtype=torch.bfloat16, seed=0)
@example(form=COLUMNS, columns=9, rows=6200, tokens=1, biased=False, dtype=torch.float32, seed=0)
@example(form=ROWS, columns=2880, rows=33, tokens=2, biased=True, dtype=torch.float32, seed=0)
@example(form=INT4, columns=2880, rows=5, tokens=15, biased=True, dtype=torch.bfloat16, seed=0)
@example(form=INT8, columns=2880, rows=5, tokens=15, biased=True, dtype=torch.bfloat16, seed=0)
@example(form=INT4, columns=1024, rows=5, tokens=1, biased=False, dtype=torch.bfloat16, seed=0)
@example(form=INT8, columns=640, rows=5, tokens=1, biased=False, dtype=torch.bfloat16, seed=0)
def test_products_are_right_whatever_the_threads_and_the_rows(
    calls: Calls, form: int, columns: int, rows: int, tokens: int, biased: bool, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight: Any
    if form in (INT8, INT4):
        columns = -(-columns // GROUP) * GROUP
        weight, values = random_matrix(8 if form == INT8 else 4, columns, rows, seed)
    else:
        weight = torch.randn(rows, columns, generator=generator).to(dtype)
        values = weight.double()
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    bias = torch.randn(rows, generator=generator).to(dtype) if biased else None
    expected = x.double() @ values.t() + (0.0 if bias is None else bias.double())
    out = product(calls, weight, x, bias, form)
    rounding = 1e-5 if dtype is torch.float32 else 2**-8
    allowed = expected.abs() * rounding + 2e-6 * (x.double().abs() @ values.abs().t()).max()
    if form in (INT8, INT4) and dtype is torch.bfloat16:
        allowed += kept_of_blocks(x, values)
    assert bool(((out.double() - expected).abs() <= allowed).all())
    torch.set_num_threads(3)
    again = [product(calls, weight, x, bias, form) for _ in range(6)]  # the first calls try each number of threads
    torch.set_num_threads(1)
    assert all(torch.equal(out, other) for other in again)
    assert torch.equal(out[-1:], product(calls, weight, x[-1:].contiguous(), bias, form))


def kept_of_blocks(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[rows of x, rows of values] How far off products may be where x is in int16: 2^-15 of a block's largest."""
    allowed = torch.zeros(len(x), len(values), dtype=torch.double)
    for columns, of in zip(
        torch.split(x.double().abs(), 128, dim=1), torch.split(values.abs(), 128, dim=1), strict=True
    ):
        allowed += columns.amax(dim=1, keepdim=True) * 2**-15 * of.sum(dim=1)
    return allowed


@given(
    bits=st.sampled_from([8, 4]),
    groups=st.integers(1, 20),
    spread=st.sampled_from([0.0, 3.0, 12.0]),
    size=st.sampled_from([1e-30, 1.0, 1e30]),
    seed=st.integers(0, 999),
)
def test_quantised_products_of_small_and_large_numbers_are_off_by_little(
    calls: Calls, bits: int, groups: int, spread: float, size: float, seed: int
) -> None:
    """What is kept of x beside much larger numbers of its 128 columns."""
    generator = torch.Generator().manual_seed(seed)
    columns = groups * GROUP
    weight, values = random_matrix(bits, columns, 6, seed)
    x = torch.randn(2, columns, generator=generator)
    x = (x * torch.exp(spread * torch.randn(2, columns, generator=generator)) * size).clamp(-1e34, 1e34).bfloat16()
    exact = x.double() @ values.t()
    allowed = exact.abs() * 2**-8 + 2e-6 * (x.double().abs() @ values.abs().t())
    allowed += kept_of_blocks(x, values)
    out = product(calls, weight, x, None, INT8 if bits == 8 else INT4).double()
    assert bool(((out - exact).abs() <= allowed + 1e-37).all())


def test_what_is_no_number_in_x_is_none_in_the_result(calls: Calls) -> None:
    for bits, form in ((8, INT8), (4, INT4)):
        weight, _ = random_matrix(bits, 320, 3, 0)
        for bad in (torch.nan, torch.inf, -torch.inf):
            x = torch.ones(2, 320).bfloat16()
            x[1, 200] = bad
            out = product(calls, weight, x, None, form)
            assert bool(out[0].isfinite().all())
            assert not bool(out[1].isfinite().any())


def test_nan_and_infinity_come_through(calls: Calls) -> None:
    for dtype in DTYPES:
        for form in (ROWS, COLUMNS):
            weight = torch.ones(3, 40).to(dtype)
            weight[1, 3], weight[2, 39] = torch.nan, torch.inf
            out = product(calls, weight, torch.ones(1, 40).to(dtype), None, form)
            assert out[0, 0] == 40
            assert out[0, 1].isnan()
            assert out[0, 2].isinf()


class Plain(nn.Module):
    """Experts without a gate, as Nemotron-H has them, or with a norm behind them."""

    is_transposed, has_gate = False, False

    def __init__(self, biased: bool, normed: bool) -> None:
        super().__init__()
        self.has_bias, self.has_post_expert_norm = biased, normed
        self.act_fn = nn.GELU()
        self.post_expert_norm = nn.LayerNorm(32)


def theirs(family: str, hidden: int, width: int, count: int, dtype: torch.dtype) -> nn.Module:
    """An experts module of transformers with random weights."""
    if family == "gpt_oss":
        config: Any = GptOssConfig(hidden_size=hidden, intermediate_size=width, num_local_experts=count)
        module: nn.Module = GptOssExperts(config)
    else:
        config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=width, num_experts=count)
        module = Qwen3MoeExperts(config)
    config._experts_implementation = "eager"
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.to(dtype).requires_grad_(False)


def bound(math: ExpertMath, module: nn.Module, count: int) -> list[Weights]:
    return [math.bind({name: part[e] for name, part in module.named_parameters()}) for e in range(count)]


def kernel(calls: Calls) -> choice.Kernel:
    return choice.Kernel("native", "", calls)


@given(
    family=st.sampled_from(["gpt_oss", "qwen3_moe"]),
    hidden=st.integers(1, 90),
    width=st.integers(1, 70),
    top_k=st.integers(1, 4),
    tokens=st.integers(1, 12),
    dtype=st.sampled_from(DTYPES),
    wide_gates=st.booleans(),
    seed=st.integers(0, 999),
)
def test_a_layer_is_transformers_own(
    calls: Calls,
    family: str,
    hidden: int,
    width: int,
    top_k: int,
    tokens: int,
    dtype: torch.dtype,
    wide_gates: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    module = theirs(family, hidden, width, 5, dtype)
    math = ExpertMath(module, kernel(calls))
    assert math.native is not None
    assert math.native.whole
    weights = bound(math, module, 5)
    x = torch.randn(tokens, hidden).to(dtype)
    ids = torch.stack([torch.randperm(5)[:top_k] for _ in range(tokens)])
    gates = torch.rand(tokens, top_k).softmax(-1).to(torch.float32 if wide_gates else dtype)
    if tokens == 1:
        out = one_token(math, x, [weights[e] for e in ids[0].tolist()], gates)
    else:
        grouping = Grouping(ids, 5, rounded=dtype is torch.bfloat16)
        out = many_tokens(math, x, grouping, ((e, weights[e]) for e in grouping.by_count()), gates)
    assert out.dtype == dtype
    expected = module(x, ids, gates)
    exact = module.double()(x.double(), ids, gates.double())
    scale = float(exact.abs().max())
    if dtype is torch.float32:
        torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5 * scale)
    else:  # no further from the truth than transformers' own rounding, which may be right by chance: a number is
        # rounded five times on its way (gate, up, their product, the sum, its weighting), by 2^-9 each
        off = (expected.double() - exact).abs().max()
        assert (out.double() - exact).abs().max() <= 1.5 * off + 2**-6 * scale


@given(
    family=st.sampled_from(["gpt_oss", "qwen3_moe"]),
    hidden=st.integers(1, 90),
    width=st.integers(1, 70),
    order=st.permutations(range(4)),
    alone=st.integers(0, 3),
    early=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    wide_gates=st.booleans(),
)
def test_one_token_has_the_same_bits_however_its_experts_arrive(
    calls: Calls,
    family: str,
    hidden: int,
    width: int,
    order: list[int],
    alone: int,
    early: bool,
    dtype: torch.dtype,
    wide_gates: bool,
) -> None:
    module = theirs(family, hidden, width, 4, dtype)
    math = ExpertMath(module, kernel(calls))
    weights = bound(math, module, 4)
    x, gates = torch.randn(1, hidden).to(dtype), torch.rand(1, 4).softmax(-1)
    gates = gates if wide_gates else gates.to(dtype)
    groups = [order[: 4 - alone], *([place] for place in order[4 - alone :])]
    ready = [(group, [weights[place] for place in group]) for group in groups]
    if early:
        ready.insert(-1, (groups[-1], FirstOnly(ready[-1][1])))
    assert torch.equal(one_token(math, x, weights, gates), one_token_arriving(math, x, ready, gates))


@given(biased=st.booleans(), normed=st.booleans(), tokens=st.integers(1, 10), dtype=st.sampled_from(DTYPES))
def test_what_the_kernels_do_not_know_stays_the_modules(
    calls: Calls, biased: bool, normed: bool, tokens: int, dtype: torch.dtype
) -> None:
    module = Plain(biased, normed).to(dtype).requires_grad_(False)
    sizes: dict[str, tuple[int, ...]] = {"up_proj": (48, 32), "down_proj": (32, 48)}
    if biased:
        sizes |= {"up_proj_bias": (48,), "down_proj_bias": (32,)}
    slots = [{name: torch.randn(size).to(dtype) for name, size in sizes.items()} for _ in range(4)]
    found = []
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
    x, gates = torch.randn(tokens, 32).to(dtype), torch.rand(tokens, 2).to(dtype)
    for math in (ExpertMath(module), ExpertMath(module, kernel(calls))):
        weights = [math.bind(slot) for slot in slots]
        grouping = Grouping(ids, 4)
        with torch.no_grad():
            if tokens == 1:
                found.append(one_token(math, x, [weights[e] for e in ids[0].tolist()], gates))
            else:
                found.append(many_tokens(math, x, grouping, ((e, weights[e]) for e in grouping.counts), gates))
    assert weights[0].native is not None
    tolerance = 1e-4 if dtype is torch.float32 else 0.03
    torch.testing.assert_close(found[0], found[1], rtol=tolerance, atol=tolerance * float(found[0].abs().max()))


@given(bits=st.sampled_from([8, 4]), tokens=st.integers(1, 45), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_quantised_experts_are_the_same_by_torch_and_by_c(
    calls: Calls, bits: int, tokens: int, dtype: torch.dtype, seed: int
) -> None:
    hidden, width = 64, 32
    module = theirs("qwen3_moe", hidden, width, 4, dtype)
    slots = []
    for e in range(4):
        slot = {}
        for name, (columns, rows) in {"gate_up_proj": (hidden, 2 * width), "down_proj": (width, hidden)}.items():
            slot[name], slot[f"{name}_scale"] = random_matrix(bits, columns, rows, seed + e)[0].parts
        slots.append(slot)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])
    x, gates = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, 2).to(dtype)
    found = []
    for math in (ExpertMath(module), ExpertMath(module, kernel(calls))):
        weights = [math.bind(slot) for slot in slots]
        if tokens == 1:
            found.append(one_token(math, x, [weights[e] for e in ids[0].tolist()], gates))
        else:
            grouping = Grouping(ids, 4)
            found.append(many_tokens(math, x, grouping, ((e, weights[e]) for e in grouping.counts), gates))
    assert math.natively(weights[0], dtype) is not None
    tolerance = 1e-4 if dtype is torch.float32 else 0.02
    torch.testing.assert_close(found[0], found[1], rtol=tolerance, atol=tolerance * float(found[0].abs().max()))


def test_beyond_a_few_rows_torch_computes(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    module = theirs("qwen3_moe", 32, 16, 2, torch.float32)
    math = ExpertMath(module, kernel(calls))
    weights = bound(math, module, 2)
    rows: list[int] = []
    assert math.native is not None
    monkeypatch.setattr(type(math.native), "run", lambda self, w, x, out: rows.append(x.shape[0]))
    ids = torch.tensor([[0]] * NATIVE_ROWS + [[1]] * (NATIVE_ROWS + 1))
    grouping = Grouping(ids, 2)
    many_tokens(math, torch.randn(len(ids), 32), grouping, ((e, weights[e]) for e in (0, 1)), torch.ones(len(ids), 1))
    assert rows == [NATIVE_ROWS]


def test_quantised_matrices_unpack_to_their_values(calls: Calls) -> None:
    for bits, form in ((8, INT8), (4, INT4)):
        for dtype in DTYPES:
            weight, _ = random_matrix(bits, 96, 7, bits)
            out = torch.empty(7, 96, dtype=dtype)
            matrix = Matrix(weight.packed.data_ptr(), weight.scale.data_ptr(), None)
            calls.unpack(Shape(96, 7, form, TYPES[dtype]), _address(matrix), out)
            assert torch.equal(out, weight.values(dtype))
            calls.unpack(Shape(96, 7, form, TYPES[dtype]), _address(matrix), out[:2], 4)
            assert torch.equal(out[:2], weight.values(dtype)[4:6])


def test_gates_are_known_by_what_they_compute() -> None:
    assert gate_of(theirs("qwen3_moe", 8, 8, 1, torch.float32)) == (SILU, 0.0, 0.0)
    clamped = gate_of(theirs("gpt_oss", 8, 8, 1, torch.float32))
    assert clamped is not None
    assert clamped.kind == CLAMPED
    other = SimpleNamespace(has_gate=True, _apply_gate=lambda inner: nn.functional.gelu(inner.chunk(2, -1)[0]))
    assert gate_of(other) is None  # type: ignore[arg-type]
    assert gate_of(SimpleNamespace(has_gate=False)) is None  # type: ignore[arg-type]
    for gate in (clamped, gate_of(theirs("qwen3_moe", 8, 8, 1, torch.float32))):
        assert gate is not None
        assert apply_gate(gate, torch.randn(3, 16)).shape == (3, 8)


def test_a_slot_that_is_not_memory_of_the_cpu_is_left_to_torch(calls: Calls) -> None:
    module = theirs("qwen3_moe", 32, 16, 1, torch.float32)
    math = ExpertMath(module, kernel(calls))
    half = {name: part[0].half() for name, part in module.named_parameters()}
    meta = {name: part[0].to("meta") for name, part in module.named_parameters()}
    spread = {name: part[0].repeat_interleave(2, 1)[:, ::2] for name, part in module.named_parameters()}
    for views in (half, meta, spread):
        assert math.bind(views).native is None
    assert experts.ExpertMath(module).bind(half).native is None


def test_the_source_is_what_the_package_holds() -> None:
    folder = Path(build.__file__).parent
    assert sorted(build.SOURCES) == sorted(path.name for path in folder.iterdir() if path.suffix in (".c", ".h"))
