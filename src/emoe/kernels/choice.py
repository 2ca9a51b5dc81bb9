"""Which kernels compute few tokens: the C ones where they can be had, else torch's. One choice per process."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field

import torch

from emoe.errors import UsageError
from emoe.kernels.native.build import BuildError, built
from emoe.kernels.native.calls import TYPES, Calls
from emoe.kernels.processor import BY_TORCH, OTHER_DTYPE, OTHER_PROCESSOR, VARIABLE, wanted_kernels, why_torch

__all__ = ["VARIABLE", "Kernel", "kernel_of", "native_calls"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Kernel:
    """What computes few tokens.

    Attributes:
        name: "native" or "torch".
        reason: why that, in a few words.
        calls: the C functions, for "native".
    """

    name: str
    reason: str
    calls: Calls | None = field(default=None, repr=False)

    def many_rows(self, dtype: torch.dtype) -> str:
        """What computes prompts in `dtype`, and why.

        That is attention, linear layers of up to 128 rows, and experts (quantised ones: of up to 64).
        """
        if self.calls is None:
            return f"torch: {self.reason}"
        if dtype is not torch.bfloat16:
            return f"torch: {OTHER_DTYPE}"
        if not self.calls.knows_many:
            return f"torch: {OTHER_PROCESSOR}"
        return "native: this processor multiplies bfloat16 in pairs"


def kernel_of(device: torch.device | str, dtype: torch.dtype) -> Kernel:
    """Return the kernels for few tokens in `dtype` on `device`.

    Raises:
        UsageError: EMOE_KERNELS is not one of its values, or asks for kernels that cannot be compiled.
    """
    wanted = wanted_kernels()
    if wanted == "torch":
        return Kernel("torch", BY_TORCH)
    if torch.device(device).type != "cpu":
        return Kernel("torch", "the C kernels are for CPUs")
    if dtype not in TYPES:
        return Kernel("torch", f"the C kernels know bfloat16 and float32, not {str(dtype).removeprefix('torch.')}")
    calls = _calls()
    if isinstance(calls, Calls):
        if dtype is torch.bfloat16:
            _compare(calls)
        return Kernel("native", "compiled for this processor", calls)
    if wanted == "native":
        raise UsageError(f"{VARIABLE} is native, but {calls}.") from calls
    more = dtype is torch.bfloat16 and not why_torch("bfloat16")
    prompts = ", and so are prompts, which take more memory than `emoe plan` counts" if more else ""
    _say_once(f"few tokens are computed by torch, at about half the speed{prompts}: {calls}")
    return Kernel("torch", str(calls))


def native_calls() -> Calls | None:
    """The C functions, None where they cannot be had; EMOE_KERNELS is for `kernel_of` to heed."""
    calls = _calls()
    return calls if isinstance(calls, Calls) else None


@functools.cache
def _calls() -> Calls | BuildError:
    """Built and loaded at the first call."""
    try:
        return Calls(built())
    except BuildError as error:
        return error


def _compare(calls: Calls) -> None:
    """Say so where prompts are computed otherwise than plans suppose."""
    expected = not why_torch("bfloat16")
    if expected and not calls.knows_many:
        why = "the compiler used what this processor has otherwise"
        _say_once(f"prompts are computed by torch and take more memory than `emoe plan` counts: {why}. Plan again")
    elif calls.knows_many and not expected:
        _say_once(f"prompts take less memory than `emoe plan` counts, which supposed: {why_torch('bfloat16')}")


@functools.cache
def _say_once(what: str) -> None:
    _log.warning("%s.", what)
