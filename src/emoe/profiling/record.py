"""Answer every prompt and record its routes, in parts, so that a run that was stopped can go on."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from emoe.checkpoint.whole import write_whole
from emoe.model.bind import binding_of, label_task, layer_needs
from emoe.model.tracing import record_trace
from emoe.profiling.prompts import Prompt
from emoe.profiling.running import Answer, answer
from emoe.routing.trace import Trace

PART_S = 30.0
"""A part is closed after this many seconds: no more than that is lost when the process is killed."""

Step = Callable[[int, int], None]
"""Called with (prompts done, prompts in all)."""


def record(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    ids: Sequence[Sequence[int]],
    new_tokens: int,
    folder: Path,
    step: Step,
    part_s: float | None = None,
) -> tuple[Trace, list[Answer]]:
    """Answer what `folder` does not yet hold, and return everything recorded; `part_s` stands in for `PART_S`.

    Raises:
        ReadError: an expert could not be read.
    """
    part_s = PART_S if part_s is None else part_s
    folder.mkdir(parents=True, exist_ok=True)
    answers = _answers(folder)
    step(len(answers), len(prompts))
    while len(answers) < len(prompts):
        part = _part(folder, len(answers))
        start = time.monotonic()
        made: list[Answer] = []
        with recording(model, part.with_suffix(".npz")):
            for index in range(len(answers), len(prompts)):
                if made and time.monotonic() - start >= part_s:
                    break
                label_task(model, prompts[index].task)
                made.append(answer(model, ids[index], new_tokens))
                step(index + 1, len(prompts))
        # The answers are written after the trace: a part counts as done when both are there.
        write_whole(part, json.dumps([dataclasses.asdict(each) for each in made]).encode())
        answers += made
    return join([Trace.read(part.with_suffix(".npz")) for part in _parts(folder)]), answers


def read_recorded(folder: Path, prompts: int) -> tuple[Trace, list[Answer]] | None:
    """What `record` left in the folder, without the model; None unless it holds that many prompts."""
    answers = _answers(folder)
    if not answers or len(answers) < prompts:
        return None
    return join([Trace.read(part.with_suffix(".npz")) for part in _parts(folder)]), answers


@contextmanager
def recording(model: PreTrainedModel, path: Path) -> Iterator[None]:
    """Record routes inside the `with` block; nothing is written when it ends with an error."""
    binding = binding_of(model)
    observers = list(binding.runtime.observers)
    finish = record_trace(binding.runtime, binding.index, layer_needs(binding.index, model), path)
    try:
        yield
        finish()
    finally:
        binding.runtime.observers[:] = observers


def _part(folder: Path, first: int) -> Path:
    """The answers of the part that begins with prompt number `first`; its routes lie beside it."""
    return folder / f"part-{first:06d}.json"


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.json"))


def _answers(folder: Path) -> list[Answer]:
    """Of the finished parts."""
    rows: list[dict[str, Any]] = [row for part in _parts(folder) for row in json.loads(part.read_bytes())]
    return [Answer(**row) for row in rows]


def join(traces: Sequence[Trace]) -> Trace:
    """One trace of several of the same model, one after another in time."""
    first = traces[0]
    if len(traces) == 1:
        return first
    tasks = tuple(dict.fromkeys(task for trace in traces for task in trace.tasks))
    labels, steps, before = [], [], 0
    for trace in traces:
        numbers = np.array([tasks.index(task) for task in trace.tasks] + [-1], dtype=np.int32)
        labels.append(numbers[trace.task])
        steps.append(trace.step + before)
        before = int(steps[-1].max(initial=before - 1)) + 1

    def together(name: str) -> Any:
        arrays = [getattr(trace, name) for trace in traces]
        return None if any(array is None for array in arrays) else np.concatenate(arrays)

    def offsets(name: str) -> Any:
        arrays = [getattr(trace, name) for trace in traces]
        if any(array is None for array in arrays):
            return None
        return np.concatenate([[0], np.cumsum(np.concatenate([np.diff(array) for array in arrays]))]).astype(np.int64)

    return Trace(
        experts=together("experts"),
        weights=together("weights"),
        phase=together("phase"),
        step=np.concatenate(steps),
        token_ids=together("token_ids"),
        offsets=offsets("offsets"),
        task=np.concatenate(labels),
        tasks=tasks,
        layers=first.layers,
        num_experts=first.num_experts,
        prompt_token_ids=together("prompt_token_ids"),
        prompt_token_offsets=offsets("prompt_token_offsets"),
        prompts=tuple(about for trace in traces for about in trace.prompts),
        source=first.source,
    )
