"""A chunk's pairs of token and expert as blocks of rows, one for each expert."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from emoe.kernels.fetching import Fetch, at_once


def round_rows(n: int) -> int:
    """Return the number of rows that n tokens of one expert are computed with: 1..8, 10, 12, 14, 16, 20, 24, 28...

    oneDNN compiles and keeps a kernel for every number of rows it meets (0.4 to 0.75 MiB and about 1 ms each, see
    docs/log.md), so without rounding a process grows with every prompt of another length. Rows cost time in proportion
    beyond the first 36 or so, so four sizes to an octave (6 % more rows on average) and not two (12 %).
    """
    if n <= 8:
        return n
    step = 1 << ((n - 1).bit_length() - 3)
    return -(-n // step) * step


class Grouping:
    """A chunk's (token, choice) pairs as rows sorted by expert, each expert's rows a block.

    With `rounded`, blocks are padded to `round_rows` rows, which repeat the first token; nothing reads their results.

    Attributes:
        blocks: rows of each expert's block, in the order of the blocks (experts ascending).
        counts: tokens of each expert that has any.
        gather: [rows] the token that each row holds.
        place: [tokens * k] the row of each pair.
    """

    def __init__(self, ids: torch.Tensor, experts: int, *, rounded: bool = False, fetch: Fetch = at_once) -> None:
        """Group `ids` [tokens, k]. On a device `fetch` brings the counts: the one time that the program waits for it.

        (bincount waits twice by itself, for the least and the largest number.)
        """
        flat = ids.reshape(-1)
        self.top_k = ids.shape[1]
        self._rows_each = 0.0
        ordered, order = torch.sort(flat, stable=True)
        ends = torch.searchsorted(ordered, torch.arange(1, experts + 1, dtype=flat.dtype, device=ids.device))
        arriving = fetch(ends)
        row = torch.arange(flat.numel(), device=ids.device)
        token = order // self.top_k
        self.place = torch.empty_like(order)
        if not rounded:
            self.place[order] = row
            self.gather = token
        (at,) = arriving()
        stops: list[int] = at.tolist()
        every = [stop - start for start, stop in zip([0, *stops], stops, strict=False)]
        self.counts = {expert: n for expert, n in enumerate(every) if n}
        sizes = [round_rows(n) if rounded else n for n in every]
        self.blocks = {expert: sizes[expert] for expert in self.counts}
        if rounded:  # on a CPU
            padding = torch.tensor(sizes, device=ids.device) - torch.tensor(every, device=ids.device)
            row += (padding.cumsum(0) - padding)[ordered]
            self.place[order] = row
            self.gather = order.new_zeros(sum(sizes))
            self.gather[row] = token

    @property
    def rows(self) -> int:
        """Rows of all blocks."""
        return sum(self.blocks.values())

    @property
    def rows_each(self) -> float:
        """Rows of an expert of the whole chunk on average."""
        return self._rows_each or self.rows / len(self.counts)

    def part(self, start: int, experts: Sequence[int]) -> Grouping:
        """The rows of some neighbouring experts, the first of which begin at row `start`."""
        part = copy.copy(self)
        part.blocks = {expert: self.blocks[expert] for expert in experts}
        part.counts = {expert: self.counts[expert] for expert in experts}
        part.gather = self.gather[start : start + part.rows]
        part._rows_each = self.rows_each
        return part

    def at(self, gather: torch.Tensor) -> Grouping:
        """The same with its rows' tokens on another device."""
        part = copy.copy(self)
        part.gather = gather
        return part

    def by_count(self) -> list[int]:
        """Experts, most tokens first, ties by number."""
        return sorted(self.counts, key=lambda e: (-self.counts[e], e))


def rounds_rows(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch computes chunks with rounded rows: where its matrix products go through oneDNN."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)
