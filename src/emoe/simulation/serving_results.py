"""What became of simulated requests: latencies, targets met, by task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emoe.simulation.serving_traffic import Call


@dataclass(slots=True)
class Served:
    """When a request was first admitted, had its first token, and ended; seconds from the start of the simulation."""

    admitted_s: float = 0.0
    first_token_s: float = 0.0
    ended_s: float = 0.0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean, median and 99th percentile; NaN of nothing."""

    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of these values."""
        if not len(values):
            return cls(float("nan"), float("nan"), float("nan"))
        p50, p99 = np.percentile(values, [50, 99])
        return cls(float(np.mean(values)), float(p50), float(p99))

    def as_dict(self) -> dict[str, float | None]:
        """Plain JSON values."""
        return {name: _number(getattr(self, name)) for name in self.__slots__}


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class Summary:
    """Of some requests. Latencies in seconds; goodput: requests per second that met all their targets."""

    requests: int
    latency: Spread
    ttft: Spread
    tpot: Spread
    queue: Spread
    met: int
    goodput: float
    output_tokens: int
    tokens_per_s: float

    @property
    def met_share(self) -> float:
        """Of all requests, how many met all their targets."""
        return self.met / self.requests if self.requests else float("nan")

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "requests": self.requests,
            "latency_s": self.latency.as_dict(),
            "ttft_s": self.ttft.as_dict(),
            "tpot_s": self.tpot.as_dict(),
            "queue_s": self.queue.as_dict(),
            "met": self.met,
            "met_share": _number(self.met_share),
            "goodput_per_s": self.goodput,
            "output_tokens": self.output_tokens,
            "tokens_per_s": self.tokens_per_s,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingResults:
    """All calls and what became of each, in order of arrival; every one has ended.

    Attributes:
        scheduler: its name.
        calls, served: one entry for each request.
        seconds: from the first arrival to the last end.
        busy_s: steps; wait_s: of them, waiting for loads.
        steps, loads: how many.
        costs: the cost model's coefficients at the end.
    """

    scheduler: str
    calls: Sequence[Call]
    served: Sequence[Served]
    seconds: float
    busy_s: float
    wait_s: float
    steps: int
    loads: int
    costs: Mapping[str, float]

    def met(self, number: int) -> bool:
        """Whether that request met all the targets it has."""
        call = self.calls[number]
        ttft, tpot = self.ttft_s(number), self.tpot_s(number)
        in_time = call.ttft_slo_s is None or ttft <= call.ttft_slo_s
        return in_time and (call.tpot_slo_s is None or tpot is None or tpot <= call.tpot_slo_s)

    def ttft_s(self, number: int) -> float:
        """Seconds from arrival to the first token."""
        return self.served[number].first_token_s - self.calls[number].at_s

    def tpot_s(self, number: int) -> float | None:
        """Mean seconds of each later token; None where there is none."""
        later = self.calls[number].output_tokens - 1
        served = self.served[number]
        return (served.ended_s - served.first_token_s) / later if later else None

    def latency_s(self, number: int) -> float:
        """Seconds from arrival to the end."""
        return self.served[number].ended_s - self.calls[number].at_s

    def summary(self, numbers: Iterable[int] | None = None) -> Summary:
        """Of these requests, by number; of all by default."""
        chosen = list(range(len(self.calls)) if numbers is None else numbers)
        met = sum(self.met(number) for number in chosen)
        tokens = sum(self.calls[number].output_tokens for number in chosen)
        seconds = max(self.seconds, 1e-9)
        return Summary(
            requests=len(chosen),
            latency=Spread.of([self.latency_s(number) for number in chosen]),
            ttft=Spread.of([self.ttft_s(number) for number in chosen]),
            tpot=Spread.of([each for number in chosen if (each := self.tpot_s(number)) is not None]),
            queue=Spread.of([self.served[number].admitted_s - self.calls[number].at_s for number in chosen]),
            met=met,
            goodput=met / seconds,
            output_tokens=tokens,
            tokens_per_s=tokens / seconds,
        )

    def by_task(self) -> dict[str, Summary]:
        """Summaries by the requests' true tasks."""
        groups: dict[str, list[int]] = {}
        for number, call in enumerate(self.calls):
            groups.setdefault(call.task, []).append(number)
        return {task: self.summary(numbers) for task, numbers in sorted(groups.items())}

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values: the summary, by task, and the totals."""
        return {
            "scheduler": self.scheduler,
            **self.summary().as_dict(),
            "seconds": self.seconds,
            "busy_s": self.busy_s,
            "load_wait_s": self.wait_s,
            "steps": self.steps,
            "loads": self.loads,
            "preemptions": sum(each.preemptions for each in self.served),
            "costs": dict(self.costs),
            "tasks": {task: summary.as_dict() for task, summary in self.by_task().items()},
        }
