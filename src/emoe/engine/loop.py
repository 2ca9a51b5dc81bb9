"""The engine's thread: admits, runs one step after another, and tells what came of each."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence

import torch

from emoe.engine.batching import Batcher, Slice
from emoe.engine.desk import Desk
from emoe.engine.interface import EngineSettings, FinishedEvent, FinishReason, TokenEvent
from emoe.engine.knowledge import Knowledge
from emoe.engine.measuring import Measures
from emoe.engine.rules import Rules
from emoe.engine.sampling import Choice, Draw, choose
from emoe.engine.tickets import Ticket, as_emoe_error
from emoe.errors import EmoeError
from emoe.model.bind import Binding
from emoe.model.passes import Pass, Segment
from emoe.scheduling.core import admit
from emoe.scheduling.costs import Step
from emoe.scheduling.protocol import Scheduler, Situation

_LOG = logging.getLogger("emoe.engine")
_EMPTY_TURNS = 1000
"""Turns in a row that run nothing though something is there, after which the engine says that it is stuck."""


class Loop:
    """Runs requests until told to stop. `batcher` is set before `run`, `kv_free` is for others to read."""

    batcher: Batcher

    def __init__(
        self,
        settings: EngineSettings,
        binding: Binding,
        desk: Desk,
        scheduler: Scheduler,
        knowledge: Knowledge,
        measures: Measures,
        rules: Rules,
    ) -> None:
        """Wire the parts."""
        self._settings = settings
        self._binding = binding
        self._runtime = binding.runtime
        self._desk = desk
        self._scheduler = scheduler
        self._knowledge = knowledge
        self._measures = measures
        self._rules = rules
        self.kv_tokens = self.kv_free = settings.kv_tokens
        self._gone: set[int] = set()  # sequences that have left since the last step
        self._suspects: deque[str] = deque()
        self._choices: dict[str, Choice] = {}
        self._alone: Ticket | None = None  # a first prompt that is read with its own routes: nobody joins it
        self._faults = self._empty_turns = 0

    def run(self) -> None:
        """Until the desk says stop, or something fails that no request is to blame for."""
        failure: EmoeError | None = None
        self._runtime.observers.append(self._measures.observe)
        try:
            while self._desk.wait_for_work():
                self._turn()
        except Exception as error:  # not swallowed: every request ends with it, and the engine says so
            _LOG.exception("the engine has died")
            failure = as_emoe_error(error)
        finally:
            self._desk.stop(failure)
            self._runtime.announce(None)
            self._runtime.observers.remove(self._measures.observe)
            for ticket in self._desk.all():
                self._end(ticket, "cancelled" if failure is None else "error", failure)
            self._desk.tell_left()
            self.batcher.close()

    def choose(self, logits: torch.Tensor, requests: Sequence[str]) -> list[int]:
        """Choose the step's tokens, see `emoe.engine.batching.Sample`."""
        tickets = [self._desk[request] for request in requests]
        draws = [Draw(ticket.submission.sampling, ticket.seed, len(ticket.answer)) for ticket in tickets]
        scores = self._rules.apply(logits, [ticket.tokens for ticket in tickets]) if self._rules else None
        choices = choose(logits, draws, scores)
        self._choices = dict(zip(requests, choices, strict=True))
        return [choice.token for choice in choices]

    # -- admission ------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Let go who is done for, admit, and run one step."""
        now = time.perf_counter()
        for ticket in self._desk.all():
            if ticket.cancelled:
                self._end(ticket, "cancelled")
            elif now > ticket.ends_s:
                self._end(ticket, "timeout")
        if self._suspects:
            self._admit_suspect()
        else:
            self._admit(now)
        if self._desk.running:
            self._step()

    def _admit(self, now: float) -> None:
        waiting, running = self._desk.waiting(), self._desk.running
        if not waiting or (self._alone is not None and self._alone in running and not self._alone.answer):
            return
        self._alone = None
        first = self._knowledge.reads_first_prompt_alone()
        if first and running:
            return
        self._knowledge.forget_residents()
        chosen = admit(
            self._scheduler,
            Situation(
                now_s=now,
                waiting=[ticket.request for ticket in waiting],
                running=[ticket.request for ticket in running],
                max_running=self._settings.max_running,
                max_input_tokens=self._settings.max_input_tokens or self.kv_tokens,
                free_kv_tokens=self._unpromised(),
                costs=self._knowledge.costs,
            ),
        )
        for request in chosen[:1] if first else chosen:
            ticket = self._desk[request.id]
            if first:
                self._alone = ticket
            self._begin(ticket, now)

    def _admit_suspect(self) -> None:
        """The one to be tried alone, if the failed step cost it its pages. The others have to give theirs, or wait."""
        ticket = self._desk[self._suspects[0]]
        if ticket not in self._desk.running:
            self._begin(ticket, time.perf_counter())

    def _begin(self, ticket: Ticket, now: float) -> None:
        request = ticket.request
        request.resumed = False
        request.admitted_s = now if request.admitted_s is None else request.admitted_s
        self._desk.admit(ticket)
        ends = () if ticket.submission.sampling.ignore_end else self._runtime.end_tokens
        left = request.max_tokens - len(ticket.answer)
        self.batcher.add(request.id, ticket.tokens, left, ends, (request.priority, request.arrived_s))

    def _unpromised(self) -> int:
        """Free KV tokens, less what the running requests' prompts still need and a page for each to grow."""
        page = self._settings.page_tokens
        promised = 0
        for ticket in self._desk.running:
            whole = ticket.request.input_tokens + len(ticket.answer)
            promised += (-(-whole // page) - -(-ticket.cached // page) + 1) * page
        return max(0, self.batcher.free_tokens - promised)

    # -- steps ----------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """One forward pass over the running requests."""
        start = time.perf_counter()
        parts = self.batcher.prepare({self._suspects[0]} if self._suspects else None)
        self._take_back(self.batcher.take_preempted())
        if not parts:
            self._skip()
            return
        self._empty_turns = 0
        tickets = [self._desk[part.id] for part in parts]
        decodes = [
            part.queries == 1 and part.past >= ticket.request.input_tokens
            for ticket, part in zip(tickets, parts, strict=True)
        ]
        now = self._pass_of(parts, tickets, decodes)
        self._measures.begin_step(tickets, now)
        self._runtime.announce(now)
        try:
            self.batcher.run()
            done = self.batcher.finish()
        except Exception as error:  # not swallowed: the request that causes it ends with it, see `_blame`
            now.failed = True
            self._blame(tickets, error)
            return
        self._faults = 0
        if self._suspects:
            self._suspects.popleft()
        ended = time.perf_counter()
        loads, wait_s = self._measures.loads_of_step()
        step = Step(
            decode_tokens=sum(decodes),
            prefill_tokens=sum(part.queries for part, decode in zip(parts, decodes, strict=True) if not decode),
            kv_tokens=sum(part.past + part.queries for part in parts),
            loads=loads,
            seconds=ended - start,
            wait_s=wait_s,
        )
        self._knowledge.costs.observe(step)
        self._knowledge.note_loading(tickets, parts, decodes, wait_s)
        self._measures.end_step(step, parts)
        self.kv_free = self.batcher.free_tokens
        for ticket, part in zip(tickets, parts, strict=True):
            self._note(ticket, part, part.id in done, ended)

    def _skip(self) -> None:
        """Nothing could run: what was preempted has to be admitted first, or a suspect has gone."""
        if self._suspects:
            self._suspects.popleft()
        self._empty_turns += 1
        if self._empty_turns > _EMPTY_TURNS:
            raise EmoeError(
                f"nothing can run although {len(self._desk.running)} requests are there, which is a defect in emoe: "
                "please report it."
            )

    def _pass_of(self, parts: Sequence[Slice], tickets: Sequence[Ticket], decodes: Sequence[bool]) -> Pass:
        """What the model is told of the step; from here on the sequences in it are known to it."""
        segments, start = [], 0
        for part, ticket, decode in zip(parts, tickets, decodes, strict=True):
            segments.append(
                Segment(
                    sequence=ticket.number,
                    start=start,
                    stop=start + part.queries,
                    phase="decode" if decode else "prefill",
                    new=not ticket.announced,
                    task=ticket.request.task,
                    position=part.past,
                    prompt_tokens=ticket.request.input_tokens,
                )
            )
            ticket.announced = True
            start += part.queries
        ended, self._gone = frozenset(self._gone), set()
        return Pass(
            phase="decode" if all(decodes) else "prefill",
            tokens=start,
            new_prompt=any(segment.new for segment in segments),
            input_ids=self.batcher.input_ids(start),
            segments=tuple(segments),
            announced=True,
            ended=ended,
            kept=1,
        )

    def _note(self, ticket: Ticket, part: Slice, done: bool, now: float) -> None:
        """Note what a step did for one request, and tell it."""
        request = ticket.request
        ticket.cached = part.past + part.queries
        request.computed_tokens = min(request.input_tokens, ticket.cached)
        if not part.answers:
            return
        choice = self._choices[part.id]
        ticket.answer.append(choice.token)
        request.output_tokens += 1
        ticket.last_token_s = now
        if request.first_token_s is None:
            request.first_token_s = now
        self._tell(ticket, TokenEvent(choice.token, now, choice.logprob, choice.top))
        if done:
            ended = choice.token in self._runtime.end_tokens and not ticket.submission.sampling.ignore_end
            self._end(ticket, "stop" if ended else "length")

    def _take_back(self, preempted: Sequence[str]) -> None:
        """Preempted requests wait again, before all others."""
        tickets = [self._desk[request] for request in preempted]
        for ticket in tickets:
            ticket.preemptions += 1
            ticket.cached = 0
            ticket.request.resumed = True
        self._measures.preemptions += len(tickets)
        self._desk.take_back(tickets)

    # -- ends -----------------------------------------------------------------------------------------------

    def _blame(self, tickets: Sequence[Ticket], error: Exception) -> None:
        """A step failed. Alone, the request has caused it; together, each is tried alone in the steps to come.

        Raises:
            EmoeError: twice as many requests as may run together have failed, and no step went well in between: it is
                not the requests.
        """
        _LOG.warning("a step of %d requests failed: %s", len(tickets), error)
        self._runtime.announce(None)
        self.batcher.undo()
        self._take_back(self.batcher.take_preempted())
        if len(tickets) > 1:
            self._suspects = deque(ticket.id for ticket in tickets)
            return
        if self._suspects:
            self._suspects.popleft()
        self._end(tickets[0], "error", as_emoe_error(error))
        self._faults += 1
        if self._faults > 2 * self._settings.max_running:
            raise as_emoe_error(error) from error

    def _end(self, ticket: Ticket, reason: FinishReason, error: EmoeError | None = None) -> None:
        """The last of a request: slots and pages are free before anybody is told."""
        self._desk.leave(ticket)
        self.batcher.remove(ticket.id)
        self.kv_free = self.batcher.free_tokens
        if ticket.id in self._suspects:
            self._suspects.remove(ticket.id)
        if ticket.announced:
            self._gone.add(ticket.number)
        now = time.perf_counter()
        self._measures.end_request(ticket)
        if reason == "stop":
            self._knowledge.note_answer(ticket)
        report = ticket.report(now, reason, self._runtime.mode, self._binding.lossy)
        self._tell(ticket, FinishedEvent(reason, report, error))
        self._desk.tell_left()

    def _tell(self, ticket: Ticket, event: TokenEvent | FinishedEvent) -> None:
        try:
            ticket.on_event(event)
        except Exception:  # a client's defect must not end the other requests
            _LOG.exception("on_event of request %s raised: the request is cancelled", ticket.id)
            ticket.cancelled = True
