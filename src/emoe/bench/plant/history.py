"""A history for a planted checkpoint: routes of the recorded trace's other prompts, as its layers would route them.

What learns from recorded routes (`emoe profile` trains it on a user's own prompts) can then be measured on planted
checkpoints: none of the prompts that are fed is in the history, not even the rest of one that was cut.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from emoe.bench.plant.card import LABEL, ROUTES, PlantCard, is_planted, read_card
from emoe.bench.plant.resample import fit, fit_others, read_trace
from emoe.bench.plant.shapes import published
from emoe.bench.shapes import Shape
from emoe.errors import UsageError
from emoe.routing.trace import DECODE, Trace

HISTORY = "emoe_plant_history.npz"
"""Beside the card of a planted checkpoint, in emoe's own trace format, with the recorded trace's task labels."""

OVERLAP_TOKENS = 8
"""So many tokens in a row routed alike in every layer are the same text: no two of gpt-oss-20b's first 1024 tokens and
the 92,000 of its other prompts are, over six layers."""


def history_of(trace: Trace, shape: Shape, card: PlantCard) -> Trace:
    """Routes of the prompts that `card`'s checkpoint replays nothing of, as its shape routes.

    Each prompt says under "prompt" which of the recorded trace it is.

    Raises:
        UsageError: there are no others.
    """
    routes, numbers = fit_others(trace, shape, card.tokens, card.seed)
    count = len(routes.experts)
    return Trace(
        experts=routes.experts,
        phase=np.full(count, DECODE, dtype=np.uint8),
        step=np.arange(count, dtype=np.int64),
        offsets=np.array([0, *(end for _, end in routes.prompts)], dtype=np.int64),
        task=trace.task[list(numbers)],
        tasks=trace.tasks,
        layers=np.array(shape.moe_layers, dtype=np.int32),
        num_experts=shape.experts,
        prompts=tuple({"prompt": number} for number in numbers),
        source={"history of": card.shape, "trace": card.trace, "kept": routes.kept, "about": LABEL},
    )


def add_history(folder: str | Path, trace: str | Path) -> Trace:
    """Write the history of the planted checkpoint in `folder` from the trace that it was planted from.

    Raises:
        UsageError: no planted checkpoint; one of another trace, or of a shape that is not published; no other prompts.
        TraceError: a trace is missing or damaged, or the history cannot be written.
    """
    folder = Path(folder)
    card = read_card(folder)
    shape = published(card.shape, card.layers)
    recorded, planted = read_trace(trace, shape), Trace.read(folder / ROUTES)
    if not np.array_equal(fit(recorded, shape, card.tokens, card.seed).experts, planted.experts):
        raise UsageError(f"{folder} was planted from {card.trace!r}, and {trace} gives other routes; name that trace")
    made = history_of(recorded, shape, card)
    made.write(folder / HISTORY)
    return made


def check_history(folder: str | Path, history: Trace, name: str | Path) -> None:
    """Refuse a history that holds what is fed to the checkpoint in `folder`, which may be any.

    Raises:
        UsageError: a text of the planted trace is in `history`; what it taught would be no prediction.
    """
    folder = Path(folder)
    if not is_planted(folder):
        return
    both = _texts(Trace.read(folder / ROUTES)) & _texts(history)
    if both:
        raise UsageError(
            f"{name} holds texts that {folder} is fed ({len(both)} times {OVERLAP_TOKENS} tokens in a row are routed "
            "alike in every layer), so what it teaches is no prediction. Give a history of other prompts: "
            "emoe bench plant --history writes one."
        )


def _texts(trace: Trace) -> set[bytes]:
    """Routes of every `OVERLAP_TOKENS` tokens in a row within a prompt, those whose tokens all route alike left out."""
    rows = trace.experts.astype(np.uint16)
    found = set()
    for start, end in zip(trace.offsets[:-1].tolist(), trace.offsets[1:].tolist(), strict=True):
        for at in range(start, end - OVERLAP_TOKENS + 1):
            text = rows[at : at + OVERLAP_TOKENS]
            if (text != text[0]).any():
                found.add(text.tobytes())
    return found
