"""Recording a bound model's routes into a trace file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from emoe.checkpoint.index import ExpertIndex
from emoe.model.collecting import LiveTokens, tokens_of
from emoe.model.passes import Pass
from emoe.model.runtime import Runtime
from emoe.residency.budget import LayerNeed
from emoe.routing.recorder import TraceWriter
from emoe.routing.trace import FINAL_LAYER


def record_trace(runtime: Runtime, index: ExpertIndex, needs: Sequence[LayerNeed], path: Path) -> Callable[[], object]:
    """Record every route from now on; return the function that writes the file.

    Each sequence is a prompt of the trace, labelled with its task: the caller's label, else what a profile's
    keywords say. Padding is left out. Where misses are rerouted the model's own choice is recorded, not what was run in
    its place.

    Raises:
        UsageError: `path` cannot be written.
    """
    writer = TraceWriter(
        path,
        sorted(need.layer for need in needs),
        num_experts=max(need.experts for need in needs),
        top_k=max(need.top_k for need in needs),
        source={
            "model": index.path.name,
            "mode": runtime.mode,
            "expert_bytes": max(index.stored_nbytes(need.layer, 0) for need in needs),
        },
    )
    prompts: dict[int, int] = {}  # sequence -> its prompt in the trace
    live = LiveTokens(runtime)
    current: list[Pass] = []
    whole_passes = [0]  # of several tokens, all of which ran in the final layer

    def begin(now: Pass) -> None:
        if not now.announced and (now.new_prompt or len(prompts) != now.batch):
            prompts.clear()
        for row, segment in enumerate(now.segments):
            if segment.sequence not in prompts:
                task = runtime.tasks[row] if len(runtime.tasks) == len(now.segments) else runtime.task
                whole = not now.announced or segment.tokens >= segment.prompt_tokens
                ids = tokens_of(now, row) if whole else None
                prompts[segment.sequence] = writer.add_prompt(task=task, token_ids=ids)
        of = [prompts[segment.sequence] for segment in now.segments for _ in range(segment.tokens)]
        phases = [segment.phase for segment in now.segments for _ in range(segment.tokens)]
        whole_passes[0] += len(of) > len(now.segments) and not (runtime.narrows and now.kept == 1)
        writer.begin_pass(of, phases, mask=live.mask_of(now), token_ids=now.input_ids)
        current[:] = [now]

    def observe(now: Pass, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        if not current or current[0] is not now:
            begin(now)
        writer.record(layer, ids, weights)

    runtime.observers.append(observe)

    def finish() -> None:
        if runtime.final is not None and not whole_passes[0]:
            writer.say(**{FINAL_LAYER: runtime.final.layer})
        writer.finish()

    return finish
