"""Ours: what Algorithm 1 leaves on the table.

Algorithm 1 takes the loading that an admission causes as a constant, orders by first-token deadlines alone, and stops
admitting as soon as one running request is beyond help. Here the loading is that of *this* request's experts, given
what is resident and what the running requests use anyway (`Costs.step_s`, `Costs.load_s`). So requests of the tasks
that run are cheap and join; a mixed batch, whose steps load the union of everybody's experts, seldom comes about.

**Who goes first.** One score for each waiting request, in seconds, the least first:

    score = arrived + STRETCH * cost + (LATE * its first-token target, if that cannot be met any more)
    cost  = reading its input (experts loaded for it included) + answer tokens * what it adds to a step
            (at least the step's time over `max_running`: a slot is taken, too)

Time since arrival ages it, short and cheap requests overtake long ones by so many seconds and no more, and a hopeless
one steps back behind the feasible ones without losing its place among its like.

**Whether it is admitted now.** In that order, a request joins if

- a token of it is *cheap*: it adds to a step at most MARGIN of what a token of the batch takes already, so that tokens
  per second rise clearly; or the whole line together would make CROWD times as many tokens per second; or it is *in a
  hurry*: its first token would soon be too late, and the longer step still keeps everybody's time per token;
- and the stall of reading it and the longer steps after it make no running request miss a target that it can still
  meet (one, for one in a hurry: its target against the other's).

Those beyond help hold nobody up. While others wait for a better moment their inputs gather, and are read together: one
pass loads the experts for all of them.

**Nobody starves.** The longest waiting request, once it has waited OWED times its first-token target, is one of the
next OWED_EVERY to be admitted, whatever it costs. So one with k requests before it in line is admitted at the latest
OWED_EVERY * (k + 1) admissions after all of them have waited so long. When nothing runs, the first by score is
admitted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emoe.scheduling.core import Limits
from emoe.scheduling.edf import UNHURRIED_S
from emoe.scheduling.protocol import Request, Situation

# Effects of half and of twice the value on simulated goodput, as measured by bench/affinity_constants.py: on a
# Mixtral-like model with two loads beyond what it can take, and on emoe-nano (docs/log.md has mean latencies, too).
STRETCH = 20.0
"""Seconds by which a second of cost sets a request back. From 2 to 20 the mean latency falls and targets met stay.
Half: +5 and -5 % goodput, mean latency 2 to 3 % longer; twice: -10 and +2 %, 3 to 5 % shorter; emoe-nano: nothing."""
LATE = 100.0
"""Targets by which a hopeless request steps back: behind all feasible ones that come in that time. Half: -13 and -28 %;
twice: +6 and +57 %, at the cost of those that are late; emoe-nano, where few are: nothing."""
MARGIN = 0.7
"""On emoe-nano with a slow store 0.6 meets more targets and 0.75 has the lower mean latency. Half: -2 and -5 %,
emoe-nano +2 %; twice: +3 and -1 %, emoe-nano -8 %, and its mean latency is 11 % longer."""
CROWD = 1.5
"""Lower, and batches grow whose tasks have nothing in common: a third of the targets met is lost at 1.15. Half: +1 and
0 %, emoe-nano -4 %; twice: nothing, but emoe-nano with half as many requests again +3 %, and 7 % shorter."""
HURRY = 1.5
"""In a hurry is what is too late unless it is admitted within so many times the stall of reading it. Half: -1 % each,
emoe-nano's mean latency 2 % longer; twice: -3 and +5 %, emoe-nano -2 %, 5 % longer."""
OWED = 20.0
"""First-token targets that the eldest waits before it has its turn. Half: -6 and +2 %; twice: -1 and +5 %; emoe-nano:
under 1 %. It is what bounds waiting."""
OWED_EVERY = 4
"""Admissions of which one is then its. Half: -17 % each; twice: +5 and +17 %; emoe-nano: nothing. It bounds waiting,
too."""
TRIED = 12
"""So many of the first in line, and so many tasks of the longest waiting, are looked at; other tasks are taken for
their mean. Neither half nor twice changes any result: it bounds what a decision takes."""


