"""One request on its way through the engine, and what is reported of it."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field

from emoe.config import Mode
from emoe.engine.interface import FinishReason, OnEvent, Report, Submission, TaskSource
from emoe.errors import EmoeError
from emoe.scheduling.protocol import Request


@dataclass(slots=True)
class Used:
    """What a request took of the experts; see `Report`."""

    hits: int = 0
    misses: int = 0
    loads: int = 0
    bytes_loaded: int = 0
    rerouted: int = 0


@dataclass(slots=True, eq=False)
class Ticket:
    """One request. The engine's thread owns it once it is submitted.

    Attributes:
        number: unique; names its sequence to the model.
        request: as schedulers see it.
        answer: its tokens so far.
        announced: its first pass has been announced to the model.
        cancelled: its client no longer wants it.
        cached: of its tokens, how many are in KV memory.
        read: of its prompt, how many have ever been read.
        load_s: waiting for experts that its prompt has caused.
    """

    number: int
    submission: Submission
    request: Request
    on_event: OnEvent
    task_source: TaskSource
    seed: int
    answer: list[int] = field(default_factory=list)
    announced: bool = False
    cancelled: bool = False
    preemptions: int = 0
    cached: int = 0
    read: int = 0
    load_s: float = 0.0
    last_token_s: float | None = None
    used: Used = field(default_factory=Used)

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def tokens(self) -> list[int]:
        """What has to be read to go on: the prompt and what was answered."""
        return [*self.submission.prompt_ids, *self.answer]

    @property
    def ends_s(self) -> float:
        """When its time is over, on the engine's clock."""
        limit = self.submission.deadline_s
        return math.inf if limit is None else self.request.arrived_s + limit

    def report(self, now_s: float, reason: FinishReason, mode: Mode, lossy: bool) -> Report:
        """What became of it."""
        request = self.request
        started = request.admitted_s if request.admitted_s is not None else now_s
        ttft = None if request.first_token_s is None else request.first_token_s - request.arrived_s
        tpot = None
        if request.first_token_s is not None and self.last_token_s is not None and len(self.answer) > 1:
            tpot = (self.last_token_s - request.first_token_s) / (len(self.answer) - 1)
        whole = reason in ("stop", "length")
        ttft_met = _met(ttft, request.ttft_slo_s, whole)
        # One token has no time per later token: that target is met with it.
        tpot_met = _met(0.0 if tpot is None and whole else tpot, request.tpot_slo_s, whole)
        targets = [met for met in (ttft_met, tpot_met) if met is not None]
        return Report(
            id=request.id,
            task=request.task,
            task_source=self.task_source,
            input_tokens=request.input_tokens,
            output_tokens=len(self.answer),
            arrived_s=request.arrived_s,
            queue_s=started - request.arrived_s,
            ttft_s=ttft,
            tpot_s=tpot,
            e2e_s=now_s - request.arrived_s,
            preemptions=self.preemptions,
            hits=self.used.hits,
            misses=self.used.misses,
            experts_loaded=self.used.loads,
            bytes_loaded=self.used.bytes_loaded,
            rerouted_tokens=self.used.rerouted,
            ttft_slo_s=request.ttft_slo_s,
            tpot_slo_s=request.tpot_slo_s,
            ttft_met=ttft_met,
            tpot_met=tpot_met,
            slo_met=all(targets) if targets else None,
            mode=mode,
            lossy=lossy,
        )


def _met(seconds: float | None, target: float | None, whole: bool) -> bool | None:
    """Whether a target was met; a request that was not answered in whole has missed what it has not reached."""
    if target is None:
        return None
    if seconds is None:
        return False if whole else None
    return seconds <= target


def new_seed() -> int:
    """A seed for a request that names none."""
    return secrets.randbits(63)


def as_emoe_error(error: BaseException) -> EmoeError:
    """The error a request ends with: emoe's own as it is, any other by its name."""
    if isinstance(error, EmoeError):
        return error
    return EmoeError(f"{type(error).__name__}: {error}")
