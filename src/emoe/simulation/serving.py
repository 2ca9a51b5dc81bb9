"""Continuous batching on a virtual clock: the engine's schedulers, limits and steps over recorded routes.

A step decodes one token of every request whose input has been read, then reads input with what is left of
`max_batch_tokens`, in the order of admission. Its time is that of the cost model, plus the loads of its misses one
after another. When KV memory runs short the request admitted last is preempted: it goes to the head of the line and
reads its input and its answer so far again.

    results = simulate_serving(calls, routes, settings)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from emoe.errors import UsageError
from emoe.residency.budget import PoolPlan
from emoe.residency.eviction import make_eviction
from emoe.scheduling.core import admit
from emoe.scheduling.costs import Array, CostModel, Step
from emoe.scheduling.protocol import Request, Situation
from emoe.scheduling.registry import make_scheduler
from emoe.simulation.serving_banks import Banks
from emoe.simulation.serving_results import Served, ServingResults
from emoe.simulation.serving_traffic import Call, Prompt, Routes

REPORT_STEPS = 500
ASK_STEPS = 1
"""While requests wait and may run, the scheduler is asked before every so many steps, as in the engine."""

Report = Callable[[int, int], None]
"""Called now and then with (requests ended, requests in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSettings:
    """How the engine runs and what its steps take.

    Attributes:
        scheduler: fifo, edf, emoe or affinity.
        max_running, max_batch_tokens, kv_tokens, page_tokens: as `emoe.engine.interface.EngineSettings`.
        max_input_tokens: T_max; None: as much as KV memory holds.
        costs: coefficients in seconds, as `CostModel.as_dict` gives them: step_s, token_s, prefill_token_s, kv_token_s,
            expert_load_s.
        bank: the experts' slots, layers by rank; None: every expert is resident.
        eviction: the rule of the bank.
    """

    scheduler: str = "affinity"
    max_running: int = 32
    max_batch_tokens: int = 512
    kv_tokens: int = 16384
    page_tokens: int = 32
    max_input_tokens: int | None = None
    costs: Mapping[str, float] = field(default_factory=dict)
    bank: PoolPlan | None = None
    eviction: str = "least-stale"

    def __post_init__(self) -> None:
        """Raises UsageError for a limit below 1."""
        for name in ("max_running", "max_batch_tokens", "kv_tokens", "page_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}.")


@dataclass(slots=True, eq=False)
class _Job:
    """A request on its way: of `to_read` tokens `read` are in KV memory, in `pages`; it answers when all are."""

    call: Call
    number: int
    request: Request
    prompt: Prompt
    to_read: int
    read: int = 0
    pages: int = 0
    served: Served = field(default_factory=Served)


def simulate_serving(
    calls: Sequence[Call],
    routes: Routes,
    settings: SimulationSettings,
    *,
    shares: Callable[[str | None], Array | None] | None = None,
    report: Report | None = None,
) -> ServingResults:
    """Serve all calls to their end.

    Args:
        calls: in order of time.
        routes: what they replay.
        settings: the engine and its costs.
        shares: what schedulers believe of a task's experts (default: what the routes really have).
        report: called now and then.

    Raises:
        UsageError: a call that KV memory can never hold, or of a task without routes, or calls out of order.
    """
    return _Simulation(calls, routes, settings, shares).run(report)


class _Simulation:
    def __init__(
        self,
        calls: Sequence[Call],
        routes: Routes,
        settings: SimulationSettings,
        shares: Callable[[str | None], Array | None] | None,
    ) -> None:
        self.settings, self.routes = settings, routes
        self.now = 0.0
        self.jobs = [self._job(number, call) for number, call in enumerate(calls)]
        if any(later.at_s < call.at_s for call, later in pairwise(calls)):
            raise UsageError("calls must be in order of time: sort them by at_s.")
        self.waiting: list[_Job] = []
        self.running: list[_Job] = []
        self.free_pages = settings.kv_tokens // settings.page_tokens
        bank = settings.bank
        self.banks = None if bank is None else Banks(routes.shape, bank, make_eviction(settings.eviction))
        if self.banks is not None and self.banks.everything:
            self.banks = None
        self.scheduler = make_scheduler(settings.scheduler)
        known = routes.shares() if shares is None else {}
        self.coefficients = {
            name: float(settings.costs.get(name, 0.0))
            for name in ("step_s", "token_s", "prefill_token_s", "kv_token_s", "expert_load_s")
        }
        self.costs = CostModel(
            routes.shape,
            known.get if shares is None else shares,  # type: ignore[arg-type]
            lambda: None if self.banks is None else self.banks.resident,
            **self.coefficients,
        )
        self.keys = routes.shape.layers * routes.shape.experts
        self.jobs_of = {id(job.request): job for job in self.jobs}
        self.steps = self.loads = 0
        self.busy_s = self.wait_s = self.preempted = 0.0
        self.decoded = 0
        self._plain_wait_s = 0.0

    def _job(self, number: int, call: Call) -> _Job:
        settings = self.settings
        prompts = self.routes.prompts.get(call.task)
        if not prompts:
            raise UsageError(f"request {number} is of the task {call.task!r}, of which there are no routes.")
        need = -(-(call.input_tokens + call.output_tokens) // settings.page_tokens)
        if need > settings.kv_tokens // settings.page_tokens:
            raise UsageError(
                f"request {number} needs {call.input_tokens} + {call.output_tokens} tokens of KV memory and there are "
                f"{settings.kv_tokens}: give more, or shorter requests."
            )
        longest = call.max_tokens or max(call.output_tokens, round(call.expected_tokens))
        request = Request(
            id=str(number),
            arrived_s=call.at_s,
            input_tokens=call.input_tokens,
            max_tokens=longest,
            expected_tokens=max(1.0, min(call.expected_tokens, float(longest))),
            task=call.label,
            priority=call.priority,
            ttft_slo_s=call.ttft_slo_s,
            tpot_slo_s=call.tpot_slo_s,
        )
        return _Job(call, number, request, prompts[call.prompt % len(prompts)], call.input_tokens)

    def run(self, report: Report | None) -> ServingResults:
        jobs = self.jobs
        coming = ended = 0
        since = ASK_STEPS
        while ended < len(jobs):
            if not self.running and not self.waiting:
                self.now = max(self.now, jobs[coming].call.at_s)  # nothing to do until then
            while coming < len(jobs) and jobs[coming].call.at_s <= self.now:
                self.waiting.append(jobs[coming])
                coming += 1
                since = ASK_STEPS
            if self.waiting and (since >= ASK_STEPS or not self.running):
                self._admit()
                since = 0
            since += 1
            if done := self._step():
                ended += done
                since = ASK_STEPS
            if report is not None and self.steps % REPORT_STEPS == 0:
                report(ended, len(jobs))
        if report is not None:
            report(ended, len(jobs))
        return ServingResults(
            scheduler=self.scheduler.name,
            calls=[job.call for job in jobs],
            served=[job.served for job in jobs],
            seconds=self.now - (jobs[0].call.at_s if jobs else 0.0),
            busy_s=self.busy_s,
            wait_s=self.wait_s,
            steps=self.steps,
            loads=self.loads,
            costs=self.costs.as_dict(),
        )

    # -- admission ------------------------------------------------------------------------------------------

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.settings.page_tokens)

    def _admit(self) -> None:
        settings = self.settings
        if len(self.running) >= settings.max_running:
            return
        # What was admitted and not yet read has its pages promised, and each running request one to grow.
        promised = sum(self._pages(job.to_read) - job.pages + 1 for job in self.running)
        most = settings.kv_tokens if settings.max_input_tokens is None else settings.max_input_tokens
        situation = Situation(
            now_s=self.now,
            waiting=[job.request for job in self.waiting],
            running=[job.request for job in self.running],
            max_running=settings.max_running,
            max_input_tokens=most,
            free_kv_tokens=max(0, self.free_pages - promised) * settings.page_tokens,
            costs=self.costs,
        )
        taken = admit(self.scheduler, situation)
        if not taken:
            return
        chosen = {id(request) for request in taken}
        self.waiting = [job for job in self.waiting if id(job.request) not in chosen]
        for request in taken:
            job = self.jobs_of[id(request)]
            request.resumed = False
            if request.admitted_s is None:
                request.admitted_s = job.served.admitted_s = self.now
            self.running.append(job)

    def _preempt(self, job: _Job) -> None:
        """Take its pages; it waits at the head of the line, behind those preempted before it that came earlier."""
        self.running.remove(job)
        self.free_pages += job.pages
        job.pages = 0
        request = job.request
        request.computed_tokens, request.resumed = 0, True
        job.read = 0
        job.to_read = request.input_tokens + request.output_tokens
        job.served.preemptions += 1
        at = sum(other.request.resumed and other.number < job.number for other in self.waiting)
        self.waiting.insert(at, job)

    def _grow(self, job: _Job, tokens: int) -> bool:
        """Give it pages for so many tokens in all, preempting others; False: it was preempted itself."""
        more = self._pages(tokens) - job.pages
        while more > self.free_pages:
            last = self.running[-1]
            self._preempt(last)
            if last is job:
                return False
        if more > 0:
            self.free_pages -= more
            job.pages += more
        return True

    # -- steps ----------------------------------------------------------------------------------------------

    def _step(self) -> int:
        """One pass of the model; how many requests it ended."""
        decoding: list[_Job] = []
        budget = self.settings.max_batch_tokens
        for job in [job for job in self.running if job.read >= job.to_read]:
            if budget and job.pages and self._grow(job, job.request.input_tokens + job.request.output_tokens + 1):
                decoding.append(job)
                budget -= 1
        decoding = [job for job in decoding if job.pages]  # one that came later may have taken their pages
        reading: list[tuple[_Job, int]] = []
        for job in list(self.running):
            left = job.to_read - job.read
            if left <= 0 or not budget or job not in self.running:
                continue
            chunk = min(left, budget)
            if self._pages(job.read + chunk) - job.pages > self.free_pages and (decoding or reading):
                break  # room will come; those that decode are not preempted for input
            if self._grow(job, job.read + chunk):
                reading.append((job, chunk))
                budget -= chunk
        if not decoding and not reading:
            return 0
        return self._run(decoding, reading)

    def _run(self, decoding: list[_Job], reading: list[tuple[_Job, int]]) -> int:
        prefill_tokens = sum(chunk for _, chunk in reading)
        kv_tokens = sum(job.request.input_tokens + job.request.output_tokens for job in decoding)
        kv_tokens += sum(job.read + chunk for job, chunk in reading)
        loads = 0
        if self.banks is not None:
            loads = self.banks.run(self._counts(decoding, reading), prefill=bool(reading))
        wait_s = loads * self.coefficients["expert_load_s"]
        seconds = wait_s + self._compute_s(len(decoding), prefill_tokens, kv_tokens)
        self.now += seconds
        self.steps += 1
        self.loads += loads
        self.busy_s += seconds
        self.wait_s += wait_s
        self.costs.observe(Step(len(decoding), prefill_tokens, kv_tokens, loads, seconds, wait_s))
        if reading:
            self.costs.observe_admission(max(0.0, wait_s - self._plain_wait_s) / len(reading))
        else:
            self._plain_wait_s += 0.05 * (wait_s - self._plain_wait_s)
        ended = 0
        for job, chunk in reading:
            job.read += chunk
            job.request.computed_tokens = min(job.read, job.request.input_tokens)
            if job.read >= job.to_read:
                ended += self._answer(job)
        for job in decoding:
            job.read += 1
            job.to_read += 1
            ended += self._answer(job)
        return ended

    def _compute_s(self, decode_tokens: int, prefill_tokens: int, kv_tokens: int) -> float:
        cost = self.coefficients
        return (
            cost["step_s"]
            + decode_tokens * cost["token_s"]
            + prefill_tokens * cost["prefill_token_s"]
            + kv_tokens * cost["kv_token_s"]
        )

    def _counts(self, decoding: list[_Job], reading: list[tuple[_Job, int]]) -> Array:
        """int64 [layers * experts]: tokens of the step for each key."""
        rows: list[int] = []
        for job in decoding:
            prompt = job.prompt
            rows.append(prompt.answer_start + (job.call.offset + job.request.output_tokens - 1) % prompt.answer_rows)
        parts = [np.array(rows, dtype=np.int64)] if rows else []
        for job, chunk in reading:
            prompt, read = job.prompt, job.read
            of_input = np.arange(read, min(read + chunk, job.call.input_tokens))
            again = np.arange(max(0, read - job.call.input_tokens), read + chunk - job.call.input_tokens)
            parts.append(prompt.input_start + (job.call.offset + of_input) % prompt.input_rows)
            if len(again):
                parts.append(prompt.answer_start + (job.call.offset + again) % prompt.answer_rows)
        chosen = self.routes.rows[np.concatenate(parts)]
        return np.bincount(chosen.reshape(-1), minlength=self.keys + 1)[: self.keys]

    def _answer(self, job: _Job) -> int:
        """A token is there; 1 if it was the last."""
        request, served = job.request, job.served
        request.output_tokens += 1
        self.decoded += 1
        if request.first_token_s is None:
            request.first_token_s = served.first_token_s = self.now
        if request.output_tokens < job.call.output_tokens:
            return 0
        served.ended_s = self.now
        self.free_pages += job.pages
        job.pages = 0
        self.running.remove(job)
        return 1