class Affinity:
    """Admits by score what makes steps more worth their loads; see the module's text."""

    name = "affinity"

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._line = _Line()
        self._overtaken: dict[int, int] = {}
        self._ran: list[str] = []
        self._read_s: dict[str | None, float] = {}
        self._more_s: dict[str | None, float] = {}

    def admit(self, now: Situation) -> list[Request]:
        """O(w) for w waiting, and at most TRIED estimates of a step."""
        limits = Limits(now)
        if limits.full or not now.waiting:
            return []
        group: list[Request] = []
        eldest = now.waiting[0]
        overtaken = self._overtaken.get(eldest.priority, 0)
        most = limits.max_running
        if now.now_s - eldest.arrived_s >= OWED * _target_s(eldest):
            most = OWED_EVERY - 1 - overtaken  # so many others may go before it
            if most <= 0:
                if not limits.fits(eldest):
                    return [eldest]  # the core keeps the rest waiting for it
                limits.take(eldest)
                group.append(eldest)
                most = OWED_EVERY
        stuck = self._choose(now, limits, group)
        del group[most:]
        for each in group:
            overtaken = 0 if each is eldest else overtaken + 1
        self._overtaken[eldest.priority] = overtaken
        return group if stuck is None or len(group) >= most else [*group, stuck]

    def _choose(self, now: Situation, limits: Limits, group: list[Request]) -> Request | None:
        """Add to the group whoever joins; returns who would be next and does not fit."""
        costs = now.costs
        before_s = costs.step_s([*now.running, *group])
        self._learn(now, before_s)
        batch = _Batch(now, before_s)
        dear: set[str | None] = set()
        line = self._line.first(now, self._read_s, self._more_s)
        crowded = self._crowd(now, limits, [now.waiting[at] for at in line], before_s)
        for at in line:
            each = now.waiting[at]
            if limits.full:
                break
            if each in group:
                continue
            if not limits.fits(each):
                return each  # what is free is kept for it
            stall_s = self._read_s[each.task] + costs.prefill_s(sum(one.input_tokens for one in (*group, each)))
            left_s = each.deadline_s - now.now_s - stall_s
            hurried = 0 <= left_s < HURRY * stall_s
            count = len(now.running) + len(group)
            if each.task in dear and not hurried:
                continue
            after_s = costs.step_s([*now.running, *group, each])
            if count:
                cheap = crowded or (after_s - before_s) * count <= MARGIN * before_s
                if not cheap:
                    dear.add(each.task)
                pace_s = batch.pace_s if each.tpot_slo_s is None else min(batch.pace_s, each.tpot_slo_s)
                if not (cheap or (hurried and after_s <= pace_s)) or batch.broken(after_s, stall_s) > hurried:
                    continue
            group.append(each)
            limits.take(each)
            before_s = after_s
        return None

    def _crowd(self, now: Situation, limits: Limits, line: list[Request], step_s: float) -> bool:
        """Whether a batch with the whole line in it would be so much more worth its loads that all are cheap."""
        joining = line[: limits.max_running - limits.running]
        if len(joining) < 2:
            return False
        before = len(now.running) / step_s if now.running else 1 / now.costs.step_s(joining[:1])
        after = (limits.running + len(joining)) / now.costs.step_s([*now.running, *joining])
        return after >= CROWD * before

    def _learn(self, now: Situation, step_s: float) -> None:
        """What a request of each waiting task costs beside those that run."""
        ran = [each.id for each in now.running]
        tasks = {each.task: each for each in now.waiting}
        if ran == self._ran and tasks.keys() <= self._more_s.keys():
            return
        self._ran = ran
        share_s = step_s / now.max_running
        first = list(tasks.items())[:TRIED]
        self._read_s = {task: now.costs.load_s(each, now.running) for task, each in first}
        self._more_s = {task: max(now.costs.step_s([*now.running, each]) - step_s, share_s) for task, each in first}
        read_s, more_s = (sum(each.values()) / len(first) for each in (self._read_s, self._more_s))
        self._read_s = dict.fromkeys(tasks, read_s) | self._read_s
        self._more_s = dict.fromkeys(tasks, more_s) | self._more_s


def _target_s(request: Request) -> float:
    return UNHURRIED_S if request.ttft_slo_s is None else request.ttft_slo_s


class _Batch:
    """The running requests that can still meet their targets: what each has left, and the tightest pace."""

    def __init__(self, now: Situation, step_s: float) -> None:
        self._slack: list[tuple[float, float]] = []
        self.pace_s = math.inf
        for each in now.running:
            pace_s, left, first_s = each.tpot_slo_s, each.remaining_tokens, each.first_token_s
            if pace_s is None or (now.now_s if first_s is None else first_s) > each.deadline_s:
                continue
            ran_s = 0.0 if first_s is None else now.now_s - first_s
            allowed_s = pace_s * (max(0, each.output_tokens - 1) + left) - ran_s
            if allowed_s >= left * step_s:
                self._slack.append((allowed_s, left))
                self.pace_s = min(self.pace_s, pace_s)

    def broken(self, step_s: float, stall_s: float) -> int:
        """How many will miss their target after such a stall and with such steps."""
        return sum(allowed_s < left * step_s + stall_s for allowed_s, left in self._slack)


class _Line:
    """The waiting requests in numbers, each read once, so that a thousand are scored in a fraction of a millisecond."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._tasks: dict[str | None, int] = {}
        self._table: NDArray[np.float64] = np.zeros((64, 6))

    def first(self, now: Situation, read_s: dict[str | None, float], more_s: dict[str | None, float]) -> list[int]:
        """Places in `now.waiting` of the TRIED least scores, the least first."""
        places = self._places(now.waiting)
        table = self._table[places]
        arrived, tokens, answer, deadline, target, task = table.T
        number = task.astype(np.int64)
        reading = np.array([read_s.get(name, 0.0) for name in self._tasks])[number]
        adding = np.array([more_s.get(name, 0.0) for name in self._tasks])[number]
        reading = reading + tokens * now.costs.prefill_s(1)
        score = arrived + STRETCH * (reading + answer * adding)
        score += np.where(now.now_s + reading > deadline, LATE * target, 0.0)
        if len(score) > TRIED:
            chosen = np.argpartition(score, TRIED)[:TRIED]
            return _ints(chosen[np.lexsort((chosen, score[chosen]))])
        return _ints(np.argsort(score, kind="stable"))

    def _places(self, waiting: Sequence[Request]) -> list[int]:
        rows = self._rows
        try:
            return [rows[each.id] for each in waiting]
        except KeyError:
            pass  # some are new
        if len(rows) > 2 * len(waiting) + 64:
            rows.clear()
            self._tasks.clear()  # labels are the clients' to choose
        for each in waiting:
            if each.id not in rows:
                self._add(each)
        return [rows[each.id] for each in waiting]

    def _add(self, request: Request) -> None:
        at = self._rows[request.id] = len(self._rows)
        if at >= len(self._table):
            self._table = np.concatenate([self._table, np.zeros_like(self._table)])
        task = self._tasks.setdefault(request.task, len(self._tasks))
        answer, target_s = request.remaining_tokens, _target_s(request)
        self._table[at] = (request.arrived_s, request.input_tokens, answer, request.deadline_s, target_s, task)


def _ints(values: NDArray[Any]) -> list[int]:
    return [int(value) for value in values]
