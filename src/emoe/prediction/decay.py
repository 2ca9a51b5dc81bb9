"""The scorer `decayed`: how often an expert key was used lately, leaning on what its task uses."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from emoe.prediction.protocol import Array, Report, RoutingShape
from emoe.routing.trace import Trace

HALF_LIFE_TOKENS = 20.0
"""Tokens after which a use counts half. Set on one half of gpt-oss-20b's prompts; 10 to 40 are within 3 % of it."""

PRIOR_WEIGHT = 0.25
"""What the task's own share weighs beside the recent one, likewise."""

TASK_TOKENS = 200.0
"""Tokens of a task after which its own shares weigh as much as everything's."""


class Decayed:
    """Decayed frequency with a task prior: the baseline that a learned scorer must beat."""

    name = "decayed"

    def __init__(self, shape: RoutingShape) -> None:
        """Start knowing nothing: all keys alike."""
        self.shape = shape
        size = (shape.layers, shape.experts)
        self._keep = 0.5 ** (1 / HALF_LIFE_TOKENS)
        self._recent = np.full(size, shape.top_k / shape.experts)
        self._total = np.zeros(size)
        self._tokens = 0.0
        self._tasks: dict[str, tuple[Array, float]] = {}
        self._task: str | None = None
        self._prompt = np.zeros(size)
        self._prompt_tokens = 0
        self._prior = self._share()
        self._scores = np.empty(size, dtype=np.float32)

    def begin_prompt(self, task: str | None) -> None:
        """A prompt starts; the one before counts among the priors from now on."""
        if self._prompt_tokens:
            self._add(self._task, self._prompt, self._prompt_tokens)
            self._prompt = np.zeros_like(self._prompt)
            self._prompt_tokens = 0
        self._task = task
        self._prior = self._share()

    def _add(self, task: str | None, counts: Array, tokens: float) -> None:
        self._total += counts
        self._tokens += tokens
        if task is not None:
            before, earlier = self._tasks.get(task, (0.0, 0.0))
            self._tasks[task] = (before + counts, earlier + tokens)

    def _share(self) -> Array:
        """[layers, experts]: the task's share of tokens, leaning on everything's while little of it was seen."""
        uniform = self.shape.top_k / self.shape.experts
        share = (self._total + TASK_TOKENS * uniform) / (self._tokens + TASK_TOKENS)
        if self._task in self._tasks:
            counts, tokens = self._tasks[self._task]
            share = (counts + TASK_TOKENS * share) / (tokens + TASK_TOKENS)
        return share

    def observe(self, routes: Array, weights: Array | None = None, token_ids: Array | None = None) -> None:
        """Note tokens that ran."""
        layers = np.arange(self.shape.layers)[:, None]
        gain = 1 - self._keep
        for ids in routes:
            known = ids < self.shape.experts
            at = np.broadcast_to(layers, ids.shape)[known], ids[known]
            self._recent *= self._keep
            self._recent[at] += gain
            self._prompt[at] += 1
        self._prompt_tokens += len(routes)

    def scores(self) -> Array:
        """float32 [layers, experts]."""
        np.multiply(self._prior, PRIOR_WEIGHT, out=self._scores, casting="same_kind")
        self._scores += self._recent
        return self._scores

    def fit(self, history: Trace, *, seed: int = 0, progress: Report | None = None) -> None:
        """Count a history among the priors."""
        counts = history.counts()
        for prompt in range(history.num_prompts):
            tokens = int(history.offsets[prompt + 1] - history.offsets[prompt])
            self._add(history.task_of(prompt), counts[prompt].astype(float), tokens)
        self._prior = self._share()

    def state(self) -> dict[str, Array]:
        """The priors."""
        found = {"total": self._total.copy(), "tokens": np.array([self._tokens])}
        for task, (counts, tokens) in self._tasks.items():
            found[f"task.{task}.counts"] = np.array(counts)
            found[f"task.{task}.tokens"] = np.array([tokens])
        return found

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over the priors that `state` returned."""
        self._total = np.array(state["total"], dtype=float)
        self._tokens = float(state["tokens"][0])
        self._tasks = {}
        for name, counts in state.items():
            if name.startswith("task.") and name.endswith(".counts"):
                task = name.removeprefix("task.").removesuffix(".counts")
                self._tasks[task] = (np.array(counts, dtype=float), float(state[f"task.{task}.tokens"][0]))
        self._prior = self._share()
