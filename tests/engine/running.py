"""Running requests through an engine and collecting what came out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from emoe.engine.engine import Engine
from emoe.engine.interface import EngineSettings, Event, FinishedEvent, Sampling, Submission, TokenEvent

GREEDY = Sampling(temperature=0)
ENDLESS = Sampling(temperature=0, ignore_end=True)
PATIENCE_S = 60.0
SMALL = EngineSettings(scheduler="fifo", max_running=8, max_batch_tokens=32, kv_tokens=512, page_tokens=8)


@dataclass
class Answer:
    """What one request got."""

    events: list[Event] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    after: Callable[[Event], None] | None = None

    def __call__(self, event: Event) -> None:
        """Take an event."""
        self.events.append(event)
        if isinstance(event, FinishedEvent):
            self.ended.set()
        if self.after is not None:
            self.after(event)

    @property
    def tokens(self) -> list[int]:
        """Its tokens."""
        return [event.token for event in self.events if isinstance(event, TokenEvent)]

    @property
    def given(self) -> list[TokenEvent]:
        """Its token events."""
        return [event for event in self.events if isinstance(event, TokenEvent)]

    @property
    def end(self) -> FinishedEvent:
        """Its end, waited for."""
        assert self.ended.wait(PATIENCE_S), f"no end after {len(self.events)} events"
        last = self.events[-1]
        assert isinstance(last, FinishedEvent)
        assert sum(isinstance(event, FinishedEvent) for event in self.events) == 1
        return last


@contextmanager
def engine_of(model: PreTrainedModel, settings: EngineSettings = SMALL, tokenizer: Any = None) -> Iterator[Engine]:
    """A running engine; afterwards nothing of it is left."""
    threads = threading.active_count()
    engine = Engine(model, tokenizer, settings)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()
    assert not engine.alive
    assert threading.active_count() <= threads
    nothing_left(engine)


def nothing_left(engine: Engine) -> None:
    """No request, no page of KV memory, no pinned slot; what a plan still loads arrives."""
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_tokens_used) == (0, 0, 0)
    patience = time.monotonic() + 10
    for pool in engine._binding.pools:
        while pool.prefetches.flying and time.monotonic() < patience:
            pool.prefetches.poll()
            time.sleep(0.001)
        assert all(slot.state.value in ("empty", "ready") for slot in pool.table.slots)


def send(engine: Engine, prompt: Sequence[int], max_tokens: int = 12, **about: Any) -> tuple[str, Answer]:
    """Submit a prompt, greedily unless `sampling` says otherwise."""
    answer = Answer()
    about.setdefault("sampling", GREEDY)
    return engine.submit(Submission(prompt_ids=list(prompt), max_tokens=max_tokens, **about), answer), answer


def alone(model: PreTrainedModel, prompt: Sequence[int], max_tokens: int = 12, ends: bool = True) -> list[int]:
    """What generate() answers; not `ends`: it goes on after the end token."""
    never = {} if ends else {"eos_token_id": 1 << 30}
    whole = model.generate(torch.tensor([list(prompt)]), max_new_tokens=max_tokens, do_sample=False, **never)
    tokens: list[int] = whole[0, len(prompt) :].tolist()
    return tokens


def wait_until(true: Callable[[], bool]) -> None:
    """Until it is."""
    deadline = time.perf_counter() + PATIENCE_S
    while not true():
        assert time.perf_counter() < deadline
        time.sleep(0.002)


def prompt(seed: int, length: int, vocabulary: int = 128) -> list[int]:
    """A random prompt without special tokens."""
    tokens: list[int] = torch.randint(3, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokens
