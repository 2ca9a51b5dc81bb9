"""Root mean square norms by the C kernels: one call in place of six of torch's operations.

Families write them in three ways, which differ in what is rounded. Which one a module is, is found by trying it.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import nn

from emoe.kernels.native.calls import TYPES, Calls

FORMS = ROUNDED, WHOLE, OFFSET = range(3)
"""round(normalised) * weight; round(normalised * weight); round(normalised * (1 + weight)). As in native/norm.h."""

EPSILONS = ("variance_epsilon", "eps", "epsilon")
"""Names under which families keep what they add to the mean of squares."""

PROBE_ROWS = 8


class Norm(NamedTuple):
    """One norm: its form, and what is added to the mean of squares."""

    form: int
    epsilon: float


def norm_of(module: nn.Module, calls: Calls) -> Norm | None:
    """Return the norm that `module` computes, None for anything else.

    Its own function is run on a few rows of very different sizes and compared; its name is not trusted.
    """
    weight = module._parameters.get("weight")
    epsilons = [value for name in EPSILONS if isinstance(value := getattr(module, name, None), float)]
    if (
        not isinstance(weight, torch.Tensor)
        or weight.dim() != 1
        or weight.device.type != "cpu"
        or weight.dtype not in TYPES
        or not weight.is_contiguous()
        or len(module._parameters) != 1
        or module._buffers
        or module._modules
        or len(epsilons) != 1
        or len(inspect.signature(module.forward).parameters) != 1
    ):
        return None
    made = torch.Generator().manual_seed(0)
    probe = torch.randn(PROBE_ROWS, weight.numel(), generator=made)
    probe = (probe * torch.logspace(-3, 3, PROBE_ROWS).unsqueeze(1)).to(weight.dtype)
    tried = torch.randn(weight.numel(), generator=made).to(weight.dtype)  # with weights of 1, all forms are one
    with torch.no_grad():
        theirs = torch.func.functional_call(module, {"weight": tried}, (probe,))
    if not isinstance(theirs, torch.Tensor) or theirs.dtype is not weight.dtype or theirs.shape != probe.shape:
        return None
    best, fewest = None, len(probe) * weight.numel()
    for form in FORMS:
        ours = torch.empty_like(probe)
        calls.norm(form, epsilons[0], probe, tried, ours)
        step = (16 if weight.dtype is torch.float32 else 2) * torch.finfo(weight.dtype).eps * theirs.abs()
        if not bool(((ours - theirs).abs() <= step).all()):
            continue
        different = int((ours != theirs).sum())
        if different < fewest:
            best, fewest = Norm(form, epsilons[0]), different
    # The order of sums moves a rounding here and there; another form moves a quarter of them.
    few = weight.dtype is torch.float32 or fewest <= 0.02 * probe.numel()
    return best if few else None


def norm_forward(module: nn.Module, norm: Norm, calls: Calls) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward for `module`, which does not hold it: a model must go when its last user lets go."""
    parameters, plain, owner = module._parameters, type(module).forward, weakref.ref(module)
    held = cast(torch.Tensor, parameters["weight"])
    address, dtype, size = held.data_ptr(), held.dtype, held.numel()
    form, epsilon = norm

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        weight = cast(torch.Tensor, parameters["weight"])
        if (
            type(hidden_states) is not torch.Tensor
            or hidden_states.dtype is not dtype
            or not hidden_states.numel()
            or hidden_states.shape[-1] != size
            or hidden_states.device.type != "cpu"
            or weight.data_ptr() != address
            or torch.compiler.is_compiling()
            or (torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad))
            or torch.is_autocast_enabled("cpu")
        ):
            return cast(torch.Tensor, plain(owner(), hidden_states))
        x = hidden_states.contiguous()
        out = torch.empty_like(x)
        calls.norm(form, epsilon, x, weight, out)
        return out

    return forward
