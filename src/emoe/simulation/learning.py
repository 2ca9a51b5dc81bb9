"""What policies may learn from before the scored trace."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from emoe.prediction.protocol import Array, Predictor, Trainable, UseScorer
from emoe.routing.trace import Trace

Note = Callable[[str], None]
"""Called with a line about how far a long fit is."""


class Past:
    """A history. What can be fitted to it is fitted once, however many runs start from that."""

    def __init__(self, trace: Trace, seed: int = 0, note: Note | None = None) -> None:
        """`seed` is that of every fit."""
        self._trace, self._seed, self._note = trace, seed, note
        self._states: dict[str, dict[str, Array]] = {}

    def teach(self, name: str, learner: Predictor | UseScorer) -> None:
        """Fit the learner called `name`; one that cannot be fitted is shown the prompts in order."""
        if not isinstance(learner, Trainable):
            self._show(learner)
        elif name in self._states:
            learner.restore(self._states[name])
        else:
            learner.fit(self._trace, seed=self._seed, progress=self._note)
            # Copies: what a learner observes later may change its arrays in place.
            self._states[name] = {key: np.array(values) for key, values in learner.state().items()}

    def _show(self, learner: Predictor | UseScorer) -> None:
        trace = self._trace
        for prompt in range(trace.num_prompts):
            rows = slice(int(trace.offsets[prompt]), int(trace.offsets[prompt + 1]))
            learner.begin_prompt(trace.task_of(prompt))
            if isinstance(learner, UseScorer):
                weights = None if trace.weights is None else trace.weights[rows]
                token_ids = None if trace.token_ids is None else trace.token_ids[rows]
                learner.observe(trace.experts[rows], weights, token_ids)
            else:
                learner.observe(trace.experts[rows])
