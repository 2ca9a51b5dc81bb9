"""What no scheduler may get wrong: the limits, who goes first by right, and that nobody waits for ever.

The engine and the simulator call `admit` and nothing else. Every scheduler therefore has these properties:

- never more than `max_running` run; never more KV memory is promised than there is; the input tokens of all running
  requests stay within `max_input_tokens`, except of a request that runs alone;
- preempted requests (`resumed`) go before all others, in order;
- a request of a lower `priority` goes before one of a higher, and is never held up for it by a limit;
- whoever has waited `PATIENCE_S` goes first within its priority, in order of arrival;
- when nothing runs, someone is admitted.

So no request waits for ever unless requests of lower priority keep the engine full, which is what priority means.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from itertools import groupby

from emoe.scheduling.protocol import Request, Scheduler, Situation

PATIENCE_S = 3600.0
"""After so long a request no longer waits for its scheduler's liking: the bound of waiting for every scheduler."""


def kv_need(request: Request) -> int:
    """KV tokens that admitting it takes: its input, what it had answered before a preemption, and one more."""
    return request.input_tokens + request.output_tokens + 1


class Limits:
    """How much may still be admitted. Schedulers that pass over what does not fit ask it, too."""

    def __init__(self, now: Situation) -> None:
        """What the running requests leave."""
        self.running = len(now.running)
        self.max_running = now.max_running
        self.max_input_tokens = now.max_input_tokens
        self.free_kv_tokens = now.free_kv_tokens
        self.input_tokens = sum(request.input_tokens for request in now.running)

    @property
    def full(self) -> bool:
        """Whether as many run as may."""
        return self.running >= self.max_running

    def fits(self, request: Request) -> bool:
        """Whether it may be admitted now."""
        if self.full or kv_need(request) > self.free_kv_tokens:
            return False
        return self.running == 0 or self.input_tokens + request.input_tokens <= self.max_input_tokens

    def take(self, request: Request) -> None:
        """Count it as admitted."""
        self.running += 1
        self.input_tokens += request.input_tokens
        self.free_kv_tokens -= kv_need(request)


def admit(scheduler: Scheduler, now: Situation) -> list[Request]:
    """The waiting requests to admit now, in the order in which they are to be read, within all limits.

    Whoever is first in line by right (see the module's text) and does not fit keeps the rest waiting: what others leave
    free is kept for it. What the scheduler chooses is taken in its order, up to the first that does not fit.

    Raises:
        RuntimeError: the scheduler names a request that does not wait, or one twice: a defect in it.
    """
    limits = Limits(now)
    taken: list[Request] = []
    if limits.full or not now.waiting:
        return taken
    if not _take(limits, (request for request in now.waiting if request.resumed), taken):
        return taken
    fresh = sorted((request for request in now.waiting if not request.resumed), key=lambda each: each.priority)
    for _, group in groupby(fresh, key=lambda each: each.priority):
        alike = list(group)
        patient = [each for each in alike if now.now_s - each.arrived_s >= PATIENCE_S]
        if not _take(limits, patient, taken):
            break
        rest = alike if not patient else [each for each in alike if now.now_s - each.arrived_s < PATIENCE_S]
        if rest and not _take(limits, _ask(scheduler, now, rest, taken, limits), taken):
            break
        if limits.full:
            break
    if not taken and not now.running:
        first = [request for request in now.waiting if request.resumed] or fresh
        _take(limits, first[:1], taken)
    return taken


def _ask(
    scheduler: Scheduler, now: Situation, waiting: Sequence[Request], taken: Sequence[Request], limits: Limits
) -> list[Request]:
    """What the scheduler chooses of these, if those already taken run too."""
    running = [*now.running, *taken] if taken else now.running
    asked = dataclasses.replace(now, waiting=waiting, running=running, free_kv_tokens=limits.free_kv_tokens)
    chosen = scheduler.admit(asked)
    known = {id(request) for request in waiting}
    if len({id(request) for request in chosen} & known) != len(chosen):
        raise RuntimeError(f"the scheduler {scheduler.name!r} admits requests that do not wait, or one twice.")
    return chosen


def _take(limits: Limits, requests: Iterable[Request], taken: list[Request]) -> bool:
    """Admit in order while they fit; whether all did."""
    for request in requests:
        if not limits.fits(request):
            return False
        limits.take(request)
        taken.append(request)
    return True
