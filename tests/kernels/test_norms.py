"""Norms by the C kernels against transformers' own: recognised by trial, the same bits for any number of rows."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm, Qwen3NextRMSNormGated

from emoe.kernels.choice import Kernel, kernel_of
from emoe.kernels.dense import DenseKernels
from emoe.kernels.norms import OFFSET, ROUNDED, WHOLE, norm_of

KINDS: dict[int, Callable[..., nn.Module]] = {ROUNDED: OlmoeRMSNorm, WHOLE: GptOssRMSNorm, OFFSET: Qwen3NextRMSNorm}


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    found = kernel_of("cpu", torch.bfloat16)
    if found.calls is None:
        pytest.skip(found.reason)
    return found


def weighted(module: nn.Module) -> torch.Tensor:
    """The weight, to be changed in place."""
    return next(module.parameters()).detach()


def norm(form: int, size: int, epsilon: float, dtype: torch.dtype) -> nn.Module:
    module = KINDS[form](size, eps=epsilon).to(dtype).requires_grad_(False)
    weighted(module).normal_()
    return module


@given(
    form=st.sampled_from(sorted(KINDS)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 300)),
    exponent=st.integers(-3, 3),
    epsilon=st.sampled_from([1e-6, 1e-5, 1e-2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_values_and_bits(
    kernel: Kernel, form: int, shape: tuple[int, int, int], exponent: int, epsilon: float, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    module = norm(form, shape[-1], epsilon, dtype)
    x = (torch.randn(shape) * 10.0**exponent).to(dtype)
    expected = module(x)
    dense = DenseKernels(module, kernel)
    assert (len(dense), dense.norms) == (0, 1)
    out = module(x)
    assert out.shape == expected.shape
    assert out.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, expected, rtol=(16 if dtype is torch.float32 else 2) * eps, atol=0)
    assert torch.equal(out[-1, -1], module(x[-1, -1].clone()))
    spread = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(out, module(spread))
    dense.remove()
    assert "forward" not in module.__dict__
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("form", sorted(KINDS))
def test_threads_change_no_bit(kernel: Kernel, form: int) -> None:
    module = norm(form, 1024, 1e-6, torch.bfloat16)
    x = torch.randn(80, 1024).bfloat16()  # more than the 65,536 values from which threads share them
    dense = DenseKernels(module, kernel)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = module(x)
        torch.set_num_threads(2)
        assert torch.equal(module(x), alone)
    finally:
        torch.set_num_threads(before)
        dense.remove()


@pytest.mark.parametrize("form", sorted(KINDS))
def test_forms_are_told_apart(kernel: Kernel, form: int) -> None:
    assert kernel.calls is not None
    module = norm(form, 512, 1e-5, torch.bfloat16)
    weighted(module).fill_(1.0)  # which forms do not differ with
    found = norm_of(module, kernel.calls)
    assert found is not None
    assert (found.form, found.epsilon) == (form, 1e-5)
    out, x = torch.empty(64, 512).bfloat16(), torch.randn(64, 512).bfloat16()
    weighted(module).normal_()
    kernel.calls.norm(form, 1e-5, x, weighted(module), out)
    assert (out != module(x)).float().mean() < 0.01


def test_what_is_no_such_norm_stays(kernel: Kernel) -> None:
    class Squared(OlmoeRMSNorm):  # type: ignore[misc]
        """Somebody's own."""

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = super().forward(hidden_states) ** 2
            return out

    others = [
        Squared(32),
        Qwen3NextRMSNormGated(32),
        nn.LayerNorm(32),
        OlmoeRMSNorm(32).half(),
        OlmoeRMSNorm(32).to("meta"),
    ]
    assert DenseKernels(nn.ModuleList(others), kernel).norms == 0
    assert DenseKernels(OlmoeRMSNorm(32), Kernel("torch", "")).norms == 0


def test_what_is_no_plain_inference_stays_transformers(kernel: Kernel) -> None:
    module = norm(ROUNDED, 32, 1e-5, torch.bfloat16)
    twin = OlmoeRMSNorm(32, eps=1e-5).bfloat16().requires_grad_(False)
    twin.weight.copy_(weighted(module))
    DenseKernels(module, kernel)
    for x in (torch.randn(2, 32), torch.randn(2, 32).bfloat16().requires_grad_(), torch.empty(0, 32).bfloat16()):
        assert torch.equal(module(x), twin(x))
    module.double()
    assert torch.equal(module(x.double()), twin.double()(x.double()))


def test_a_model_goes_with_its_last_user(kernel: Kernel) -> None:
    module = norm(ROUNDED, 32, 1e-5, torch.bfloat16)
    gone = weakref.ref(module)
    dense = DenseKernels(module, kernel)
    gc.disable()
    try:
        dense.remove()
        del module
        assert gone() is None
    finally:
        gc.enable()
