"""What a run is asked: its settings, the prompts to learn from and to score, and other models' routes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from emoe import nano
from emoe.errors import UsageError
from emoe.profiling.prompts import Prompt, first_of_each, read_prompts, tasks_of
from emoe.routing.counts import PromptCounts, holds_counts, read_counts
from emoe.routing.trace import Trace

Side = Literal["learn", "score"]

PAPER_SHARE = "60%"
"""Of the experts, in sections 5.5 and 5.6."""
QUICK_PROMPTS = 4
"""Prompts of each task on each side of a quick pass."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run is of.

    model: a folder or hub id, None for emoe-nano; prompts: JSON lines as `emoe profile` reads them, None for those
    shipped with emoe-nano; learn: prompts to learn from, None for half of `prompts`; traces: other models' routes by
    name; arrivals: a file of request arrivals; prompt_tokens: longer prompts lose their middle; new_tokens: of an
    answer; threads: of torch; share: of the experts that the speed experiments keep; memory: bytes that the process may
    use, None for what the machine has free.
    """

    out: Path
    model: str | None = None
    quick: bool = False
    seed: int = 0
    prompts: Path | None = None
    learn: Path | None = None
    traces: tuple[tuple[str, Path], ...] = ()
    arrivals: Path | None = None
    prompt_tokens: int = 384
    new_tokens: int = 48
    threads: int = 1
    share: str = PAPER_SHARE
    memory: int | None = None


def two_sides(settings: Settings) -> dict[Side, list[Prompt]]:
    """Prompts to learn from and to score; without prompts to learn from, of each task every other one.

    Raises:
        UsageError: no prompts are given for a model of one's own, a file of them is damaged, or a task has none to
            learn from.
    """
    given = nano.path().parent / "prompts.jsonl" if settings.prompts is None else settings.prompts
    if settings.prompts is None and settings.model is not None:
        raise UsageError(
            "experiments on a model of your own need prompts of its tasks: give --prompts FILE, JSON lines such as "
            '{"task": "maths", "prompt": "What is 2 + 2?", "reference": "4"}.'
        )
    score = read_prompts(given)
    if settings.learn is not None:
        learn = read_prompts(settings.learn)
    else:
        seen: dict[str, int] = {}
        sides: tuple[list[Prompt], list[Prompt]] = ([], [])
        for prompt in score:
            number = seen[prompt.task] = seen.get(prompt.task, -1) + 1
            sides[number % 2].append(prompt)
        learn, score = sides[1], sides[0]
    found: dict[Side, list[Prompt]] = {"learn": learn, "score": score}
    if settings.quick:
        found = {side: [rows[i] for i in first_of_each(rows, QUICK_PROMPTS)] for side, rows in found.items()}
    missing = sorted(set(tasks_of(found["score"])) - set(tasks_of(found["learn"])))
    if missing:
        raise UsageError(
            f"no prompt to learn from is of the task {missing[0]!r}: give at least two of each task, or --learn FILE."
        )
    return found


def other_routes(path: Path) -> Trace | PromptCounts:
    """A trace, or the counts of a file that holds no order of tokens, less what prompts of a label begin with alike.

    Raises:
        TraceError: the file is neither, or damaged.
    """
    return read_counts(path).without_prefix() if holds_counts(path) else Trace.read(path)
