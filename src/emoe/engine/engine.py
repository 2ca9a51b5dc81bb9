"""The engine: takes requests from any thread, runs them together in a thread of its own, and says what comes out."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emoe.config import Mode
from emoe.engine.batching import Batcher, Slice
from emoe.engine.interface import (
    EngineSettings,
    EngineStats,
    EngineStoppedError,
    FinishedEvent,
    FinishReason,
    OnEvent,
    QueueFullError,
    Submission,
    TokenEvent,
    TooLongError,
)
from emoe.engine.knowledge import Knowledge
from emoe.engine.measuring import Measures
from emoe.engine.sampling import Choice, Draw, choose
from emoe.engine.tickets import Ticket, as_emoe_error, new_seed
from emoe.errors import EmoeError, UsageError
from emoe.model.bind import binding_of
from emoe.model.runtime import Pass, Segment
from emoe.scheduling.core import admit
from emoe.scheduling.costs import CostModel, Step
from emoe.scheduling.protocol import Request, Situation
from emoe.scheduling.registry import make_scheduler
from emoe.tasks.profile import Profile

_LOG = logging.getLogger("emoe.engine")
_EMPTY_TURNS = 1000
"""Turns in a row that run nothing though something is there, after which the engine says that it is stuck."""


class Engine:
    """Continuous batching over a model made by `emoe.load`. Use it from any thread; events come from its own."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        settings: EngineSettings,
        *,
        profile: Profile | None = None,
    ) -> None:
        """Check everything; nothing runs before `start`.

        Without `profile` the model's own is used, where it was loaded with one.

        Raises:
            UsageError: the model was not made by `emoe.load`, or a setting cannot be meant.
        """
        self._binding = binding_of(model)
        self._model = model
        self.settings = settings
        _check(settings)
        self._scheduler = make_scheduler(settings.scheduler)
        self.scheduler_name = self._scheduler.name
        self.mode: Mode = self._binding.runtime.mode
        self.lossy: bool = self._binding.ahead.lossy
        self.layers = len(self._binding.runtime.layers)
        stated = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        limits = [each for each in (stated, settings.context) if isinstance(each, int)]
        self.max_context = min(limits) if limits else settings.kv_tokens
        self._knowledge = Knowledge(self._binding, tokenizer, profile or self._binding.ahead.profile)
        self.costs: CostModel = self._knowledge.costs
        self._measures = Measures(self._binding)
        self._batcher: Batcher | None = None
        self._thread: threading.Thread | None = None
        self._wake = threading.Condition()
        self._tickets: dict[str, Ticket] = {}
        self._waiting: list[Ticket] = []
        self._running: list[Ticket] = []
        self._gone: set[int] = set()  # sequences that have left since the last step
        self._suspects: deque[str] = deque()
        self._choices: dict[str, Choice] = {}
        self._alone: Ticket | None = None  # a first prompt that is read with its own routes: nobody joins it
        self._numbers = 0
        self._kv_free = settings.kv_tokens
        self._faults = self._empty_turns = 0
        self._draining = self._stopping = False
        self.failure: EmoeError | None = None

    # -- for any thread -------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether it runs and takes requests, or would if it were not draining."""
        return self._thread is not None and self._thread.is_alive() and self.failure is None

    @property
    def kv_tokens(self) -> int:
        """Tokens that KV memory holds: the longest request that can ever run."""
        return self.settings.kv_tokens if self._batcher is None else self._batcher.kv_tokens

    def start(self) -> None:
        """Take KV memory, set the model's attention and start the thread.

        Raises:
            UnsupportedModelError: this model, or this transformers, cannot batch continuously.
            EngineStoppedError: it was started before.
        """
        if self._thread is not None:
            raise EngineStoppedError("an engine runs once: make another one with the same model.")
        settings = self.settings
        self._batcher = Batcher(
            self._model,
            self._choose,
            page_tokens=settings.page_tokens,
            kv_tokens=settings.kv_tokens,
            max_batch_tokens=settings.max_batch_tokens,
            max_running=settings.max_running,
        )
        self._kv_free = self._batcher.kv_tokens
        self._binding.runtime.observers.append(self._measures.observe)
        self._thread = threading.Thread(
            target=self._run, args=(self._batcher, torch.get_num_threads()), name="emoe-engine", daemon=True
        )
        self._thread.start()

    def submit(self, submission: Submission, on_event: OnEvent) -> str:
        """Queue a request and return its id. `on_event` gets its tokens and, last of all, one `FinishedEvent`.

        Raises:
            EngineStoppedError: the engine is stopping, has stopped or has died.
            QueueFullError: too many requests wait.
            TooLongError: the request can never fit.
            UsageError: an empty prompt, or settings that cannot be meant.
        """
        self._check(submission)
        task, source = self._knowledge.task_of(submission)
        with self._wake:
            if not self.alive or self._stopping or self._draining:
                why = f": {self.failure}" if self.failure is not None else ""
                raise EngineStoppedError(f"the engine takes no more requests, it is stopping or has stopped{why}")
            waiting = sum(1 for each in self._waiting if not each.request.resumed)
            if waiting >= self.settings.max_waiting:
                seconds = self._measures.seconds_per_departure()
                raise QueueFullError(
                    f"{waiting} requests wait already, and no more than {self.settings.max_waiting} may. Try again in "
                    f"about {seconds:.0f} s.",
                    retry_after_s=seconds,
                )
            self._numbers += 1
            request = Request(
                id=uuid.uuid4().hex,
                arrived_s=time.perf_counter(),
                input_tokens=len(submission.prompt_ids),
                max_tokens=submission.max_tokens,
                expected_tokens=self._knowledge.expected_tokens(submission, task),
                task=task,
                priority=submission.priority,
            )
            targets = self.settings.targets.get(task) or self.settings.targets.get(None)
            request.ttft_slo_s, request.tpot_slo_s = submission.ttft_slo_s, submission.tpot_slo_s
            if targets is not None:
                request.ttft_slo_s = targets.ttft_slo_s if request.ttft_slo_s is None else request.ttft_slo_s
                request.tpot_slo_s = targets.tpot_slo_s if request.tpot_slo_s is None else request.tpot_slo_s
            seed = new_seed() if submission.sampling.seed is None else submission.sampling.seed
            ticket = Ticket(self._numbers, submission, request, on_event, source, seed)
            self._tickets[request.id] = ticket
            self._waiting.append(ticket)
            self._wake.notify_all()
        return request.id

    def cancel(self, request: str) -> None:
        """End a request; it ends with reason "cancelled". Does nothing for one that has ended or never was."""
        with self._wake:
            if (ticket := self._tickets.get(request)) is not None:
                ticket.cancelled = True
                self._wake.notify_all()

    def drain(self, timeout_s: float) -> bool:
        """Take no new requests and wait for those that are there; whether all have ended."""
        with self._wake:
            self._draining = True
            self._wake.notify_all()
            return self._wake.wait_for(lambda: not self._tickets or not self.alive, timeout_s)

    def stop(self) -> None:
        """Cancel what is left and end the thread; the model is as it was before. Safe to call twice."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def stats(self) -> EngineStats:
        """Counters since the start, and what is the case now."""
        with self._wake:
            running, waiting = len(self._running), len(self._waiting)
        return self._measures.stats(running, waiting, self.kv_tokens - self._kv_free, self.kv_tokens)

    def _check(self, submission: Submission) -> None:
        tokens, sampling = len(submission.prompt_ids), submission.sampling
        if not tokens or submission.max_tokens < 1:
            raise UsageError(f"a request needs a prompt and room for an answer, not {tokens} and 0 tokens.")
        if (
            sampling.temperature < 0
            or not 0 < sampling.top_p <= 1
            or (sampling.top_k is not None and sampling.top_k < 1)
        ):
            raise UsageError("temperature is 0 or more, top_p above 0 and at most 1, and top_k at least 1.")
        vocabulary = int(self._model.config.get_text_config(decoder=True).vocab_size)
        if not 0 <= min(submission.prompt_ids) <= max(submission.prompt_ids) < vocabulary:
            raise UsageError(f"the prompt holds a token that is not among the model's {vocabulary}.")
        whole = tokens + submission.max_tokens
        if whole > self.max_context:
            raise TooLongError(
                f"the prompt has {tokens} tokens and the answer may have {submission.max_tokens}, which is more than "
                f"the {self.max_context} of the context. Shorten the prompt, or lower max_tokens."
            )
        if whole > self.kv_tokens:
            raise TooLongError(
                f"the prompt has {tokens} tokens and the answer may have {submission.max_tokens}, and KV memory holds "
                f"{self.kv_tokens} in all. Lower max_tokens, or give the engine more KV memory."
            )

    # -- the engine's thread --------------------------------------------------------------------------------

    def _run(self, batcher: Batcher, threads: int) -> None:
        torch.set_num_threads(threads)  # OpenMP's number is each thread's own
        if self._model.device.type == "cuda":
            torch.cuda.set_device(self._model.device)
        error: EmoeError | None = None
        try:
            while self._wait_for_work():
                self._turn(batcher)
        except Exception as found:  # not swallowed: it becomes `failure` and every request's error
            _LOG.exception("the engine has died")
            error = self.failure = as_emoe_error(found)
        finally:
            runtime = self._binding.runtime
            runtime.announce(None)
            runtime.observers.remove(self._measures.observe)
            self._alone = None
            for ticket in list(self._tickets.values()):
                self._end(ticket, "cancelled" if error is None else "error", error)
            batcher.close()
            with self._wake:
                self._wake.notify_all()

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not self._stopping and not self._tickets:
                self._wake.wait()
            return not self._stopping

    def _turn(self, batcher: Batcher) -> None:
        """Let go who is done for, admit, and run one step."""
        now = time.perf_counter()
        for ticket in list(self._tickets.values()):
            if ticket.cancelled:
                self._end(ticket, "cancelled")
            elif now > ticket.ends_s:
                self._end(ticket, "timeout")
        if not self._suspects:
            self._admit(batcher, now)
        if self._running:
            self._step(batcher)

    def _admit(self, batcher: Batcher, now: float) -> None:
        with self._wake:
            waiting = sorted(self._waiting, key=lambda each: not each.request.resumed)
        if not waiting or (self._alone is not None and self._alone in self._running and not self._alone.answer):
            return
        self._alone = None
        first = self._knowledge.reads_first_prompt_alone()
        if first and self._running:
            return
        self._knowledge.forget_residents()
        chosen = admit(
            self._scheduler,
            Situation(
                now_s=now,
                waiting=[ticket.request for ticket in waiting],
                running=[ticket.request for ticket in self._running],
                max_running=self.settings.max_running,
                max_input_tokens=self.settings.max_input_tokens or self.kv_tokens,
                free_kv_tokens=self._unpromised(batcher),
                costs=self.costs,
            ),
        )
        if first:
            chosen = chosen[:1]
            self._alone = self._tickets[chosen[0].id] if chosen else None
        ends = self._binding.runtime.end_tokens
        for request in chosen:
            ticket = self._tickets[request.id]
            request.resumed = False
            request.admitted_s = now if request.admitted_s is None else request.admitted_s
            with self._wake:
                self._waiting.remove(ticket)
                self._running.append(ticket)
            left = request.max_tokens - len(ticket.answer)
            stops = () if ticket.submission.sampling.ignore_end else ends
            ticket.cached = 0
            batcher.add(request.id, ticket.tokens, left, stops)

    def _unpromised(self, batcher: Batcher) -> int:
        """Free KV tokens, less what the running requests' prompts still need and a page for each to grow."""
        page = self.settings.page_tokens
        promised = 0
        for ticket in self._running:
            whole, there = ticket.request.input_tokens + len(ticket.answer), ticket.cached
            promised += (-(-whole // page) - -(-there // page) + 1) * page
        return max(0, batcher.free_tokens - promised)

    def _step(self, batcher: Batcher) -> None:
        """One forward pass over the running requests."""
        start = time.perf_counter()
        parts = batcher.prepare({self._suspects[0]} if self._suspects else None)
        self._take_back(batcher.take_preempted())
        self._kv_free = batcher.free_tokens
        if not parts:
            self._empty_turns += 1
            if self._suspects:
                self._suspects.popleft()
            if self._empty_turns > _EMPTY_TURNS:
                raise EmoeError(f"nothing can run although {len(self._running)} requests are there: a defect in emoe.")
            return
        self._empty_turns = 0
        tickets = [self._tickets[part.id] for part in parts]
        self._measures.begin_step(tickets, parts)
        self._binding.runtime.announce(self._pass_of(batcher, parts, tickets))
        for ticket in tickets:
            ticket.announced = True
        self._gone.clear()
        try:
            batcher.run()
            done = batcher.finish()
        except Exception as error:  # not swallowed: the request that causes it ends with it, see `_blame`
            self._blame(batcher, tickets, error)
            return
        self._faults = 0
        if self._suspects:
            self._suspects.popleft()
        now = time.perf_counter()
        step = Step(
            decode_tokens=sum(1 for ticket, part in zip(tickets, parts, strict=True) if _decodes(ticket, part)),
            prefill_tokens=sum(p.queries for t, p in zip(tickets, parts, strict=True) if not _decodes(t, p)),
            kv_tokens=sum(part.past + part.queries for part in parts),
            loads=self._measures.step_loads(),
            seconds=now - start,
            wait_s=self._measures.step_wait_s(),
        )
        self.costs.observe(step)
        self._measures.end_step(step)
        for ticket, part in zip(tickets, parts, strict=True):
            self._note(ticket, part, part.id in done, now)

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
            ended = choice.token in self._binding.runtime.end_tokens and not ticket.submission.sampling.ignore_end
            self._end(ticket, "stop" if ended else "length")

    def _pass_of(self, batcher: Batcher, parts: Sequence[Slice], tickets: Sequence[Ticket]) -> Pass:
        segments, start = [], 0
        for part, ticket in zip(parts, tickets, strict=True):
            segments.append(
                Segment(
                    sequence=ticket.number,
                    start=start,
                    stop=start + part.queries,
                    phase="decode" if _decodes(ticket, part) else "prefill",
                    new=not ticket.announced,
                    task=ticket.request.task,
                    position=part.past,
                )
            )
            start += part.queries
        return Pass(
            phase="decode" if all(segment.phase == "decode" for segment in segments) else "prefill",
            batch=1,
            tokens=start,
            new_prompt=any(segment.new for segment in segments),
            input_ids=batcher.input_ids(start),
            segments=tuple(segments),
            announced=True,
            ended=frozenset(self._gone),
        )

    def _choose(self, logits: torch.Tensor, requests: Sequence[str]) -> list[int]:
        tickets = [self._tickets[request] for request in requests]
        choices = choose(logits, [Draw(t.submission.sampling, t.seed, len(t.answer)) for t in tickets])
        self._choices = dict(zip(requests, choices, strict=True))
        return [choice.token for choice in choices]

    def _take_back(self, preempted: Sequence[str]) -> None:
        """Preempted requests wait again, before all others."""
        for request in preempted:
            ticket = self._tickets[request]
            ticket.preemptions += 1
            ticket.cached = 0
            ticket.request.resumed = True
            self._measures.preemptions += 1
            with self._wake:
                self._running.remove(ticket)
                self._waiting.insert(0, ticket)

    def _blame(self, batcher: Batcher, tickets: Sequence[Ticket], error: Exception) -> None:
        """A step failed. Alone, the request has caused it; together, each is tried alone in the steps to come.

        Raises:
            EmoeError: as many requests in a row as could run together have failed, and no step went well in between:
                it is not the requests.
        """
        _LOG.warning("a step of %d requests failed: %s", len(tickets), error)
        self._binding.runtime.announce(None)
        batcher.undo()
        self._take_back(batcher.take_preempted())
        if len(tickets) > 1:
            self._suspects = deque(ticket.id for ticket in tickets)
            return
        if self._suspects:
            self._suspects.popleft()
        self._end(tickets[0], "error", as_emoe_error(error))
        self._faults += 1
        if self._faults > 2 * self.settings.max_running:
            raise as_emoe_error(error) from error

    def _end(self, ticket: Ticket, reason: FinishReason, error: EmoeError | None = None) -> None:
        """The last of a request: slots and pages are free before anybody is told."""
        with self._wake:
            self._tickets.pop(ticket.id, None)
            if ticket in self._running:
                self._running.remove(ticket)
            if ticket in self._waiting:
                self._waiting.remove(ticket)
        if self._batcher is not None:
            self._batcher.remove(ticket.id)
            self._kv_free = self._batcher.free_tokens
        if ticket.id in self._suspects:
            self._suspects.remove(ticket.id)
        if ticket.announced:
            self._gone.add(ticket.number)
        now = time.perf_counter()
        self._measures.end_request(ticket, now)
        self._tell(ticket, FinishedEvent(reason, ticket.report(now, reason, self.mode, self.lossy), error))
        with self._wake:
            self._wake.notify_all()

    def _tell(self, ticket: Ticket, event: TokenEvent | FinishedEvent) -> None:
        try:
            ticket.on_event(event)
        except Exception:  # a client's defect must not end the other requests
            _LOG.exception("on_event of request %s raised: the request is cancelled", ticket.id)
            ticket.cancelled = True


def _decodes(ticket: Ticket, part: Slice) -> bool:
    """Whether it answers: one token, and all before it have been read."""
    return bool(part.queries == 1 and part.past >= ticket.request.input_tokens)


def _check(settings: EngineSettings) -> None:
    if settings.max_running < 1 or settings.max_waiting < 0 or settings.kv_tokens < 1:
        raise UsageError("max_running and kv_tokens are at least 1, and max_waiting at least 0.")
    if settings.max_batch_tokens < settings.max_running:
        raise UsageError(
            f"a step of {settings.max_batch_tokens} tokens cannot hold {settings.max_running} requests: raise "
            "max_batch_tokens or lower max_running."
        )
    if settings.page_tokens < 4:  # transformers' least
        raise UsageError(f"a page of {settings.page_tokens} tokens is too small: give at least 4.")
