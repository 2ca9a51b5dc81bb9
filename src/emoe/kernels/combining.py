"""The memory that a chunk's experts are computed in, and the weighted sum of what they give."""

from __future__ import annotations

import torch

COMBINE_TOKENS = 128
"""Tokens whose expert outputs are weighted and added at once: what is added stays in the processor's cache."""

WORKSPACE_KEPT_BYTES = 32 << 20
"""The largest workspace kept from one layer to the next: attention, which runs in between, needs memory too."""


class Workspace:
    """Memory that chunks are computed in, kept from layer to layer while it is small.

    Taken anew for every layer, rows of a few MiB come back from the operating system each time, and are zeroed page by
    page at their first use: a tenth of a prefill of 512 tokens (see docs/log.md).
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self._held: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def rows(self, name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return a [rows, columns] tensor of anything; it is overwritten when the same name is asked for again."""
        key = (name, dtype, device)
        held = self._held.get(key)
        if held is None or held.numel() < rows * columns:
            held = None
            self._held.pop(key, None)  # given back before more is taken
            # Made in inference mode, it could not be written to outside it.
            with torch.inference_mode(False):
                self._held[key] = held = torch.empty(rows * columns, dtype=dtype, device=device)
        return held[: rows * columns].view(rows, columns)

    def trim(self) -> None:
        """Give the memory back if it is more than `WORKSPACE_KEPT_BYTES`."""
        if sum(held.nbytes for held in self._held.values()) > WORKSPACE_KEPT_BYTES:
            self._held.clear()


def combine(
    outer: torch.Tensor,
    gates: torch.Tensor,
    dtype: torch.dtype,
    place: torch.Tensor | None = None,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """Weight expert outputs [rows, hidden] by [tokens, k] gates and add each token's in the router's order.

    `place` [tokens * k] says in which row each (token, choice) pair lies; None: in that order.
    """
    tokens, k = gates.shape
    workspace = workspace or Workspace()
    result = outer.new_empty(tokens, outer.shape[1], dtype=dtype)
    weighted_dtype = torch.promote_types(outer.dtype, gates.dtype)
    for start in range(0, tokens, COMBINE_TOKENS):
        end = min(start + COMBINE_TOKENS, tokens)
        shape = ((end - start) * k, outer.shape[1])
        pairs = outer[start * k : end * k]
        if place is not None:
            pairs = workspace.rows("pairs", *shape, outer.dtype, outer.device)
            torch.index_select(outer, 0, place[start * k : end * k], out=pairs)
        weighted = workspace.rows("weighted", *shape, weighted_dtype, outer.device)
        torch.mul(pairs, gates[start:end].reshape(-1, 1), out=weighted)
        result[start:end] = weighted.view(end - start, k, -1).sum(dim=1)
    return result
