"""What every command prints with: notes on stderr, tables, JSON on stdout, and progress while loading."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from emoe.config import format_bytes

REDRAW_S = 0.1  # on a terminal
REPORT_S = 10.0  # elsewhere (a log): seldom enough to be read, often enough to show that nothing hangs


def note(text: str) -> None:
    """One line for the user, beside the output proper."""
    print(f"emoe: {text}", file=sys.stderr, flush=True)


def print_json(values: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """The one JSON value of a command with --json: an object, or a list of them."""
    print(json.dumps(values, default=str))


def table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), indent: str = "  ") -> str:
    """Rows of equal length as aligned columns; columns in `right` are aligned to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(f"{indent}{line}".rstrip() for line in lines)


def lossy_experts(expert_dtype: str) -> str:
    """What storing experts as `expert_dtype` means for the text."""
    return f"experts are stored and computed as {expert_dtype}, so the text can differ from the full model's"


class ProgressLine:
    """Bytes, rate and remaining time on stderr; call it with (bytes done, bytes in all)."""

    def __init__(self, what: str, stream: TextIO | None = None) -> None:
        self._what = what
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        # Of the first call: what came before it (imports, dense weights) says nothing about the rate.
        self._start: tuple[float, int] | None = None
        self._shown = 0.0

    def __call__(self, done: int, total: int) -> None:
        """Show the state, if it is time to, or everything is done."""
        now = time.monotonic()
        if self._start is None:
            self._start = now, done
            self._shown = 0.0 if self._terminal else now
        finished = done >= total
        if now - self._shown < (REDRAW_S if self._terminal else REPORT_S) and not (finished and self._terminal):
            return
        self._shown = now
        line = self.line(done, total, now - self._start[0], done - self._start[1])
        if self._terminal:
            print(f"\r\x1b[K{line}", end="\n" if finished else "", file=self._stream, flush=True)
        else:
            print(f"emoe: {line}", file=self._stream, flush=True)

    def line(self, done: int, total: int, seconds: float, since: int) -> str:
        """The text for `done` of `total` bytes, `since` of them in the last `seconds`."""
        rate = since / max(seconds, 1e-3)
        left = (total - done) / rate if rate > 0 else 0.0
        share = done / total if total else 1.0
        end = f"{clock(left)} left" if done < total else f"in {seconds:.1f} s"
        return (
            f"{self._what} {format_bytes(done)} of {format_bytes(total)} ({share:.0%})  "
            f"{format_bytes(int(rate))}/s  {end}"
        )


def clock(seconds: float) -> str:
    """Minutes and seconds: "2:05"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
