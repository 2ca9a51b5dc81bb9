"""Between the engine's thread and the event loop: the requests of one HTTP request, and their events."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from starlette.types import Receive

from emoe.engine.interface import EngineSettings, Event, FinishedEvent, OnEvent, Submission
from emoe.errors import EmoeError
from emoe.server.metrics import Watched
from emoe.tasks.labels import TaskLabels


class EngineLike(Watched, Protocol):
    """What the server asks of an engine (`emoe.engine.engine.Engine`)."""

    settings: EngineSettings
    labels: TaskLabels

    @property
    def alive(self) -> bool: ...
    @property
    def failure(self) -> EmoeError | None: ...
    @property
    def max_context(self) -> int: ...
    @property
    def kv_tokens(self) -> int: ...
    def submit(self, submission: Submission, on_event: OnEvent) -> str: ...
    def cancel(self, request: str) -> None: ...
    def drain(self, timeout_s: float) -> bool: ...
    def stop(self) -> None: ...


class ClientGoneError(Exception):
    """The client hung up: there is nobody to answer."""


Observe = Callable[[int, Event], None]


class Requests:
    """Submitted together, read together, and cancelled together when the HTTP request ends early.

    `observe(index, event)` is called on the event loop for every event, also after the client has gone.
    """

    def __init__(self, engine: EngineLike, observe: Observe) -> None:
        self._engine = engine
        self._observe = observe
        self._loop = asyncio.get_running_loop()
        self._ids: list[str] = []
        self._ended: set[int] = set()
        self._events: deque[tuple[int, Event]] = deque()
        self._wake = asyncio.Event()
        self._gone = False
        self._watcher: asyncio.Task[None] | None = None

    def submit(self, submissions: Sequence[Submission]) -> None:
        """Submit all of them. If one is refused, the others are cancelled and the refusal is raised."""
        try:
            for index, submission in enumerate(submissions):
                self._ids.append(self._engine.submit(submission, partial(self._from_engine, index)))
        except BaseException:
            self.close()
            raise

    def watch(self, receive: Receive) -> None:
        """From now on `next` raises ClientGoneError once the client has hung up."""
        self._watcher = asyncio.create_task(self._until_gone(receive))

    async def _until_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._wake.set()

    def _from_engine(self, index: int, event: Event) -> None:
        """On the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._arrive, index, event)
        except RuntimeError:
            # The loop is closed: the server has ended, and with it everybody who could read this.
            return

    def _arrive(self, index: int, event: Event) -> None:
        if isinstance(event, FinishedEvent):
            self._ended.add(index)
        self._observe(index, event)
        self._events.append((index, event))
        self._wake.set()

    async def next(self, timeout_s: float | None = None) -> tuple[int, Event] | None:
        """The next event and whose it is; None if nothing came for so long.

        Raises:
            ClientGoneError: nobody waits for it any more.
        """
        while True:
            if self._gone:
                raise ClientGoneError
            if self._events:
                return self._events.popleft()
            self._wake.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._wake.wait()
            except TimeoutError:
                return None

    def cancel(self, index: int) -> None:
        """End one of them; its last event still comes."""
        if index not in self._ended:
            self._engine.cancel(self._ids[index])

    def close(self) -> None:
        """Cancel what has not ended. Safe to call twice."""
        for index in range(len(self._ids)):
            self.cancel(index)
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None

    def __enter__(self) -> Requests:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
