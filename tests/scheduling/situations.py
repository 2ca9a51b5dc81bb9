"""Situations for the tests: costs that are plain numbers, and requests in one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from emoe.scheduling.protocol import Request, Situation


@dataclass(frozen=True)
class PlainCosts:
    """A step takes `base_s` and `token_s` for each request; an admission loads `admission_load_s`."""

    token_s: float = 0.25
    admission_load_s: float = 1.0
    base_s: float = 0.5

    def step_s(self, requests: Sequence[Request]) -> float:
        return self.base_s + self.token_s * len(requests) if requests else 0.0

    def prefill_s(self, tokens: int) -> float:
        return tokens / 64

    def load_s(self, request: Request, running: Sequence[Request]) -> float:
        return self.admission_load_s


def request(number: int, arrived_s: float = 0.0, tokens: int = 10, **changes: Any) -> Request:
    """A request of 8 expected tokens without targets."""
    values: dict[str, Any] = {"max_tokens": 1000, "expected_tokens": 8.0} | changes
    return Request(id=str(number), arrived_s=arrived_s, input_tokens=tokens, **values)


def situation(waiting: Sequence[Request], running: Sequence[Request] = (), **changes: Any) -> Situation:
    """At second 100, with room for 4 and limits that do not bind."""
    values: dict[str, Any] = {
        "now_s": 100.0,
        "max_running": 4,
        "max_input_tokens": 10**6,
        "free_kv_tokens": 10**6,
        "costs": PlainCosts(),
    }
    return Situation(waiting=list(waiting), running=list(running), **(values | changes))
