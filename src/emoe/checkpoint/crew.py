"""Several reads under way at once: a few threads that share out the chunks of whoever reads."""

from __future__ import annotations

import heapq
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

Task = Callable[[], object]


@dataclass(slots=True, eq=False)
class _Call:
    """One caller's numbered tasks: those nobody has started, how many are being run, the first that failed."""

    waiting: deque[tuple[int, Task]]
    running: int = 0
    failed: int = -1
    error: BaseException | None = None
    ended: threading.Event = field(default_factory=threading.Event)


class Crew:
    """Threads that help callers with their tasks; they start when they are first needed.

    Tasks are taken in the order of their calls, by whoever is free, so that the first of several calls ends first. The
    caller works too, until its own tasks have all been taken, so a call with one task costs no hand-off. Helpers take
    no more while they and the callers together run `depth` tasks.
    """

    def __init__(self, depth: int, name: str) -> None:
        """One caller alone gets `depth` tasks run at once: `depth - 1` threads help it. `name` is the threads'."""
        self._depth = depth
        self._name = name
        self._calls: list[tuple[int, int, _Call]] = []
        self._order = count()
        self._wake = threading.Condition()
        self._under_way = 0
        self._closed = False
        self._threads: list[threading.Thread] = []

    def run(self, tasks: Sequence[Task], priority: int = 0) -> None:
        """Run all tasks, the calls of a lower `priority` first; return when none of them runs any more.

        Raises:
            what the first of the failing tasks raised; those not started by then are left out.
        """
        if len(tasks) <= 1:
            for task in tasks:
                task()
            return
        call = _Call(deque(enumerate(tasks)))
        with self._wake:
            self._start()
            heapq.heappush(self._calls, (priority, next(self._order), call))
            self._wake.notify(len(tasks) - 1)
        try:
            while True:
                with self._wake:
                    taken = self._take() if call.waiting else None
                if taken is None:
                    break
                self._do(*taken)
                del taken  # who waits for the rest keeps nobody's memory alive
        except BaseException:  # an interrupt between two tasks
            with self._wake:
                call.waiting.clear()
                if not call.running:
                    call.ended.set()
            raise
        finally:
            call.ended.wait()  # tasks write to the caller's memory: none may outlive the call
        if call.error is not None:
            raise call.error

    def close(self) -> None:
        """Stop the threads, once no call is under way. Safe to call twice."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def _start(self) -> None:
        if self._threads or self._closed:
            return
        self._threads = [
            threading.Thread(target=self._help, name=f"{self._name}-{i}", daemon=True) for i in range(self._depth - 1)
        ]
        for thread in self._threads:
            thread.start()

    def _take(self) -> tuple[_Call, int, Task] | None:
        """The next task, its number and its call, now running; the lock is held."""
        while self._calls and not self._calls[0][2].waiting:
            heapq.heappop(self._calls)
        if not self._calls:
            return None
        call = self._calls[0][2]
        call.running += 1
        self._under_way += 1
        return call, *call.waiting.popleft()

    def _do(self, call: _Call, number: int, task: Task) -> None:
        error: BaseException | None = None
        try:
            task()
        except BaseException as caught:  # the caller raises it
            error = caught
        with self._wake:
            call.running -= 1
            self._under_way -= 1
            if error is not None:
                if call.error is None or number < call.failed:
                    call.error, call.failed = error, number
                call.waiting.clear()
            if not call.waiting and not call.running:
                call.ended.set()
            if self._calls and self._under_way == self._depth - 1:
                self._wake.notify()  # a helper may have waited for room

    def _help(self) -> None:
        while True:
            with self._wake:
                while True:
                    taken = self._take() if self._under_way < self._depth else None
                    if taken is not None:
                        break
                    if self._closed:
                        return
                    self._wake.wait()
            self._do(*taken)
            del taken  # an idle thread keeps nobody's memory alive


def counted(tasks: Sequence[Task], ended: Callable[[], None]) -> Iterator[Task]:
    """The tasks, the last of which to end calls `ended`, on whatever thread it runs; at once where there are none."""
    lock = threading.Lock()
    left = len(tasks)
    if not tasks:
        ended()

    def run(task: Task) -> None:
        nonlocal left
        task()
        with lock:
            left -= 1
            last = not left
        if last:
            ended()

    for task in tasks:
        yield partial(run, task)
