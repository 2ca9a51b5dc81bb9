"""Predictors that say what was popular before: over everything, by task, in the last prompt, in the last few."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from emoe.prediction.counting import PromptCounter, need, pack_names, unpack_names
from emoe.prediction.protocol import Array

PRIOR_PROMPTS = 1.0
"""A task seen in n prompts counts n / (n + this) by its own popularity, the rest by everybody's. On gpt-oss-20b 0.01,
1, 2 and 4 lie within 0.002 of each other: what matters is that an unseen task has an answer."""

PROMPT_DECAY = 0.9
"""What a prompt's share weighs after each later prompt."""


class Static(PromptCounter):
    """Popularity over all tokens observed so far; the task plays no part."""

    name = "static"

    def predict(self, task: str | None) -> Array:
        """float64 [layers, experts]; uniform before the first token."""
        return self.shape.normalised((self._total + self._running).astype(np.float64))

    def _forget(self) -> None:
        super()._forget()
        self._total = np.zeros_like(self._running)

    def _learn(self, counts: Array, task: str | None) -> None:
        self._total = self._total + counts

    def _arrays(self) -> dict[str, Array]:
        return {"total": self._total}

    def _take(self, state: Mapping[str, Array]) -> None:
        self._total = need(state, self.name, "total", self._running.shape)


class TaskPopularity(PromptCounter):
    """Popularity over the tokens of the same task, falling back to everybody's in proportion to the evidence.

    shares = (n * task's + PRIOR_PROMPTS * everybody's) / (n + PRIOR_PROMPTS), n the task's prompts so far, the running
    one included. Without a task, or with one never seen, that is everybody's.
    """

    name = "task-popularity"

    def predict(self, task: str | None) -> Array:
        """float64 [layers, experts]; uniform before the first token."""
        overall = self.shape.normalised(self._totals.sum(axis=0, dtype=np.float64) + self._running)
        index = self._index.get(task)
        running = self._running if task == self._task else np.zeros_like(self._running)
        own = running + (0 if index is None else self._totals[index])
        prompts = (0 if index is None else int(self._prompts[index])) + bool(running.any())
        if task is None or not prompts:
            return overall
        weight = prompts / (prompts + PRIOR_PROMPTS)
        # A layer of which the task has no token keeps everybody's shares.
        known = own.sum(axis=1, keepdims=True) > 0
        return np.where(known, weight * self.shape.normalised(own.astype(np.float64)) + (1 - weight) * overall, overall)

    def _forget(self) -> None:
        super()._forget()
        self._index: dict[str | None, int] = {}
        self._totals = np.zeros((0, *self._running.shape), dtype=np.int64)
        self._prompts = np.zeros(0, dtype=np.int64)

    def _learn(self, counts: Array, task: str | None) -> None:
        if task not in self._index:
            self._index[task] = len(self._index)
            self._totals = np.concatenate([self._totals, np.zeros_like(counts)[None]])
            self._prompts = np.append(self._prompts, 0)
        self._totals[self._index[task]] += counts
        self._prompts[self._index[task]] += 1

    def _arrays(self) -> dict[str, Array]:
        return {"totals": self._totals.copy(), "prompts": self._prompts.copy(), "tasks": pack_names(list(self._index))}

    def _take(self, state: Mapping[str, Array]) -> None:
        tasks = unpack_names(need(state, self.name, "tasks"))
        totals = need(state, self.name, "totals", (len(tasks), *self._running.shape))
        prompts = need(state, self.name, "prompts", (len(tasks),))
        self._index = {task: index for index, task in enumerate(tasks)}
        self._totals, self._prompts = totals, prompts


class PreviousPrompt(PromptCounter):
    """The next prompt does what the latest one did (paper, Fig. 8)."""

    name = "previous-prompt"

    def predict(self, task: str | None) -> Array:
        """float64 [layers, experts]; uniform before the first token."""
        return self.shape.normalised(self.latest.astype(np.float64))


class DecayedPrompt(PromptCounter):
    """Shares of the prompts so far, each weighing PROMPT_DECAY times the one after it; the task plays no part."""

    name = "decayed-prompt"

    def predict(self, task: str | None) -> Array:
        """float64 [layers, experts]; uniform before the first token."""
        return self.shape.normalised(self._after(self._running))

    def _after(self, counts: Array) -> Array:
        total = counts.sum(axis=1, keepdims=True)
        shares = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
        return np.where(total > 0, PROMPT_DECAY * self._decayed + shares, self._decayed)

    def _forget(self) -> None:
        super()._forget()
        self._decayed = np.zeros(self._running.shape)

    def _learn(self, counts: Array, task: str | None) -> None:
        self._decayed = self._after(counts)

    def _arrays(self) -> dict[str, Array]:
        return {"decayed": self._decayed}

    def _take(self, state: Mapping[str, Array]) -> None:
        self._decayed = need(state, self.name, "decayed", self._running.shape)
