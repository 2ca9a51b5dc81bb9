"""What a load found: arithmetic over the records of its requests. Plain Python and numpy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from emoe.bench.serve.client import INTERRUPTED, Record, Server
from emoe.bench.serve.settings import LoadSettings
from emoe.bench.serve.targets import Book, Targets

SCHEMA = "emoe-bench-serve/1"
PERCENTILE = 99

MEASURES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
"""Short name -> what vLLM's table calls it."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds, of some requests."""

    mean: float
    median: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None of none. Percentiles are interpolated linearly, as numpy does and vLLM's table."""
        if not values:
            return None
        median, last = np.percentile(values, [50, PERCENTILE])
        return cls(float(np.mean(values)), float(median), float(last))

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {"mean_s": self.mean, "median_s": self.median, "p99_s": self.p99}


@dataclass(frozen=True, slots=True)
class Summary:
    """Some of the requests: all, or those of a task.

    Attributes:
        requests: how many were sent.
        successful: whole answers.
        met: those of them that kept their targets.
        duration_s: of the whole run: from the first request sent to the last one's end.
        input_tokens: of whole answers, as far as the server tells.
        output_tokens: of whole answers.
        spreads: by name as in `MEASURES`; of whole answers only.
    """

    requests: int
    successful: int
    met: int
    duration_s: float
    input_tokens: int
    output_tokens: int
    spreads: Mapping[str, Spread | None]

    @classmethod
    def of(cls, records: Sequence[Record], duration_s: float) -> Summary:
        """Of these records, in a run that took `duration_s`."""
        whole = [record for record in records if record.ok]
        values: dict[str, list[float]] = {
            "ttft": [record.ttft_s for record in whole if record.ttft_s is not None],
            "tpot": [record.tpot_s for record in whole if record.tpot_s is not None],
            "itl": [gap for record in whole for gap in record.itl_s],
            "e2el": [record.e2e_s for record in whole if record.e2e_s is not None],
        }
        return cls(
            requests=len(records),
            successful=len(whole),
            met=sum(record.met for record in whole),
            duration_s=duration_s,
            input_tokens=sum(record.input_tokens or 0 for record in whole),
            output_tokens=sum(record.output_tokens for record in whole),
            spreads={name: Spread.of(found) for name, found in values.items()},
        )

    def per_s(self, count: int) -> float:
        """A rate over the run."""
        return count / self.duration_s if self.duration_s > 0 else 0.0

    @property
    def goodput(self) -> float:
        """Requests per second that kept their targets."""
        return self.per_s(self.met)

    @property
    def met_share(self) -> float:
        """Of all that were sent: a request that was refused or failed has not kept its targets."""
        return self.met / self.requests if self.requests else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "requests": self.requests,
            "successful": self.successful,
            "met": self.met,
            "met_share": self.met_share,
            "goodput_per_s": self.goodput,
            "requests_per_s": self.per_s(self.successful),
            "output_tokens_per_s": self.per_s(self.output_tokens),
            "total_tokens_per_s": self.per_s(self.input_tokens + self.output_tokens),
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            **{name: spread.as_dict() if spread else None for name, spread in self.spreads.items()},
        }


@dataclass(slots=True)
class LoadReport:
    """A finished run, or as much of one as there is.

    Attributes:
        settings, server, book: what was asked, whom, and the targets.
        calibrated: what the unloaded server needed, by task.
        records: of every request that was sent, in order.
        planned: how many were to be sent.
        notes: what a reader should know.
    """

    settings: LoadSettings
    server: Server
    book: Book
    calibrated: Mapping[str, Targets]
    records: list[Record]
    planned: int
    notes: list[str] = field(default_factory=list)

    @property
    def start_s(self) -> float:
        """When the first request was sent."""
        return min((record.sent_s for record in self.records), default=0.0)

    @property
    def duration_s(self) -> float:
        """From the first request sent to the last one's end."""
        return max((record.ended_s for record in self.records), default=0.0) - self.start_s

    @property
    def interrupted(self) -> bool:
        """Whether it was ended before all was sent and answered."""
        return len(self.records) < self.planned or any(record.error == INTERRUPTED for record in self.records)

    @property
    def tasks(self) -> list[str | None]:
        """Those that were sent, in order of their names."""
        return sorted({record.task for record in self.records}, key=lambda task: (task is None, task or ""))

    def summary(self) -> Summary:
        """Of everything."""
        return Summary.of(self.records, self.duration_s)

    def of_task(self, task: str | None) -> Summary:
        """Of one task, over the duration of the whole run."""
        return Summary.of([record for record in self.records if record.task == task], self.duration_s)

    def errors(self) -> dict[str, tuple[int, str]]:
        """By name: how often, and what the first one said."""
        counts = Counter(record.error for record in self.records if record.error is not None)
        first = {record.error: record.message for record in reversed(self.records)}
        return {name: (count, first[name]) for name, count in counts.most_common()}

    def late(self) -> Spread | None:
        """How late the generator sent."""
        return Spread.of([record.late_s for record in self.records])

    def as_dict(self) -> dict[str, Any]:
        """For JSON; docs/benchmarks.md explains every field."""
        late = self.late()
        return {
            "schema": SCHEMA,
            "settings": self.settings.as_dict(),
            "server": {"model": self.server.model, "emoe": self.server.ours, "facts": self.server.facts},
            "targets": {task: targets.as_dict() for task, targets in self.book.by_task.items()},
            "unloaded": {task: targets.as_dict() for task, targets in self.calibrated.items()},
            "duration_s": self.duration_s,
            "planned": self.planned,
            "interrupted": self.interrupted,
            "generator_late": late.as_dict() if late else None,
            "all": self.summary().as_dict(),
            "tasks": {task or "": self.of_task(task).as_dict() for task in self.tasks},
            "errors": {name: {"count": count, "message": text} for name, (count, text) in self.errors().items()},
            "notes": self.notes,
            "requests": [record.as_dict(self.start_s) for record in self.records],
        }
