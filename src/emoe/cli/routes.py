"""Which routes a command counts misses on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from emoe.bench.plant.card import LABEL, ROUTES, is_planted

if TYPE_CHECKING:
    from emoe.routing.trace import Trace

TRACE_TOKENS = 1000
"""Of a long trace so many tokens, in whole prompts, say what is missed: the best possible takes a while to find."""


def trace_of(given: str | None, tokens: int, folder: Path) -> tuple[Trace | None, str]:
    """The trace to find misses of, and what is said of it: the given one, or a planted checkpoint's own, or none.

    Raises:
        TraceError: it cannot be read.
    """
    file: str | Path | None = given
    planted = file is None and is_planted(folder)
    if planted:
        file = folder / ROUTES
    if file is None:
        return None, "every expert as likely as any other (give --trace for real ones)"
    from emoe.routing.trace import Trace
    from emoe.simulation.missing import first_tokens

    trace = first_tokens(Trace.read(file), tokens)
    label = f" ({LABEL})" if planted else ""
    return trace, f"{len(trace)} tokens of {trace.num_prompts} prompts of {file}{label}"
