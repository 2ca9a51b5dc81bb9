"""Recording a bound model's routes into a trace file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from emoe.checkpoint.index import ExpertIndex
from emoe.model.runtime import Pass, Runtime
from emoe.residency.budget import LayerNeed
from emoe.routing.recorder import TraceWriter


def record_trace(
    runtime: Runtime, index: ExpertIndex, needs: Sequence[LayerNeed], path: Path
) -> Callable[[], object]:
    """Record every route from now on; return the function that writes the file.

    Each sequence of a batch is a prompt of the trace, labelled with `runtime.task`; padding is left out. In mode
    `resident` the model's own choice is recorded, not what was run in its place.

    Raises:
        UsageError: `path` cannot be written.
    """
    writer = TraceWriter(
        path,
        sorted(need.layer for need in needs),
        num_experts=max(need.experts for need in needs),
        top_k=max(need.top_k for need in needs),
        source={"model": index.path.name, "mode": runtime.mode},
    )
    prompts: list[int] = []
    ended: list[bool] = []
    current: list[Pass] = []

    def mask_of(now: Pass) -> torch.Tensor | None:
        """Padding, and sequences of a batch that have ended: `generate` feeds them on until the others end."""
        if now.phase == "decode" and now.input_ids is not None and now.batch > 1:
            for row, token in enumerate(now.input_ids[:, -1].tolist()):
                ended[row] = ended[row] or token in runtime.end_tokens
            return ~torch.tensor(ended)
        return now.mask

    def begin(now: Pass) -> None:
        if now.new_prompt or len(prompts) != now.batch:
            prompts[:] = [
                writer.add_prompt(task=runtime.task, token_ids=_tokens_of(now, row)) for row in range(now.batch)
            ]
            ended[:] = [False] * now.batch
        writer.begin_pass(prompts, now.phase, now.tokens, mask=mask_of(now), token_ids=now.input_ids)
        current[:] = [now]

    def observe(now: Pass, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        if not current or current[0] is not now:
            begin(now)
        writer.record(layer, ids, weights)

    runtime.observers.append(observe)
    return writer.finish


def _tokens_of(now: Pass, row: int) -> list[int] | None:
    """A sequence's prompt without its padding."""
    if now.input_ids is None:
        return None
    ids = now.input_ids[row]
    if now.mask is not None:
        ids = ids[now.mask.view(now.batch, now.tokens)[row]]
    found: list[int] = ids.tolist()
    return found
