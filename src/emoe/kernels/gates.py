"""Which of the gates that the C kernels know stands between an expert's two projections: found by trying it."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import nn

SILU, CLAMPED = 1, 2
"""silu(gate) * up over [gate | up]; and gpt-oss', over gate and up in turns. As in native/gates.h."""

PROBE = 48
"""Values of a gate that are tried, from -24 to 24: beyond every limit that checkpoints have."""


class Gate(NamedTuple):
    """One gate: its kind, and for `CLAMPED` its two numbers."""

    kind: int
    alpha: float = 0.0
    limit: float = 0.0


def gate_of(experts: nn.Module) -> Gate | None:
    """Return the gate that `experts` (an experts module of transformers) computes, None for any other.

    The module's own function is run on a few hundred values and compared; its names are not trusted.
    """
    module = cast(Any, experts)
    if not module.has_gate:
        return None
    candidates = [Gate(SILU)]
    alpha, limit = getattr(module, "alpha", None), getattr(module, "limit", None)
    if isinstance(alpha, float | int) and isinstance(limit, float | int):
        candidates.append(Gate(CLAMPED, float(alpha), float(limit)))
    line = torch.linspace(-24, 24, PROBE)
    probe = torch.cat([torch.stack([line, line.roll(shift)], dim=-1).view(1, -1) for shift in range(0, PROBE, 5)])
    with torch.no_grad():
        theirs = module._apply_gate(probe)
    for gate in candidates:
        ours = apply_gate(gate, probe)
        if theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=1e-5, atol=1e-6):
            return gate
    return None


def apply_gate(gate: Gate, inner: torch.Tensor) -> torch.Tensor:
    """Return the gate over `inner` [rows, 2 * width] by torch: [rows, width]."""
    if gate.kind == SILU:
        left, right = inner.chunk(2, dim=-1)
        return nn.functional.silu(left) * right
    left = inner[..., ::2].clamp(max=gate.limit)
    right = inner[..., 1::2].clamp(-gate.limit, gate.limit)
    return (right + 1) * (left * torch.sigmoid(left * gate.alpha))
