"""How the program gets to know small results of computing, which on a device takes a copy."""

from __future__ import annotations

from collections.abc import Callable

import torch

Fetch = Callable[..., Callable[[], tuple[torch.Tensor, ...]]]
"""Begins to bring small tensors to the program; what it returns waits for them (emoe.residency.devices)."""


def at_once(*tensors: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A `Fetch` of tensors that the program can read where they are."""
    return lambda: tensors
