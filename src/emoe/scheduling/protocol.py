"""What a scheduler sees and says. Pure Python: the engine and the simulator call the same schedulers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

OVERRUN_SHARE = 0.05
"""Of its first expectation, what a request that has outrun it is expected to go on for (paper, section 2.6)."""


@dataclass(slots=True, eq=False)
class Request:
    """One request. Times are seconds on the engine's clock, lengths are tokens.

    Attributes:
        id: unique among the requests there are.
        arrived_s: when it was submitted.
        input_tokens: W, its prompt.
        max_tokens: the longest answer it may get.
        expected_tokens: the answer's expected length, the task's mean and at most `max_tokens`.
        task: its label, None where nothing tells.
        priority: lower goes first, as in vLLM; equal ones are the scheduler's to order.
        ttft_slo_s: target for the time to the first token, None: no target.
        tpot_slo_s: target for the mean time of each later token, None: no target.
        admitted_s: when it was first admitted, None while it has never run.
        first_token_s: when its first token was there.
        computed_tokens: of its input, how many have been read.
        output_tokens: how many it has answered.
        resumed: it was preempted for want of KV memory and waits to go on; such go before all others.
    """

    id: str
    arrived_s: float
    input_tokens: int
    max_tokens: int
    expected_tokens: float
    task: str | None = None
    priority: int = 0
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    admitted_s: float | None = None
    first_token_s: float | None = None
    computed_tokens: int = 0
    output_tokens: int = 0
    resumed: bool = False

    @property
    def deadline_s(self) -> float:
        """When its first token is due, infinity without a target."""
        return math.inf if self.ttft_slo_s is None else self.arrived_s + self.ttft_slo_s

    @property
    def slo_s(self) -> float:
        """The target of the whole request: first token, then the expected rest. Infinity where one of them has none."""
        if self.ttft_slo_s is None or self.tpot_slo_s is None:
            return math.inf
        return self.ttft_slo_s + self.tpot_slo_s * max(0.0, self.expected_tokens - 1)

    @property
    def remaining_tokens(self) -> float:
        """G of Equation 3: expected output tokens to come; 5 % of the first expectation once that is used up."""
        left = self.expected_tokens - self.output_tokens
        return left if left > 0 else OVERRUN_SHARE * self.expected_tokens


class Costs(Protocol):
    """The cost model as schedulers ask it; seconds."""

    @property
    def token_s(self) -> float:
        """c of Equation 3: compute (and communication) for one token of one request."""
        ...

    @property
    def admission_load_s(self) -> float:
        """dE of Equation 3 as profiled: the loading that admitting some request has caused so far, on average."""
        ...

    def step_s(self, requests: Sequence[Request]) -> float:
        """One step in which each of these requests decodes one token, its expected loads included."""
        ...

    def prefill_s(self, tokens: int) -> float:
        """Reading that many input tokens, without loads."""
        ...

    def load_s(self, request: Request, running: Sequence[Request]) -> float:
        """Loading of the experts that this request needs and that neither is resident nor needed by the running."""
        ...


@dataclass(frozen=True, slots=True)
class Situation:
    """What is the case when a scheduler is asked.

    Attributes:
        now_s: the engine's clock.
        waiting: in order of arrival; those with `resumed` first.
        running: admitted and not ended, in order of admission.
        max_running: how many may run at once.
        max_input_tokens: T_max of Algorithm 1: input tokens of all running requests together.
        free_kv_tokens: tokens for which KV memory is free.
        costs: the cost model.
    """

    now_s: float
    waiting: Sequence[Request]
    running: Sequence[Request]
    max_running: int
    max_input_tokens: int
    free_kv_tokens: int
    costs: Costs


class Scheduler(Protocol):
    """Chooses among the waiting. Limits (how many run, KV memory) are the core's, see `admissible`."""

    name: str

    def admit(self, now: Situation) -> list[Request]:
        """The waiting requests to admit now, in the order in which they are to be read."""
        ...
