"""The engine: takes requests from any thread, runs them together in a thread of its own, and says what comes out."""

from __future__ import annotations

import threading
import time
import uuid
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emoe import nano
from emoe.config import Mode
from emoe.engine.batching import Batcher
from emoe.engine.desk import Desk
from emoe.engine.interface import (
    EngineSettings,
    EngineStats,
    EngineStoppedError,
    OnEvent,
    Submission,
    TaskSource,
    TooLongError,
)
from emoe.engine.knowledge import Knowledge
from emoe.engine.loop import Loop
from emoe.engine.measuring import Measures
from emoe.engine.rules import Rules
from emoe.engine.tickets import Ticket, new_seed
from emoe.errors import EmoeError, UsageError
from emoe.model.bind import binding_of
from emoe.scheduling.costs import CostModel
from emoe.scheduling.protocol import Request
from emoe.scheduling.registry import make_scheduler
from emoe.tasks.labels import TaskLabels
from emoe.tasks.profile import Profile


class Engine:
    """Continuous batching over a model made by `emoe.load`. Use it from any thread; events come from its own.

    Between `start` and `stop` nothing else may run the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        settings: EngineSettings,
        *,
        profile: Profile | None = None,
    ) -> None:
        """Check everything; nothing runs before `start`.

        Without `profile` the one that the model was loaded with is used; emoe-nano has its own.

        Raises:
            UsageError: the model was not made by `emoe.load`, a setting cannot be meant, or the model's generation
                configuration asks for what the engine does not do.
        """
        self._binding = binding_of(model)
        self._model = model
        self._rules = Rules(model.generation_config, model.device)
        self.settings = settings
        self._scheduler = make_scheduler(settings.scheduler)
        self.scheduler_name = self._scheduler.name
        self.mode: Mode = self._binding.runtime.mode
        self.lossy: bool = self._binding.lossy
        self.expert_dtype: str = self._binding.index.expert_dtype
        self.layers = len(self._binding.runtime.layers)
        text = model.config.get_text_config(decoder=True)
        limits = [each for each in (getattr(text, "max_position_embeddings", None), settings.context) if each]
        self.max_context: int = min(limits) if limits else settings.kv_tokens
        self._vocabulary = int(text.vocab_size)
        if profile is None:
            profile = self._binding.ahead.profile or _shipped_profile(self._binding.index.path)
        self._knowledge = Knowledge(self._binding, tokenizer, profile)
        known = () if profile is None else profile.tasks
        self.labels = TaskLabels([*known, *(task for task in settings.targets if task)])
        """What requests' labels become: what is kept by task stays bounded, however many labels there are."""
        self.costs: CostModel = self._knowledge.costs
        self._measures = Measures(self._binding)
        self._desk = Desk(settings.max_waiting)
        self._loop: Loop | None = None
        self._thread: threading.Thread | None = None
        self._numbers = iter(range(1, 1 << 62))

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive() and self.failure is None

    @property
    def failure(self) -> EmoeError | None:
        """What it has died of; None while it has not."""
        return self._desk.failure

    @property
    def kv_tokens(self) -> int:
        """Tokens that KV memory holds: the longest request that can ever run."""
        return self.settings.kv_tokens if self._loop is None else self._loop.kv_tokens

    def start(self) -> None:
        """Take KV memory, set the model's attention and start the thread.

        Raises:
            UnsupportedModelError: this model, or this transformers, cannot batch continuously.
            EngineStoppedError: it was started before.
        """
        if self._thread is not None:
            raise EngineStoppedError("an engine runs once: make another one with the same model.")
        settings = self.settings
        self._loop = loop = Loop(
            settings, self._binding, self._desk, self._scheduler, self._knowledge, self._measures, self._rules
        )
        self._binding.runtime.dense_only = True
        try:
            loop.batcher = Batcher(
                self._model,
                loop.choose,
                page_tokens=settings.page_tokens,
                kv_tokens=settings.kv_tokens,
                max_batch_tokens=settings.max_batch_tokens,
                max_running=settings.max_running,
            )
        finally:
            self._binding.runtime.dense_only = False
        loop.kv_tokens = loop.kv_free = loop.batcher.kv_tokens
        threads, device = torch.get_num_threads(), self._model.device

        def run() -> None:
            torch.set_num_threads(threads)  # OpenMP's number is each thread's own
            if device.type == "cuda":
                torch.cuda.set_device(device)
            loop.run()

        self._thread = threading.Thread(target=run, name="emoe-engine", daemon=True)
        self._thread.start()

    def submit(self, submission: Submission, on_event: OnEvent) -> str:
        """Queue a request and return its id. `on_event` gets its tokens and, last of all, one `FinishedEvent`.

        The last token of an answer that ends with reason "stop" is the model's end token.

        Raises:
            EngineStoppedError: the engine has not started, is stopping, has stopped or has died.
            QueueFullError: too many requests wait.
            TooLongError: the request can never fit.
            UsageError: an empty prompt, or settings that cannot be meant.
        """
        self._check(submission)
        if self._thread is None:
            raise EngineStoppedError("the engine has not been started.")
        arrived_s = time.perf_counter()
        task, source = self._knowledge.task_of(submission)
        ticket = self._desk.put(
            lambda: self._ticket(submission, on_event, arrived_s, task, source),
            self._measures.seconds_per_departure(),
        )
        return ticket.id

    def cancel(self, request: str) -> None:
        """End a request; it ends with reason "cancelled". Does nothing for one that has ended or never was."""
        self._desk.cancel(request)

    def drain(self, timeout_s: float) -> bool:
        """Take no new requests and wait for those that are there; whether all have ended."""
        return self._desk.drain(timeout_s)

    def stop(self) -> None:
        """Cancel what is left and end the thread; the model is as it was before. Safe to call twice."""
        self._desk.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def stats(self) -> EngineStats:
        """Counters since the start, and what is the case now. Waits for nothing."""
        free = self.kv_tokens if self._loop is None else self._loop.kv_free
        return self._measures.stats(*self._desk.counts(), self.kv_tokens - free, self.kv_tokens)

    def _ticket(
        self, submission: Submission, on_event: OnEvent, arrived_s: float, task: str | None, source: TaskSource
    ) -> Ticket:
        """Of a request that is taken: only now its label counts among those that are told apart."""
        task = None if task is None else self.labels(task)
        request = Request(
            id=uuid.uuid4().hex,
            arrived_s=arrived_s,
            input_tokens=len(submission.prompt_ids),
            max_tokens=submission.max_tokens,
            expected_tokens=self._knowledge.expected_tokens(submission, task),
            task=task,
            priority=submission.priority,
            ttft_slo_s=submission.ttft_slo_s,
            tpot_slo_s=submission.tpot_slo_s,
        )
        targets = self.settings.targets.get(task) or self.settings.targets.get(None)
        if targets is not None:
            request.ttft_slo_s = targets.ttft_slo_s if request.ttft_slo_s is None else request.ttft_slo_s
            request.tpot_slo_s = targets.tpot_slo_s if request.tpot_slo_s is None else request.tpot_slo_s
        seed = new_seed() if submission.sampling.seed is None else submission.sampling.seed
        return Ticket(next(self._numbers), submission, request, on_event, source, seed)

    def _check(self, submission: Submission) -> None:
        tokens, sampling = len(submission.prompt_ids), submission.sampling
        if not tokens or submission.max_tokens < 1:
            raise UsageError(
                f"a request needs a prompt and room for an answer, not {tokens} and {submission.max_tokens} tokens."
            )
        if (
            sampling.temperature < 0
            or not 0 < sampling.top_p <= 1
            or (sampling.top_k is not None and sampling.top_k < 1)
        ):
            raise UsageError("temperature is 0 or more, top_p above 0 and at most 1, and top_k at least 1.")
        if not 0 <= min(submission.prompt_ids) <= max(submission.prompt_ids) < self._vocabulary:
            raise UsageError(f"the prompt holds a token that is not among the model's {self._vocabulary}.")
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


def _shipped_profile(path: Path) -> Profile | None:
    """The embedded model's."""
    return Profile.read(nano.profile_path()) if path == nano.path() and nano.profile_path().is_dir() else None
