"""Earliest first-token deadline first."""

from __future__ import annotations

import heapq
import math

from emoe.scheduling.protocol import Request, Situation

UNHURRIED_S = 60.0
"""A request without a target is ordered as if its first token were due so long after it came: behind those in a hurry,
and yet not for ever."""


def due_s(request: Request) -> float:
    """When its first token is due, for ordering: finite for every request."""
    deadline_s = request.deadline_s
    return request.arrived_s + UNHURRIED_S if deadline_s == math.inf else deadline_s


class Edf:
    """By the deadline of the first token, then by arrival. One that does not fit keeps the rest waiting."""

    name = "edf"

    def admit(self, now: Situation) -> list[Request]:
        """As many of the waiting, the most urgent first, as may run."""
        return heapq.nsmallest(max(0, now.max_running - len(now.running)), now.waiting, key=due_s)
