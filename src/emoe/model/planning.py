"""Task-aware loading: every p prompts a predictor is asked, Equation 2 makes a plan, and what is missing is loaded."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from emoe.model.asking import Answers, Task
from emoe.model.collecting import PassRoutes
from emoe.model.runtime import Pass, Runtime
from emoe.prediction.protocol import RoutingShape
from emoe.prediction.schedule import Adaptive, RecentShares, Schedule
from emoe.prediction.worker import PredictorDiedError
from emoe.residency.plans import TaskDemand, best_keys, best_keys_of_all, expected_tokens
from emoe.residency.pool import ExpertPool
from emoe.residency.worth import Worth

Array = npt.NDArray[Any]


class Habits(Protocol):
    """What is known of tasks from before: a profile's, or nothing."""

    def output_tokens(self, task: Task) -> float | None:
        """Expected output tokens of a request, None where unknown."""
        ...

    def sensitive(self, task: Task) -> Array | None:
        """bool [layers], None where unknown (every layer is then)."""
        ...


class Planner:
    """Follows the prompts of a runtime and keeps the pools' plans up to date.

    The collector must hand over the last pass before `start_pass` announces the next.

    The first prompt of all is read as without a predictor: there is nothing yet to predict from, and nothing resident.
    """

    def __init__(
        self,
        runtime: Runtime,
        pools: Sequence[ExpertPool],
        answers: Answers,
        schedule: Schedule,
        shape: RoutingShape,
        habits: Habits,
        worth: Worth,
    ) -> None:
        """Wire the parts; `schedule` says at which prompts to ask."""
        self.plans = 0
        self._runtime = runtime
        self._pools = pools
        self._answers = answers
        self._schedule = schedule
        self._shape = shape
        self._recent = RecentShares(shape) if isinstance(schedule, Adaptive) else None
        self._in_force: Array | None = None
        self._habits = habits
        self._worth = worth
        self._ranks = {layer: rank for rank, layer in enumerate(sorted(runtime.layers))}
        self._routes: list[list[Array]] = []
        self._tasks: list[Task] = []
        self._inputs: list[int] = []
        self._asked = False
        # What reading a prompt with its own routes makes wait: a mode that reroutes is spared that by a plan.
        self._reading_s = self._waited_s = 0.0
        self._read_own = False
        self._ended_prompts = self._output_tokens = 0
        # A plan serves the prompts until the next one as well: those to come are expected to be like the last ones.
        self._lately: deque[tuple[Task, int]] = deque(maxlen=schedule.horizon - 1)

    # -- what the runtime calls -----------------------------------------------------------------------------

    def reads_own_routes(self, prompt: int) -> bool:
        """Whether a mode that reroutes reads this prompt with its own routes: the first, or when switched off."""
        return prompt == 0 or (not self._worth.active and self._due(prompt))

    def _due(self, prompt: int) -> bool:
        if prompt == 1 and self.plans == 0:  # the first chance: no prompt had been read before the first
            return True
        observed = None if self._recent is None else self._recent.shares()
        return self._schedule.due(prompt, observed, self._in_force)

    def collect(self, found: PassRoutes) -> None:
        """Keep one pass's routes until its prompts have ended."""
        for row in range(len(self._routes)):
            own = found.routes if len(self._routes) == 1 else found.routes[found.sequence == row]
            if len(own):
                self._routes[row].append(own)
        if self._recent is not None and len(found.routes):
            self._recent.observe(found.routes)

    def start_pass(self, now: Pass) -> None:
        """At a new prompt: tell of those that have ended, and ask if it is time. At any pass: take an answer."""
        if not now.new_prompt and not self._asked:
            return
        start = time.perf_counter()
        try:
            if now.new_prompt:
                self._end_prompts()
                self._begin_prompts(now)
                index = self._runtime.prompts - 1
                if self._worth.active and index > 0 and self._due(index):
                    if self._runtime.mode != "exact":
                        self._worth.hide(self._reading_s)
                    self._answers.ask(list(dict.fromkeys(task for task, _ in self._expected())))
                    self._asked = True
            if self._worth.active and self._asked and (answer := self._answers.poll()) is not None:
                self._asked = False
                self._apply(answer)
        except PredictorDiedError as error:  # the text is as good without: go on, and say so
            self._worth.give_up(str(error))
        if not self._worth.active:
            self._asked = False
            for pool in self._pools:
                pool.prefetches.stop()
        self._worth.spend(time.perf_counter() - start)

    # -- prompts --------------------------------------------------------------------------------------------

    def _end_prompts(self) -> None:
        waited_s = sum(pool.load_wait_s for pool in self._pools)
        if self._read_own:
            self._reading_s = waited_s - self._waited_s
        self._waited_s = waited_s
        self._read_own = self._runtime.observing
        for task, inputs, routes in zip(self._tasks, self._inputs, self._routes, strict=True):
            if routes:
                self._lately.append((task, inputs))
                whole = np.concatenate(routes)
                if self._worth.usable:
                    self._answers.tell(task, whole)
                if self._in_force is None:  # what the first prompt routed to is what is resident after it
                    self._in_force = self._shape.normalised(self._shape.counts(whole).astype(np.float64))
                self._ended_prompts += 1
                self._output_tokens += max(0, len(whole) - inputs)

    def _begin_prompts(self, now: Pass) -> None:
        self._tasks = list(self._runtime.tasks)
        self._inputs = [now.tokens] * now.batch
        if now.mask is not None:
            self._inputs = now.mask.view(now.batch, now.tokens).sum(dim=1).tolist()
        self._routes = [[] for _ in range(now.batch)]

    # -- plans ----------------------------------------------------------------------------------------------

    def _apply(self, answer: Mapping[Task, Array]) -> None:
        """Equation 2 over the running prompts, the best L of each layer, and loads of what is missing."""
        tokens = expected_tokens(self._demand(task, shares) for task, shares in answer.items())
        self.plans += 1
        self._in_force = np.mean(list(answer.values()), axis=0)
        if self._recent is not None:
            self._recent.clear()
        for pool in self._pools:
            table = pool.table
            layers = sorted(table.experts)
            own = tokens[[self._ranks[layer] for layer in layers]]
            for row, layer in enumerate(layers):
                own[row, table.experts[layer] :] = 0.0  # of layers with fewer experts than others
            quotas = [table.plan.quotas[layer] for layer in layers]
            best = best_keys(own, quotas) if all(quotas) else best_keys_of_all(own, table.plan.slots)
            pool.prefetches.plan([(layer, e) for layer, experts in zip(layers, best, strict=True) for e in experts])

    def _expected(self) -> list[tuple[Task, int]]:
        """Task and input tokens of the prompts that the plan is for: those running, those that ended lately in place of
        those to come, and, while too few have ended, prompts of no known task."""
        known = [*zip(self._tasks, self._inputs, strict=True), *self._lately]
        unknown = (self._lately.maxlen or 0) - len(self._lately)
        mean = sum(tokens for _, tokens in known) // max(1, len(known))
        return [*known, *[(None, mean)] * unknown]

    def _demand(self, task: Task, shares: Array) -> TaskDemand:
        inputs = [tokens for expected, tokens in self._expected() if expected == task]
        output = self._habits.output_tokens(task)
        if output is None:
            output = self._output_tokens / max(1, self._ended_prompts)
        return TaskDemand(inputs, output, shares, self._habits.sensitive(task))
