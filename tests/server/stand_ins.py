"""An engine that says what it is told to, for what a real one does too seldom: dying, stalling, overflowing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from emoe.config import Mode
from emoe.engine.interface import (
    EngineSettings,
    EngineStats,
    EngineStoppedError,
    Event,
    FinishedEvent,
    FinishReason,
    OnEvent,
    QueueFullError,
    Report,
    Submission,
    TokenEvent,
)
from emoe.errors import EmoeError
from emoe.tasks.labels import TaskLabels

REPORT = Report(
    id="r",
    task="qa",
    task_source="keywords",
    input_tokens=3,
    output_tokens=2,
    arrived_s=0.0,
    queue_s=0.01,
    ttft_s=0.05,
    tpot_s=0.01,
    e2e_s=0.07,
    preemptions=0,
    hits=10,
    misses=2,
    experts_loaded=2,
    bytes_loaded=4096,
    rerouted_tokens=0,
    ttft_slo_s=0.1,
    tpot_slo_s=None,
    ttft_met=True,
    tpot_met=None,
    slo_met=True,
    mode="exact",
    lossy=False,
)

STATS = EngineStats(
    running=1,
    waiting=2,
    kv_tokens_used=64,
    kv_tokens=256,
    steps=7,
    busy_s=1.5,
    prompt_tokens=30,
    generation_tokens=20,
    preemptions=1,
    hits={("qa", 0): 5, ("qa", 1): 3, ("code", 5): 2},
    misses={("qa", 0): 1, ("code", 5): 4},
    rerouted_tokens={"qa": 2},
    routed_tokens={"qa": 8},
    loads=5,
    bytes_loaded=2 << 20,
    load_wait_s=0.25,
    prefetches_unused=1,
    prefetch_bytes_unused=512,
    resident_bytes=1000,
    budget_bytes=2000,
    predictor_calls=3,
    predictor_s=0.125,
    predictor_hit_rate=0.75,
    plans=2,
)

Script = Iterable[Event | float]
"""Events, and seconds to wait between them."""


def tokens(*ids: int) -> list[TokenEvent]:
    """Events of these tokens."""
    return [TokenEvent(token, time.perf_counter()) for token in ids]


def finished(reason: FinishReason = "stop", error: EmoeError | None = None) -> FinishedEvent:
    """The end."""
    return FinishedEvent(reason, REPORT, error)


class ScriptedEngine:
    """Plays `script` for every submission, in a thread each; `submitted` and `cancelled` are what it was told."""

    def __init__(self, script: Script | Callable[[Submission], Script] = ()) -> None:
        self.settings = EngineSettings()
        self.labels = TaskLabels()
        self.alive = True
        self.failure: EmoeError | None = None
        self.mode: Mode = "exact"
        self.lossy = False
        self.expert_dtype = "native"
        self.scheduler_name = "fifo"
        self.layers = 6
        self.max_context = 1024
        self.kv_tokens = 16384
        self.submitted: list[Submission] = []
        self.cancelled: list[str] = []
        self.room = 1 << 30
        self._script = script
        self._cancel: dict[str, threading.Event] = {}
        self.threads: list[threading.Thread] = []

    def submit(self, submission: Submission, on_event: OnEvent) -> str:
        if not self.alive:
            raise EngineStoppedError("the engine has stopped")
        if len(self.submitted) >= self.room:
            raise QueueFullError("256 requests wait already", 2.5)
        self.submitted.append(submission)
        name = f"request-{len(self.submitted)}"
        self._cancel[name] = threading.Event()
        script = self._script(submission) if callable(self._script) else self._script
        thread = threading.Thread(target=self._play, args=(name, script, on_event), daemon=True)
        self.threads.append(thread)
        thread.start()
        return name

    def _play(self, name: str, script: Script, on_event: OnEvent) -> None:
        cancelled = self._cancel[name]
        for entry in script:
            if isinstance(entry, float):
                cancelled.wait(entry)
            if cancelled.is_set():
                on_event(FinishedEvent("cancelled", REPORT))
                return
            if not isinstance(entry, float):
                on_event(entry)
                if isinstance(entry, FinishedEvent):
                    return
        cancelled.wait()
        on_event(FinishedEvent("cancelled", REPORT))

    def cancel(self, request: str) -> None:
        self.cancelled.append(request)
        self._cancel[request].set()

    def stats(self) -> EngineStats:
        return replace(STATS, running=sum(thread.is_alive() for thread in self.threads))

    def drain(self, timeout_s: float) -> bool:
        end = time.monotonic() + timeout_s
        for thread in self.threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in self.threads)

    def stop(self) -> None:
        for event in self._cancel.values():
            event.set()
        self.alive = False
