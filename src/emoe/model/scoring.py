"""Eviction by a scorer of the prediction room: fed with every pass, asked only when something must go."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emoe.model.collecting import PassRoutes
from emoe.model.runtime import Pass, Runtime
from emoe.prediction.protocol import UseScorer
from emoe.residency.eviction import Counts, Now, Scored, Uses


class LiveScored(Scored):
    """`Scored` whose values are brought up to date at the first eviction of a pass."""

    def __init__(self, scores: Scores, ranks: Sequence[int], experts: Sequence[int]) -> None:
        """One table's rule: its layers' ranks among all MoE layers, and how many experts each has."""
        super().__init__(scores.scorer.name, sum(experts))
        self._scores = scores
        self._version = -1
        self._ranks = ranks
        self._experts = experts

    def score(self, past: Uses, now: Now) -> Counts:
        """Score by what was observed before the running pass."""
        if self._version != self._scores.version:
            self._version = self._scores.version
            values = self._scores.scorer.scores()
            rows = (values[rank, :count] for rank, count in zip(self._ranks, self._experts, strict=True))
            self.values = np.concatenate(list(rows)).astype(np.float32, copy=False)
        return super().score(past, now)


class Scores:
    """Feeds one scorer the passes of a runtime, prompts and tokens in order."""

    def __init__(self, runtime: Runtime, scorer: UseScorer) -> None:
        """Start before the first prompt."""
        self.scorer = scorer
        self.version = 0
        self._runtime = runtime

    def collect(self, found: PassRoutes) -> None:
        """Observe one pass: a prefill chunk at once, a decode step as one token, a batch's tokens one after another."""
        if len(found.routes):
            self.scorer.observe(found.routes, found.weights, found.token_ids)
            self.version += 1

    def start_pass(self, now: Pass) -> None:
        """Announce a new prompt; a batch of several tasks has none."""
        if now.new_prompt:
            tasks = set(self._runtime.tasks)
            self.scorer.begin_prompt(tasks.pop() if len(tasks) == 1 else None)
            self.version += 1
