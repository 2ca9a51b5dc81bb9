"""Peak memory of prompts and batches that were really run, each in a process of its own (Figures 17 and 18)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from emoe.bench.client import WorkerClient
from emoe.bench.reproduce.ways import ALL, OURS, middle, sequences
from emoe.bench.reproduce.workbench import Workbench
from emoe.bench.settings import Contender
from emoe.config import ExpertMemory
from emoe.planner import facts_of
from emoe.planner.facts import Facts

NEW = 16
"""Tokens after each prompt."""
SAME = 1.02
"""A peak up to so many times another's counts as the same memory: what invariant 2 allows a plan to be off."""
USUAL_PROMPT = 512
"""Tokens of the paper's prompt with every expert resident; a model with few positions gets fewer, see `base_prompt`."""


def facts(bench: Workbench) -> Facts:
    """The planner's facts of the model."""
    return facts_of(bench.settings.model)[1]


def base_prompt(of: Facts) -> int:
    """Tokens of the prompt that is compared with: the paper's, or a thirty-second of the positions if that is less.

    40 times as long then nearly fits; emoe-nano has 1,024 positions.
    """
    return USUAL_PROMPT if of.max_context is None else max(1, min(USUAL_PROMPT, of.max_context // 32))


def peak(bench: Workbench, way: str, batch: int, prompt: int, chunk: int | None = None) -> float:
    """Bytes at the peak of one batch, above what the process held after its imports; the median of the repeats.

    way: `ALL`, or `OURS` (the share of the experts that it keeps).
    """
    key = {"way": way, "batch": batch, "prompt": prompt, "chunk": chunk}
    repeats = [{**key, "repeat": turn} for turn in range(bench.pick(1, 2))]
    return middle([float(bytes_) for bytes_ in bench.cells("peaks", repeats, lambda **one: _peak(bench, **one))])


def largest_run(bench: Workbench, planned: int, least: int, limit: float, measure: Callable[[int], float]) -> int:
    """The largest size up to `planned` whose measured peak is within `limit` bytes; `least` where none above it is.

    Sizes are halved until one fits, then bisected towards the last that did not.
    """
    size, above = planned, None
    while size > least and measure(size) > limit:
        size, above = max(least, size // 2), size
    for _ in range(bench.pick(1, 3)):
        if above is None or above - size < 2:
            break
        middling = (size + above) // 2
        size, above = (middling, above) if measure(middling) <= limit else (size, middling)
    return size


def _peak(bench: Workbench, way: str, batch: int, prompt: int, chunk: int | None, repeat: int) -> int:
    if way not in (ALL, OURS):
        raise ValueError(f"peaks are measured of {ALL} and {OURS}, not of {way}")
    one = (
        Contender("emoe", None, "exact")
        if way == ALL
        else Contender("emoe", ExpertMemory.parse(bench.share), "resident")
    )
    ids = sequences(bench, batch, prompt + NEW, repeat)
    with WorkerClient(f"{way}, {batch} x {prompt} tokens", threads=bench.settings.threads) as client:
        options: dict[str, Any] = {"reader": "auto"}
        client.ask(
            "load",
            contender=one.as_dict(),
            folder=str(bench.folder),
            threads=bench.settings.threads,
            options=options,
        )
        found = client.ask("replay", ids=ids, prompt_tokens=prompt, chunk=chunk)
    return int(found["peak_bytes"])
