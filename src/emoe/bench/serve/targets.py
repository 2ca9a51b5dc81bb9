"""Latency targets by task: given, or a multiple of what an unloaded server needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from emoe.errors import UsageError

EVERY_TASK = "*"
"""The key of targets for all tasks that have none of their own."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Seconds; None: no target.

    Attributes:
        ttft_s: for the time to the first token.
        tpot_s: for the mean time of each later token.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None

    def met(self, ttft_s: float, tpot_s: float | None) -> bool:
        """Whether an answer kept both. One of a single token has no time per later token and keeps that target."""
        if self.ttft_s is not None and ttft_s > self.ttft_s:
            return False
        return self.tpot_s is None or tpot_s is None or tpot_s <= self.tpot_s

    def scaled(self, factor: float) -> Targets:
        """Both multiplied by `factor`."""
        return Targets(*(None if value is None else value * factor for value in (self.ttft_s, self.tpot_s)))

    def as_dict(self) -> dict[str, float | None]:
        """For JSON."""
        return {"ttft_s": self.ttft_s, "tpot_s": self.tpot_s}


@dataclass(frozen=True, slots=True)
class Book:
    """Targets of all tasks; what has none anywhere has no targets."""

    by_task: Mapping[str, Targets]

    def of(self, task: str | None) -> Targets:
        """Of one task: its own, else those of `EVERY_TASK`."""
        return self.by_task.get(task or EVERY_TASK) or self.by_task.get(EVERY_TASK) or Targets()


def parse_targets(words: Iterable[str]) -> dict[str, Targets]:
    """Targets from words like "qa=500/40", "converse=800/-" or "1000/100" (all tasks); milliseconds, "-" for none.

    Raises:
        UsageError: a word that is none, or a task given twice.
    """
    found: dict[str, Targets] = {}
    for word in words:
        task, equals, numbers = word.rpartition("=")
        ttft, slash, tpot = numbers.partition("/")
        if (equals and not task) or not slash:
            raise UsageError(f"--slo {word!r}: write TASK=TTFT/TPOT in milliseconds, like qa=500/40, or 500/- for all")
        task = task or EVERY_TASK
        if task in found:
            raise UsageError(f"--slo {word!r}: {task} has targets already")
        found[task] = Targets(_seconds(word, ttft), _seconds(word, tpot))
    return found


def _seconds(word: str, text: str) -> float | None:
    if text.strip() == "-":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"--slo {word!r}: {text!r} is neither a number of milliseconds above 0 nor -")
    return value / 1e3


def unloaded(samples: Sequence[tuple[float, float | None]]) -> Targets:
    """Medians of (time to first token, time per later token) of answers that had the server to themselves."""
    tpots = [tpot for _, tpot in samples if tpot is not None]
    return Targets(_median([ttft for ttft, _ in samples]), _median(tpots) if tpots else None)


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
