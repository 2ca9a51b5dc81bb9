"""Several reads under way at once: a few threads that share out the chunks of whoever reads."""

from __future__ import annotations

import heapq
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from emoe.errors import ReadError

_log = logging.getLogger(__name__)

Task = Callable[[], object]


@dataclass(slots=True, eq=False)
class _Call:
    """One caller's numbered tasks: those nobody has started, the threads that run some, the first that failed."""

    waiting: deque[tuple[int, Task]]
    running: set[int] = field(default_factory=set)
    failed: int = -1
    error: BaseException | None = None
    under_way: threading.Lock = field(default_factory=threading.Lock)
    """Taken until no task runs or will run. No Event: interrupted, its wait can leave the lock within it taken."""

    def __post_init__(self) -> None:
        self.under_way.acquire()

    def end(self) -> None:
        """Wake who waits for the end; the crew's lock is held. Safe to call again."""
        if self.under_way.locked():
            self.under_way.release()


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
        # Taken by itself, not by way of the condition: an interrupt as that returns would leave it locked for good.
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._under_way: dict[int, _Call] = {}  # by the thread that runs a task of it
        self._closed = False
        self._started = False
        self._threads: list[threading.Thread] = []

    def run(self, tasks: Sequence[Task], priority: int = 0) -> None:
        """Run all tasks, the calls of a lower `priority` first; return when none of them runs any more.

        Raises:
            what the first of the failing tasks raised; those not started by then are left out.
            ReadError: the caller of another call was interrupted while it ran a task of this one.
        """
        if len(tasks) <= 1:
            for task in tasks:
                task()
            return
        call = _Call(deque(enumerate(tasks)))
        try:
            with self._lock:
                self._start()
                heapq.heappush(self._calls, (priority, next(self._order), call))
                self._wake.notify(len(tasks) - 1)
            while True:
                with self._lock:
                    taken = self._take() if call.waiting else None
                if taken is None:
                    break
                self._do(*taken, own=call)
                del taken  # who waits for the rest keeps nobody's memory alive
        finally:
            self._leave(call)
        if call.error is not None:
            raise call.error

    def _leave(self, call: _Call) -> None:
        """Return when no task of `call` runs or will run, however often that is interrupted; the last interrupt then.

        Tasks write to the caller's memory: none may outlive the call.
        """
        interrupt: BaseException | None = None
        quiet = False
        while not quiet:
            try:
                with self._lock:
                    call.waiting.clear()
                    if threading.get_ident() in self._under_way:
                        self._let_go(ReadError("a read was given up: the thread that helped with it was interrupted."))
                    if not call.running:
                        call.end()
                quiet = call.under_way.acquire()
            except BaseException as another:  # raised below
                interrupt = another
        if interrupt is not None:
            raise interrupt

    def _let_go(self, error: BaseException | None, number: int = -1) -> None:
        """Note that this thread runs no task any more; `error` is what the one that it ran failed with.

        The lock is held.
        """
        me = threading.get_ident()
        call = self._under_way[me]
        if error is not None:
            if call.error is None or number < call.failed:
                call.error, call.failed = error, number
            call.waiting.clear()
        call.running.discard(me)
        if not call.waiting and not call.running:
            call.end()
        del self._under_way[me]  # last: interrupted before, this is done again

    def close(self) -> None:
        """Stop the threads, once no call is under way. Safe to call twice."""
        with self._lock:
            self._closed = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def _start(self) -> None:
        """Start the helpers that are missing; those that the system refuses are asked for once, and that is said."""
        if self._started or self._closed:
            return
        wanted = self._depth - 1
        for i in range(len(self._threads), wanted):
            thread = threading.Thread(target=self._help, name=f"{self._name}-{i}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                _log.warning(
                    "%d of %d threads that read beside others could not be started (%s): experts come slower. Raise "
                    "the limit of processes (`ulimit -u`, or the cgroup's pids.max) and load the model again.",
                    wanted - i,
                    wanted,
                    error,
                )
                break
            self._threads.append(thread)
        self._started = True

    def _take(self) -> tuple[_Call, int, Task] | None:
        """The next task, its number and its call, now running; the lock is held."""
        while self._calls and not self._calls[0][2].waiting:
            heapq.heappop(self._calls)
        if not self._calls:
            return None
        call = self._calls[0][2]
        # Before it is taken: interrupted behind that, this thread still knows whose task is lost (`_let_go`).
        self._under_way[threading.get_ident()] = call
        call.running.add(threading.get_ident())
        return call, *call.waiting.popleft()

    def _do(self, call: _Call, number: int, task: Task, own: _Call | None = None) -> None:
        """Run a task; who calls for `own` is interrupted by what interrupts it, whosever task it is."""
        error: BaseException | None = None
        try:
            task()
        except BaseException as caught:  # the caller raises it
            if own is not None and own is not call and not isinstance(caught, Exception):
                raise  # it was this thread that was interrupted, not the other call's caller
            error = caught
        with self._lock:
            self._let_go(error, number)
            if self._calls and len(self._under_way) == self._depth - 1:
                self._wake.notify()  # a helper may have waited for room

    def _help(self) -> None:
        while True:
            with self._wake:
                while True:
                    taken = self._take() if len(self._under_way) < self._depth else None
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
