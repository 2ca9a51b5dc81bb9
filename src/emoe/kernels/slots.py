"""Experts computed where their slots lie, many in one launch: the kernels of a CUDA device.

Per-expert products cost a launch and a hand-over each: 16 of them and more for one token of one layer. Here one launch
takes every pair of token and expert of a wave, with the slots' numbers in a small table. The arithmetic of a family
stays its own module's: products in Triton, the activation between them by the module itself.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from emoe.kernels.chunks import finish_chunk
from emoe.kernels.combining import Workspace
from emoe.kernels.experts import ExpertMath, finish_token
from emoe.kernels.grouping import Grouping
from emoe.kernels.quantised import SCALE

_log = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

WAVE_ROWS = 16384
"""Rows of one launch at most: the intermediate of all of them lies in memory at once."""

Wave = Sequence[tuple[int, int]]
"""(expert, slot) of experts that are there."""


class SlotKernels:
    """One bank's experts over all its slots. `available` says where there are any."""

    def __init__(self, math: ExpertMath, parts: Mapping[str, torch.Tensor]) -> None:
        """Bind to every slot's parts: [slots, ...] strided views of the bank, by name."""
        from emoe.kernels import triton_products

        self._products = triton_products
        self._math = math
        self._first, self._down = (self._matrix(parts[name]) for name in (math.first, "down_proj"))
        self._biases = (parts.get(f"{math.first}_bias"), parts.get("down_proj_bias"))

    def _matrix(self, part: torch.Tensor) -> torch.Tensor:
        """[slots, out, in]."""
        return part.transpose(1, 2) if self._math.transposed else part

    def one_token(self, hidden: torch.Tensor, slots: Sequence[int], gates: torch.Tensor) -> torch.Tensor:
        """Run one token through the experts in `slots`, best first as the router gave them.

        Args:
            hidden: [1, hidden].
            slots: k of the bank's.
            gates: [1, k] router weights.

        Returns:
            [1, hidden], the weighted sum in the router's order.
        """
        return finish_token(self._math, self.rows(hidden, slots), gates, hidden.dtype)

    def rows(self, hidden: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        """[k, hidden]: what each of the experts in `slots` makes of one token, before any norm and weighting."""
        table = _table([slots], hidden.device)[0]
        inner = hidden.new_empty(len(slots), self._first.shape[1])
        self._products.few_rows(hidden, self._first, self._biases[0], table, inner)
        inner = self._math.activate(inner)
        outer = hidden.new_empty(len(slots), self._down.shape[1])
        self._products.few_rows(inner.contiguous(), self._down, self._biases[1], table, outer)
        return outer

    def many_tokens(
        self,
        hidden: torch.Tensor,
        grouping: Grouping,
        ready: Iterable[Wave],
        gates: torch.Tensor,
        workspace: Workspace,
    ) -> torch.Tensor:
        """Run a chunk of tokens, wave by wave, in whatever order the experts become ready.

        Args:
            hidden: [tokens, hidden].
            grouping: the chunk's pairs by expert, not rounded.
            ready: every expert of the grouping once, in any waves.
            gates: [tokens, k] router weights.
            workspace: where to compute.

        Returns:
            [tokens, hidden].
        """
        if not grouping.counts:
            return torch.zeros_like(hidden)
        outer = self.rows_of_chunk(hidden, grouping, ready, workspace)
        return finish_chunk(self._math, outer, grouping, gates, hidden.dtype, workspace)

    def rows_of_chunk(
        self, hidden: torch.Tensor, grouping: Grouping, ready: Iterable[Wave], workspace: Workspace
    ) -> torch.Tensor:
        """[rows of the grouping, hidden]: what experts make of their tokens, before any norm and weighting."""
        rows = grouping.gather.numel()
        shape = (rows, hidden.shape[1], hidden.dtype, hidden.device)
        gathered = torch.index_select(hidden, 0, grouping.gather, out=workspace.rows("rows", *shape))
        outer = workspace.rows("outer", *shape)
        block = self._products.block_rows(grouping.rows_each)
        starts, at = {}, 0
        for expert, n in grouping.blocks.items():
            starts[expert] = at
            at += n
        for wave in ready:
            for part in _within(wave, grouping.blocks):
                self._run(part, grouping.blocks, starts, block, gathered, outer)
        return outer

    def _run(
        self,
        wave: Wave,
        sizes: Mapping[int, int],
        starts: Mapping[int, int],
        block: int,
        rows: torch.Tensor,
        outer: torch.Tensor,
    ) -> None:
        inward, outward, at = [], [], 0
        for expert, slot in wave:
            for first in range(0, sizes[expert], block):
                n = min(block, sizes[expert] - first)
                inward.append([slot, starts[expert] + first, at, n])
                outward.append([slot, at, starts[expert] + first, n])
                at += n
        tiles = _table([inward, outward], rows.device)
        inner = rows.new_empty(at, self._first.shape[1])
        self._products.many_rows(rows, self._first, self._biases[0], tiles[0], inner, block)
        inner = self._math.activate(inner).contiguous()
        self._products.many_rows(inner, self._down, self._biases[1], tiles[1], outer, block)


def _within(wave: Wave, sizes: Mapping[int, int]) -> Iterable[Wave]:
    """The wave in parts of at most WAVE_ROWS rows, one expert at least."""
    part: list[tuple[int, int]] = []
    rows = 0
    for expert, slot in wave:
        if part and rows + sizes[expert] > WAVE_ROWS:
            yield part
            part, rows = [], 0
        part.append((expert, slot))
        rows += sizes[expert]
    if part:
        yield part


def _table(values: Sequence[object], device: torch.device) -> torch.Tensor:
    """Small integers on the device."""
    return sent(torch.tensor(values, dtype=torch.int32), device)


def sent(small: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the program's on the device, without waiting for it.

    From pageable memory it would wait. torch keeps the pinned copy until it has been read.
    """
    return small.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else small.to(device)


def available(parts: Mapping[str, torch.Tensor]) -> tuple[bool, str]:
    """Whether these kernels can run over a bank's parts, by device and dtype alone, and why (not)."""
    device = next(iter(parts.values())).device
    dtypes = {part.dtype for part in parts.values()}
    if device.type != "cuda":
        return False, f"experts run on {device.type}, whose kernels take one expert at a time"
    if any(name.endswith(SCALE) for name in parts) or not dtypes <= set(DTYPES):
        return False, "quantised experts are computed one at a time"
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed, so experts are computed one at a time"
    refusal = next(filter(None, (_refusal(str(device), dtype) for dtype in sorted(dtypes, key=str))), "")
    if refusal:
        return False, f"Triton cannot run here ({refusal}), so experts are computed one at a time"
    return True, "Triton computes many experts in one launch"


@functools.cache
def _refusal(device: str, dtype: torch.dtype) -> str:
    """Why first small products fail, as they do without a C compiler for Triton's launchers; else empty.

    Of many rows the largest block is tried, which takes the most shared memory: what a device has too little of would
    else come to light in the middle of a prompt.
    """
    from emoe.kernels import triton_products

    rows = triton_products.block_rows(math.inf)
    ones = torch.ones(1, rows, 64, device=device, dtype=dtype)
    try:
        slot = torch.zeros(1, dtype=torch.int32, device=device)
        few, many = ones.new_empty(1, rows), ones.new_empty(rows, rows)
        triton_products.few_rows(ones[0, :1], ones, None, slot, few)
        tile = torch.tensor([[0, 0, 0, rows]], dtype=torch.int32).to(device)
        triton_products.many_rows(ones[0], ones, None, tile, many, rows)
        right = bool((few == 64).all()) and bool((many == 64).all())
    except Exception as error:  # whatever compilers raise; said in a warning and in the statistics
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        _log.warning("experts are computed one at a time on %s: Triton cannot run there (%s).", device, reason)
        return reason
    if not right:
        _log.warning("experts are computed one at a time on %s: Triton's products are wrong there.", device)
    return "" if right else "its products are wrong"
