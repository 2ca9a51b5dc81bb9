"""When a predictor is asked, and what it is told: the same for plans on traces and on counts."""

from __future__ import annotations

import numpy as np

from emoe.prediction.protocol import Array, Predictor, RoutingShape
from emoe.prediction.schedule import Adaptive, RecentShares, make_schedule


class Asking:
    """A predictor on its schedule (paper, section 2.3).

    It is told of every prompt that has ended, and asked where one begins that the schedule names. With a history that
    is the first prompt already. Without one nothing is known yet at the first; from then on what that routed to counts
    as what was predicted, as in the engine.
    """

    def __init__(self, predictor: Predictor, shape: RoutingShape, replan_prompts: str | int, *, learned: bool) -> None:
        """`replan_prompts`: p, "adaptive" or "adaptive:THRESHOLD". Raises UsageError for anything else."""
        self._predictor, self._shape, self._learned = predictor, shape, learned
        self._schedule = make_schedule(replan_prompts)
        self._recent = RecentShares(shape) if isinstance(self._schedule, Adaptive) else None
        self._in_force: Array | None = None

    def ended(self, task: str | None, routes: Array) -> None:
        """Note a prompt that has ended, and its routes [tokens, layers, k]."""
        self._predictor.begin_prompt(task)
        self._predictor.observe(routes)
        if self._recent is not None:
            self._recent.observe(routes)
        if self._in_force is None:
            self._in_force = self._shape.normalised(self._shape.counts(routes).astype(np.float64))

    def begins(self, number: int, task: str | None) -> Array | None:
        """The shares predicted for the prompt that begins, [layers, experts]; None where it is not asked."""
        observed = None if self._recent is None else self._recent.shares()
        # Of interleaved sequences several begin before any has ended.
        in_force = self._shape.uniform() if self._in_force is None else self._in_force
        if not (self._schedule.due(number, observed, in_force) if number else self._learned):
            return None
        self._in_force = self._predictor.predict(task)
        if self._recent is not None:
            self._recent.clear()
        return self._in_force
