"""Quantising matrices and back, in torch alone. `formats` describes the formats."""

from __future__ import annotations

import torch

from emoe.checkpoint.codecs.formats import GROUP
from emoe.errors import CheckpointError

_BLOCK = 1 << 16
"""Numbers quantised at once: 256 KiB of float32, so that the passes over them stay in the processor's cache."""

_FACTORS = (0.92, 0.97, 1.03, 1.1)
"""Scales tried for a group of int4, relative to the one that takes its largest number to -8.

Relative RMS error over groups of normal numbers, and of emoe-nano's experts: largest number to 7, 0.0970 and 0.0979;
largest to -8, 0.0860 and 0.0867; the best of these four, each refitted, 0.0813 and 0.0820; of 33, 0.0809 and 0.0816.
One thread does 365, 168, 143 and 14 million numbers a second (docs/log.md).

0.92 takes the largest number to 7.36 in size, so no number of the group is off by more than half a step.
"""


def encode_int8(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [rows, columns] and float32 [rows] of a float matrix. No number is off by more than half its row's scale.

    Raises:
        CheckpointError: a number is not finite.
    """
    packed = torch.empty(matrix.shape, dtype=torch.int8)
    scale = torch.empty(matrix.shape[0], dtype=torch.float32)
    for rows in _blocks(matrix):
        block = matrix[rows].float()
        largest = block.abs().amax(dim=1)
        _refuse_unfit(largest, torch.finfo(torch.float32).max)
        scale[rows] = largest / 127
        packed[rows] = (block * _inverse(scale[rows]).unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8)
    return packed, scale


def decode_int8(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float32 matrix."""
    return packed.float() * scale.unsqueeze(1)


def encode_int4(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [rows, columns / 2] and float16 [rows, columns / 32] of a float matrix.

    A group's scale is the best of a few by squared error, refitted to what it rounds to. The root of a group's mean
    squared error is at most its largest number over 13.58 (`_best_scale`), and float16's rounding.

    Raises:
        CheckpointError: a number is not finite, or too large for a float16 scale.
    """
    rows, columns = matrix.shape
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8)
    scale = torch.empty(rows, columns // GROUP, dtype=torch.float16)
    for some in _blocks(matrix):
        block = matrix[some].float().view(-1, columns // GROUP, GROUP)
        best = _best_scale(block).half()
        steps = (block * _inverse(best.float())).round_().clamp_(-8, 7).add_(8).to(torch.uint8).view(-1, columns)
        scale[some] = best.squeeze(-1)
        packed[some] = steps[:, 0::2] | steps[:, 1::2] << 4
    return packed, scale


def decode_int4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float32 matrix."""
    rows, half = packed.shape
    steps = torch.stack((packed & 15, packed >> 4), dim=-1).view(rows, -1, GROUP)
    return ((steps.float() - 8) * scale.float().unsqueeze(-1)).view(rows, 2 * half)


def _best_scale(block: torch.Tensor) -> torch.Tensor:
    """The scale [..., 1] of each group of `block` [..., GROUP].

    Of the scales s of steps q, xq / qq leaves the least squared error, but makes products too small: what it leaves is
    orthogonal to s q, not to x. So q is chosen by that error, and s = xx / xq, which keeps the group's length along x
    (0.998 of it, once more rounded; 0.993 with xq / qq). That costs 0.3 % of error, and takes emoe-nano's perplexity
    from 1.016 and 1.014 times the native one's to 1.009 and 1.001 on two texts (docs/log.md).

    The first factor leaves at most half a step, 1/14.72 of the largest number, in every place; keeping the length
    raises that by the root of 1 / (1 - 32 / 14.72^2) at most, to 1/13.58.
    """
    largest = block.gather(-1, block.abs().argmax(dim=-1, keepdim=True))
    # A refitted scale is about 1/7.36 of the largest number, and at most a sixth more.
    _refuse_unfit(largest.abs(), 6 * torch.finfo(torch.float16).max)
    inverse = -8 * _inverse(largest)
    least = torch.finfo(torch.float32).tiny
    best = torch.zeros_like(largest)
    most = torch.full_like(largest, -1.0)
    for factor in _FACTORS:
        steps = (block * (inverse * factor)).round_().clamp_(-8, 7)
        found = (steps * block).sum(dim=-1, keepdim=True)
        squares = steps.square_().sum(dim=-1, keepdim=True).clamp_(min=least)
        explained = found.square() / squares
        better = explained > most
        most = torch.where(better, explained, most)
        best = torch.where(better, found, best)
    return block.square().sum(dim=-1, keepdim=True) * _inverse(best)


def _blocks(matrix: torch.Tensor) -> list[slice]:
    """Its rows, some at a time."""
    rows, columns = matrix.shape
    each = max(1, _BLOCK // max(1, columns))
    return [slice(start, min(start + each, rows)) for start in range(0, rows, each)]


def _inverse(values: torch.Tensor) -> torch.Tensor:
    """1 / values, and 0 for 0 and for what is too small to have an inverse."""
    inverse = values.reciprocal()
    return inverse.masked_fill_(~inverse.isfinite(), 0.0)


def _refuse_unfit(largest: torch.Tensor, limit: float) -> None:
    worst = float(largest.max()) if largest.numel() else 0.0
    if not worst <= limit:  # also where it is no number
        raise CheckpointError(f"it holds {worst:g}, and what can be quantised is finite and at most {limit:g}")
