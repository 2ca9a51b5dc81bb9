"""Predictors on counts: the plan's hit share, against what can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from emoe.errors import UsageError
from emoe.prediction.registry import PREDICTORS
from emoe.routing.counts import PromptCounts
from emoe.simulation.policies import Settings
from emoe.simulation.prompts import plan_prompts
from tests.simulation.stand_ins import CountPredictor, TrainedPredictor

RNG = np.random.default_rng(2)
COUNTS = PromptCounts(RNG.multinomial(40, [0.4, 0.3, 0.2, 0.1], (9, 2)), np.arange(9) % 2, ("a", "b"), 1)


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    for predictor in (CountPredictor, TrainedPredictor):
        monkeypatch.setitem(PREDICTORS, predictor.name, predictor)


def test_the_first_plan_comes_from_the_history_and_each_further_one_from_what_ran() -> None:
    history = COUNTS.select(range(4))
    scored = COUNTS.select(range(4, 9))
    [row] = plan_prompts([(scored, history)], ["trained"], [0.5], Settings(replan_prompts=2))
    known = history.counts.sum(axis=0)
    found = best = 0
    for prompt in range(5):
        if prompt % 2 == 0:
            plan = np.argsort(-known, axis=1, kind="stable")[:, :2]
        used = scored.counts[prompt]
        found += sum(int(used[layer, plan[layer]].sum()) for layer in range(2))
        best += int(np.sort(used, axis=1)[:, -2:].sum())
        known = known + used
    assert (row.found, row.best, row.lookups, row.slots) == (found, best, scored.counts.sum(), 2)
    assert row.as_dict()["misses"] == row.lookups - found
    assert row.as_dict()["belady_ratio"] is None


def test_no_plan_beats_the_best_set_and_all_experts_find_all() -> None:
    rows = plan_prompts([(COUNTS, None), (COUNTS, COUNTS)], ["count", "trained"], [0.25, 0.5, 1.0], Settings(1))
    assert len(rows) == 6
    for row in rows:
        assert row.hit_rate <= row.best_rate
        assert row.lookups == 2 * COUNTS.counts.sum()
        if row.capacity == 1.0:
            assert row.hit_rate == row.best_rate == 1.0


def test_only_predictors_can_be_judged() -> None:
    with pytest.raises(UsageError, match=r"lru: counts say nothing of the order of tokens.*count"):
        plan_prompts([(COUNTS, None)], ["lru"], [0.5], Settings())
