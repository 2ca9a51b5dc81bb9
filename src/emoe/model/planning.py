"""Task-aware loading: every p prompts a predictor is asked, Equation 2 makes a plan, and what is missing is loaded."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from emoe.model.asking import Answers, Task
from emoe.model.collecting import PassRoutes
from emoe.model.passes import Pass
from emoe.model.runtime import Runtime
from emoe.prediction.protocol import RoutingShape
from emoe.prediction.schedule import Adaptive, RecentShares, Schedule
from emoe.prediction.worker import PredictorDiedError
from emoe.residency.plans import TaskDemand, best_keys, best_keys_of_all, expected_tokens
from emoe.residency.pool import ExpertPool
from emoe.residency.worth import Worth

Array = npt.NDArray[Any]


@dataclass(slots=True)
class _Prompt:
    """One that runs: its task, W_j, and the routes of the tokens seen so far."""

    task: Task
    inputs: int
    seen: int = 0
    routes: list[Array] = field(default_factory=list)


class Habits(Protocol):
    """What is known of tasks from before: a profile's, or nothing."""

    def output_tokens(self, task: Task) -> float | None:
        """Expected output tokens of a request, None where unknown."""
        ...

    def sensitive(self, task: Task) -> Array | None:
        """bool [layers], None where unknown (every layer is then)."""
        ...

    def shares(self, task: Task) -> Array | None:
        """float [layers, experts], how popular experts are with it; None where unknown."""
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
        self.planned: Array | None = None
        """bool [layers, experts]: the keys of the last plan."""
        self._prompts: dict[int, _Prompt] = {}
        self._answered: dict[Task, Array] = {}
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
        segments = found.now.segments
        for row, segment in enumerate(segments):
            prompt = self._prompts.get(segment.sequence)
            if prompt is None:
                continue
            own = found.routes if len(segments) == 1 else found.routes[found.sequence == row]
            if found.now.announced:  # a preemption makes the model read tokens again
                own = own[max(0, prompt.seen - segment.position) :]
            if len(own):
                prompt.routes.append(own)
                prompt.seen += len(own)
        if self._recent is not None and len(found.routes):
            self._recent.observe(found.routes)

    def start_pass(self, now: Pass) -> None:
        """At a new prompt: tell of those that have ended, and ask if it is time. At any pass: take an answer.

        In an announced pass with new prompts Equation 2 is evaluated for those that run, whether or not it is time to
        ask: of each task the last answer counts, and before the first its popularity.
        """
        if not (now.new_prompt or now.ended or self._asked):
            return
        start = time.perf_counter()
        try:
            new = sum(segment.new for segment in now.segments) if now.announced else int(now.new_prompt)
            if new or now.ended:
                self._end_prompts(now)
                self._begin_prompts(now)
            numbers = range(max(1, self._runtime.prompts - new), self._runtime.prompts)
            if self._worth.active and any(self._due(number) for number in numbers):
                if self._runtime.mode != "exact":
                    self._worth.hide(self._reading_s)
                self._answers.ask(list(dict.fromkeys(task for task, _ in self._expected(now.announced))))
                self._asked = True
            if self._worth.active and self._asked and (answer := self._answers.poll()) is not None:
                self._asked = False
                self._answered |= answer
                self._in_force = np.mean(list(answer.values()), axis=0)
                if self._recent is not None:
                    self._recent.clear()
                self._plan(now, answer)
            elif self._worth.active and now.announced and numbers:
                self._plan(now, {})
        except PredictorDiedError as error:  # the text is as good without: go on, and say so
            self._worth.give_up(str(error))
        if not self._worth.active:
            self._asked = False
            for pool in self._pools:
                pool.prefetches.stop()
        self._worth.spend(time.perf_counter() - start)

    # -- prompts --------------------------------------------------------------------------------------------

    def _end_prompts(self, now: Pass) -> None:
        waited_s = sum(pool.load_wait_s for pool in self._pools)
        if self._read_own:
            self._reading_s = waited_s - self._waited_s
        self._waited_s = waited_s
        self._read_own = self._runtime.observing
        for sequence in now.ended if now.announced else list(self._prompts):
            prompt = self._prompts.pop(sequence, None)
            if prompt is None or not prompt.routes:
                continue
            self._lately.append((prompt.task, prompt.inputs))
            whole = np.concatenate(prompt.routes)
            if self._worth.usable:
                self._answers.tell(prompt.task, whole)
            if self._in_force is None:  # what the first prompt routed to is what is resident after it
                self._in_force = self._shape.normalised(self._shape.counts(whole).astype(np.float64))
            self._ended_prompts += 1
            self._output_tokens += max(0, len(whole) - prompt.inputs)

    def _begin_prompts(self, now: Pass) -> None:
        for segment, task in zip(now.segments, self._runtime.tasks, strict=True):
            if not segment.new:
                continue
            inputs = segment.prompt_tokens if now.announced else segment.tokens
            if now.mask is not None:
                inputs = int(now.mask[segment.start : segment.stop].sum())
            self._prompts[segment.sequence] = _Prompt(task, inputs)

    # -- plans ----------------------------------------------------------------------------------------------

    def _plan(self, now: Pass, answer: Mapping[Task, Array]) -> None:
        """Equation 2, the best L of each layer, and loads of what is missing."""
        shares = dict(answer)
        if now.announced:
            tasks = {prompt.task for prompt in self._prompts.values()}
            known = {task: self._answered.get(task, self._habits.shares(task)) for task in tasks}
            shares = {task: found for task, found in known.items() if found is not None}
        if not shares:
            return
        expected = self._expected(now.announced)
        tokens = expected_tokens(self._demand(task, found, expected) for task, found in shares.items())
        self.plans += 1
        self.planned = np.zeros(tokens.shape, dtype=bool)
        for pool in self._pools:
            table = pool.table
            layers = sorted(table.experts)
            own = tokens[[self._ranks[layer] for layer in layers]]
            for row, layer in enumerate(layers):
                own[row, table.experts[layer] :] = 0.0  # of layers with fewer experts than others
            quotas = [table.plan.quotas[layer] for layer in layers]
            best = best_keys(own, quotas) if all(quotas) else best_keys_of_all(own, table.plan.slots)
            for layer, experts in zip(layers, best, strict=True):
                self.planned[self._ranks[layer], experts] = True
            pool.prefetches.plan([(layer, e) for layer, experts in zip(layers, best, strict=True) for e in experts])

    def _expected(self, announced: bool = False) -> list[tuple[Task, int]]:
        """Task and input tokens of the prompts that the plan is for.

        Where prompts come one after another: those running, those that ended lately in place of those to come, and,
        while too few have ended, prompts of no known task. Where they are announced: those running.
        """
        known = [(prompt.task, prompt.inputs) for prompt in self._prompts.values()]
        if announced:
            return known
        known += self._lately
        unknown = (self._lately.maxlen or 0) - len(self._lately)
        mean = sum(tokens for _, tokens in known) // max(1, len(known))
        return [*known, *[(None, mean)] * unknown]

    def _demand(self, task: Task, shares: Array, expected: Sequence[tuple[Task, int]]) -> TaskDemand:
        inputs = [tokens for each, tokens in expected if each == task]
        output = self._habits.output_tokens(task)
        if output is None:
            output = self._output_tokens / max(1, self._ended_prompts)
        return TaskDemand(inputs, output, shares, self._habits.sensitive(task))
