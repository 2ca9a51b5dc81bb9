"""Linear layers by the C kernels: the same values, the same bits for any number of rows, and undone without a trace."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from emoe.kernels.choice import Kernel, kernel_of
from emoe.kernels.dense import DENSE_MANY_ROWS, DENSE_ROWS, DenseKernels
from emoe.kernels.native.calls import Calls


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    found = kernel_of("cpu", torch.bfloat16)
    if found.calls is None:
        pytest.skip(found.reason)
    return found


def layer(columns: int, rows: int, biased: bool, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(columns, rows, bias=biased).to(dtype).requires_grad_(False)


@given(
    columns=st.integers(1, 100),
    rows=st.integers(1, 100),
    tokens=st.one_of(st.integers(0, DENSE_ROWS + 2), st.integers(DENSE_MANY_ROWS - 1, DENSE_MANY_ROWS + 1)),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_values_shapes_and_bits(
    kernel: Kernel, columns: int, rows: int, tokens: int, biased: bool, dtype: torch.dtype
) -> None:
    linear = layer(columns, rows, biased, dtype)
    x = torch.randn(1, tokens, columns).to(dtype)
    expected = linear(x)
    dense = DenseKernels(linear, kernel)
    assert len(dense) == 1
    out = linear(x)
    assert out.shape == expected.shape
    assert out.dtype == dtype
    exact = nn.functional.linear(x.double(), linear.weight.double(), None if not biased else linear.bias.double())
    tolerance = 1e-5 if dtype is torch.float32 else 2**-8
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=1e-5)
    if 0 < tokens <= DENSE_ROWS:
        assert torch.equal(out[:, -1], linear(x[0, -1:].clone()))
        spread = torch.randn(columns, tokens).to(dtype).t()
        assert torch.equal(linear(spread), linear(spread.contiguous()))
    elif tokens <= DENSE_MANY_ROWS and dtype is torch.bfloat16 and kernel.calls is not None and kernel.calls.knows_many:
        if tokens > 2 * DENSE_ROWS:
            assert torch.equal(out[:, 5 : 2 * DENSE_ROWS], linear(x[:, 5 : 2 * DENSE_ROWS].clone()))
    else:
        assert torch.equal(out, expected)
    dense.remove()
    assert "forward" not in linear.__dict__
    assert torch.equal(linear(x), expected)


def test_what_is_no_plain_inference_stays_torchs(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = layer(32, 16, True, torch.float32)
    DenseKernels(linear, kernel)
    calls: list[int] = []
    original = Calls.products

    def counted(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        original(*args, **kwargs)

    monkeypatch.setattr(Calls, "products", counted)
    x = torch.randn(2, 32)
    linear(x)
    assert len(calls) == 1
    linear(x.clone().requires_grad_()).sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16
    with pytest.raises(RuntimeError):
        linear(torch.randn(2, 31))
    linear.double()
    assert torch.equal(linear(x.double()), nn.functional.linear(x.double(), linear.weight, linear.bias))
    linear.float()  # back in its type, but elsewhere
    assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))
    assert len(calls) == 1


def test_only_plain_linears_of_known_types_change(kernel: Kernel) -> None:
    class Special(nn.Linear):
        """Somebody's own."""

    hooked = layer(4, 4, False, torch.float32)
    hooked.forward = lambda input: input  # type: ignore[method-assign]
    model = nn.ModuleList([layer(4, 4, False, torch.float16), Special(4, 4), hooked, nn.Linear(4, 4, device="meta")])
    assert len(DenseKernels(model, kernel)) == 0
    assert len(DenseKernels(nn.Linear(4, 4), Kernel("torch", ""))) == 0


def test_a_model_goes_with_its_last_user(kernel: Kernel) -> None:
    linear = layer(4, 4, False, torch.float32)
    gone = weakref.ref(linear)
    dense = DenseKernels(linear, kernel)
    gc.disable()
    try:
        del linear
        dense.remove()
        assert gone() is None
    finally:
        gc.enable()
