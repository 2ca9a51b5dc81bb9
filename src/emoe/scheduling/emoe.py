"""Algorithm 1 of the paper with Equation 3 (section 2.6), as printed.

Equation 3, the expected latency of running request i if R with W input tokens is admitted:

    t_i = dE + (W + n_i * G_i) * c + r_i

dE: `Costs.admission_load_s`; c: `Costs.token_s`; G_i: `Request.remaining_tokens`; n_i: requests that finish after i,
that is with more tokens to come; r_i: seconds since i was admitted. R is admitted if with it every running request and
R itself keep t under their SLO (`Request.slo_s`), and the input tokens stay below T_max.

Where the paper is silent:

- n_i counts over the running requests as they would be, R among them; those with as many tokens to come as i do not
  finish after it.
- R has not run yet: its own r is 0. The time it has waited is not in the equation.
- A request that is admitted counts as running for the next in line.
- Requests without a first-token target come in the order in which `edf` has them.

The listing adds a request S to the batch where R is meant; R is meant.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from emoe.scheduling.core import Limits
from emoe.scheduling.edf import due_s
from emoe.scheduling.protocol import Request, Situation


class Emoe:
    """Admits, in the order of first-token deadlines, what lets everybody keep their targets by Equation 3."""

    name = "emoe"

    def admit(self, now: Situation) -> list[Request]:
        """O(w log w + w log n + a n log n) for w waiting, n running and a admitted."""
        limits = Limits(now)
        if limits.full:
            return []
        batch = _Batch(now)
        admitted: list[Request] = []
        if not batch.may_take(min((each.input_tokens for each in now.waiting), default=0)):
            return admitted
        tokens = limits.input_tokens
        for request in sorted(now.waiting, key=due_s):
            if tokens + request.input_tokens < now.max_input_tokens and batch.keeps_targets_with(request):
                admitted.append(request)
                tokens += request.input_tokens
                if len(now.running) + len(admitted) >= now.max_running:
                    break
                batch.add(request)
        return admitted


class _Batch:
    """Equation 3 for all running requests at once.

    Solved for W, request i keeps its target with R exactly if W is below

        slack_i = (SLO_i - r_i - dE) / c - n_i * G_i       where R finishes before it or with it
        slack_i - G_i                                      where R finishes after it

    Sorted by G, the least slack of those that finish no sooner than R is a suffix minimum, and the least of the others
    a prefix minimum: a candidate costs one bisection.
    """

    def __init__(self, now: Situation) -> None:
        self._load_s, self._token_s = now.costs.admission_load_s, max(now.costs.token_s, 1e-12)
        # (G, what Equation 3 leaves of the SLO, in tokens)
        self._running = [
            (each.remaining_tokens, self._room(each, 0.0 if each.admitted_s is None else now.now_s - each.admitted_s))
            for each in now.running
        ]
        self._solve()

    def _room(self, request: Request, ran_s: float) -> float:
        return (request.slo_s - ran_s - self._load_s) / self._token_s

    def _solve(self) -> None:
        self._running.sort(key=lambda each: each[0])
        self._left = lefts = [left for left, _ in self._running]
        count = len(lefts)
        self._after = [0] * count
        for i in range(count - 2, -1, -1):
            self._after[i] = self._after[i + 1] if lefts[i + 1] == lefts[i] else count - 1 - i
        slack = [room - n * left for (left, room), n in zip(self._running, self._after, strict=True)]
        self._if_sooner = _running_minimum(slack[::-1])[::-1]
        self._if_later = _running_minimum([each - left for each, left in zip(slack, lefts, strict=True)])

    def may_take(self, tokens: int) -> bool:
        """Whether any request with at least so many input tokens can be taken, as far as the running are concerned."""
        return tokens < self._if_sooner[0]

    def keeps_targets_with(self, request: Request) -> bool:
        """Whether every running request and this one keep their SLO if it is admitted."""
        left, tokens = request.remaining_tokens, request.input_tokens
        at = bisect_left(self._left, left)  # those before it finish before the request
        if tokens >= self._if_sooner[at] or tokens >= self._if_later[at]:
            return False
        later = len(self._left) - at
        while later and self._left[-later] == left:
            later -= 1
        return tokens + later * left < self._room(request, 0.0)

    def add(self, request: Request) -> None:
        """Count it as running, for no time yet."""
        self._running.append((request.remaining_tokens, self._room(request, 0.0)))
        self._solve()


def _running_minimum(values: Sequence[float]) -> list[float]:
    """[least of the first 0, 1, ... all values]; of none it is infinite."""
    found = [float("inf")]
    for value in values:
        found.append(min(found[-1], value))
    return found
