"""decayed: a decayed frequency, leaning on the task's share."""

from __future__ import annotations

import numpy as np

from emoe.prediction.decay import HALF_LIFE_TOKENS, PRIOR_WEIGHT, TASK_TOKENS, Decayed
from emoe.prediction.protocol import RoutingShape, Trainable, UseScorer
from emoe.simulation.generate import random_trace

SHAPE = RoutingShape(2, 6, 2)


def test_scores_are_the_closed_formula() -> None:
    routes = random_trace(SHAPE, 50, 0).experts
    scorer = Decayed(SHAPE)
    assert isinstance(scorer, UseScorer)
    assert isinstance(scorer, Trainable)
    scorer.begin_prompt(None)
    scorer.observe(routes[:20])
    scorer.observe(routes[20:])
    keep = 0.5 ** (1 / HALF_LIFE_TOKENS)
    used = np.zeros((50, 2, 6))
    used[np.arange(50)[:, None, None], np.arange(2)[None, :, None], routes] = 1
    ages = np.arange(49, -1, -1)[:, None, None]
    recent = (used * (1 - keep) * keep**ages).sum(0) + keep**50 * 2 / 6
    np.testing.assert_allclose(scorer.scores(), recent + PRIOR_WEIGHT * 2 / 6, rtol=1e-5)


def test_the_prior_leans_on_the_task_and_on_everything_by_tokens_seen() -> None:
    scorer, uniform = Decayed(SHAPE), 2 / 6
    for task, tokens, expert in (("code", 100, 0), (None, 60, 2), ("talk", 40, 4)):
        scorer.begin_prompt(task)
        scorer.observe(np.full((tokens, 2, 2), expert, dtype=np.uint8) + np.array([0, 1], dtype=np.uint8))
    scorer.begin_prompt("code")
    recent = scorer._recent.copy()
    overall = (np.array([100, 100, 60, 60, 40, 40]) + TASK_TOKENS * uniform) / (200 + TASK_TOKENS)
    own = (np.array([100, 100, 0, 0, 0, 0]) + TASK_TOKENS * overall) / (100 + TASK_TOKENS)
    np.testing.assert_allclose(scorer.scores(), recent + PRIOR_WEIGHT * own, rtol=1e-5)
    scorer.begin_prompt("never seen")
    np.testing.assert_allclose(scorer.scores(), recent + PRIOR_WEIGHT * overall, rtol=1e-5)


def test_a_tasks_own_experts_score_higher() -> None:
    scorer = Decayed(SHAPE)
    for _ in range(3):
        for task, expert in (("code", 0), ("talk", 4)):
            scorer.begin_prompt(task)
            scorer.observe(np.full((100, 2, 2), expert, dtype=np.uint8) + np.array([0, 1], dtype=np.uint8))
    scorer.begin_prompt("code")
    code = scorer.scores().copy()
    scorer.begin_prompt("talk")
    assert (scorer.scores()[:, 4] > code[:, 4]).all()
    assert (scorer.scores()[:, 0] < code[:, 0]).all()


def test_what_is_not_computed_counts_nowhere() -> None:
    scorer = Decayed(SHAPE)
    scorer.begin_prompt(None)
    scorer.observe(np.full((3, 2, 2), 255, dtype=np.uint8))
    assert np.ptp(scorer.scores()) == 0


def test_state_is_restored() -> None:
    trace = random_trace(SHAPE, 900, 2)
    scorer, again = Decayed(SHAPE), Decayed(SHAPE)
    scorer.fit(trace)
    again.restore(scorer.state())
    np.testing.assert_array_equal(scorer.scores(), again.scores())
    for one in (scorer, again):  # what was restored weighs as much beside what comes
        one.begin_prompt("task")
        one.observe(trace.experts[:50])
        one.begin_prompt("task")
    np.testing.assert_array_equal(scorer.scores(), again.scores())
    assert np.ptp(scorer.scores()) > 0
