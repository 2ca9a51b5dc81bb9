"""Running what `emoe.bench.reach` plans: does the longest prompt fit where it should, and is a large batch fast?

Each run is a replay of a planted checkpoint in a process of its own (`emoe.bench.decode`): what fits is every expert at
the base length or batch, beside fewer experts at the length or batch that the plan found. Rounds take turns, so that a
drift of the machine meets all of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from emoe.bench import decode
from emoe.bench.reach import Reach
from emoe.bench.results import Outcome, decode_rate
from emoe.bench.settings import DecodeSettings
from emoe.config import ExpertMemory, Mode
from emoe.errors import UsageError

Say = Callable[[str], None]

EVERYTHING = ExpertMemory("share", 1.0)


@dataclass(slots=True)
class Run:
    """One size, with some experts resident. The lists have an entry for each round; times in seconds, bytes above the
    imports, `answered_per_s` tokens after the prompts over all the time, prompts included."""

    what: str
    expert_memory: str
    mode: Mode
    prompt: int
    batch: int
    chunk: int | None
    plan_bytes: int = 0
    peak_bytes: list[int] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    decode_tokens_per_s: list[float] = field(default_factory=list)
    answered_per_s: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def off(self) -> float | None:
        """The highest peak over the plan, less 1; None where nothing was measured."""
        return max(self.peak_bytes) / self.plan_bytes - 1 if self.peak_bytes else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"off": self.off}


def to_run(reaches: Sequence[Reach], what: str, most_times: float) -> Reach:
    """Of the planned prompts (or batches) the one to run: up to `most_times` the base, in the longest passes that reach
    as far as any does.

    Raises:
        UsageError: none was planned.
    """
    of_kind = [found for found in reaches if found.what == what]
    if not of_kind:
        raise UsageError(f"no {what} was planned")
    wanted = min(max(found.found for found in of_kind), int(most_times * of_kind[0].base))
    chosen = next(found for found in of_kind if found.found >= wanted)
    return replace(chosen, found=wanted)


def runs_of(found: Reach, memory: ExpertMemory, modes: Sequence[Mode], prompt: int) -> list[Run]:
    """Every expert at the base, then `memory` at what was found, in each mode; `prompt` tokens where batches grow."""

    def sized(mode: Mode, experts: ExpertMemory, size: int, chunk: int | None) -> Run:
        tokens, batch = (size, 1) if found.what == "prompt" else (prompt, size)
        return Run(found.what, str(experts), mode, tokens, batch, chunk)

    return [
        sized("exact", EVERYTHING, found.base, None),
        *(sized(mode, memory, found.found, found.chunk) for mode in modes),
    ]


def measure(runs: Sequence[Run], usual: DecodeSettings, rounds: int, say: Say) -> None:
    """Fill `runs` in, one process at a time, round after round; `usual` says the model, the tokens after each prompt,
    the threads and how experts are read. A run that fails has an `error` and no further rounds.

    Raises:
        UsageError: no planted checkpoint, or more tokens than the model has positions.
        BudgetError, CheckpointError, UnsupportedModelError: as loading.
    """
    for number in range(rounds):
        for run in runs:
            if run.error is None:
                said = f"{run.expert_memory} {run.mode}, {run.batch} x {run.prompt} tokens"
                say(f"round {number + 1}/{rounds}: {said}")
                report = decode.run(_settings(run, usual), say)
                note(run, report.outcomes[0])


def _settings(run: Run, usual: DecodeSettings) -> DecodeSettings:
    return replace(
        usual,
        budgets=(ExpertMemory.parse(run.expert_memory),),
        modes=(run.mode,),
        baselines=(),
        prompt_tokens=run.prompt,
        batch=run.batch,
        chunk=run.chunk,
        rounds=1,
        forced=True,
        one_at_a_time=True,
    )


def note(run: Run, outcome: Outcome) -> None:
    """Add what one process measured."""
    run.plan_bytes, run.error = outcome.plan_bytes, outcome.error
    for sample in outcome.samples.values():
        run.peak_bytes.append(int(sample["peak_bytes"]))
        run.first_token_s.append(float(sample["first_token_s"]))
        run.decode_tokens_per_s.append(decode_rate(sample))
        tokens = len(sample["tokens"]) * int(sample["batch"])
        run.answered_per_s.append(tokens / (float(sample["first_token_s"]) + float(sample["decode_s"])))


def middle(values: Sequence[float]) -> float | None:
    """The median; None of nothing."""
    return statistics.median(values) if values else None


def gains(runs: Sequence[Run]) -> list[tuple[Run, float, float]]:
    """Runs of batches with fewer experts: how many times the decode rate, and the rate of answers, of every expert."""
    batches = [run for run in runs if run.what == "batch" and run.decode_tokens_per_s]
    if not batches or batches[0].expert_memory != str(EVERYTHING):
        return []
    base = batches[0]
    return [
        (
            run,
            statistics.median(run.decode_tokens_per_s) / statistics.median(base.decode_tokens_per_s),
            statistics.median(run.answered_per_s) / statistics.median(base.answered_per_s),
        )
        for run in batches[1:]
    ]
