"""The expert memory that a limit leaves: what the planner is asked, and what is made of its answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from emoe.bench import fitting
from emoe.bench.fitting import PLAN_MARGIN, fitting_budget
from emoe.config import ExpertMemory
from emoe.errors import BudgetError

LIMIT = 10**9
SETTINGS: dict[str, Any] = {
    "context": 70, "prompt": 50, "batch": 3, "chunk": 20, "expert_dtype": "int8", "embeddings": "disk"
}  # fmt: skip


def planned(monkeypatch: pytest.MonkeyPatch, fit: str) -> dict[str, Any]:
    """What the planner is asked, which answers `fit`."""
    asked: dict[str, Any] = {}

    def plan(model: str, **settings: Any) -> Any:
        asked.update(settings, model=model)
        return SimpleNamespace(fit=fit, model=model, smallest_bytes=2 << 30, budget_bytes=(7 << 20) + 12345)

    monkeypatch.setattr(fitting, "plan", plan)
    return asked


def test_the_plan_is_asked_for_a_little_less_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = planned(monkeypatch, "some")
    assert fitting_budget("m", LIMIT, **SETTINGS) == ExpertMemory("bytes", 7 << 20)
    assert asked == SETTINGS | {"model": "m", "memory": int(LIMIT / PLAN_MARGIN)}
    assert LIMIT * 0.9 < asked["memory"] < LIMIT


def test_where_all_experts_fit_they_are_all_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    planned(monkeypatch, "all")
    assert fitting_budget("m", LIMIT, **SETTINGS) == ExpertMemory("share", 1.0)


def test_a_limit_below_the_floor_says_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    planned(monkeypatch, "none")
    with pytest.raises(BudgetError, match=r"limit of 953.67 MiB is less than m needs; give at least 2.06 GiB"):
        fitting_budget("m", LIMIT, **SETTINGS)
