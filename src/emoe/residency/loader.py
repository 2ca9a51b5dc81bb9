"""Loader threads: they move experts from the store into slots, demand loads before anything else.

The thread that waits for a load does not idle: a job nobody has started yet it runs itself. On two cores a hand-off
costs about as much as reading a small expert from the page cache, so a single miss never pays for one.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from emoe.errors import ReadError

DEMAND = 0
"""Priority of a load something waits for; larger numbers come later."""

_LIVENESS_S = 0.5


@dataclass(slots=True, eq=False)
class Load:
    """One expert on its way into a slot."""

    run: Callable[[], int]
    what: str
    claimed: bool = False
    runner: int = 0
    """The thread that claimed it."""
    owner: object = None
    """Whose slots it fills (`Loader.abandon`)."""
    done: threading.Event = field(default_factory=threading.Event)
    nbytes: int = 0
    error: Exception | None = None
    seconds: float = 0.0
    first: threading.Event | None = None
    """Set when the parts that are used first are there, or its run has ended; None: nothing tells."""

    @classmethod
    def ended(cls, what: str, seconds: float) -> Load:
        """One that needed no reading; `seconds` is what it takes beside."""
        load = cls(lambda: 0, what, claimed=True, seconds=seconds)
        load.done.set()
        return load


class Loader:
    """A small pool of threads over one queue of loads."""

    def __init__(self, threads: int = 2) -> None:
        """Start the threads (0: every load is run by whoever waits for it)."""
        self._queue: list[tuple[int, int, Load]] = []
        self._order = count()
        # Taken by itself, not by way of the condition: an interrupt as that returns would leave it locked for good.
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._closed = False
        self._under_way: set[Load] = set()
        self._threads: list[threading.Thread] = []
        try:
            for i in range(threads):
                thread = threading.Thread(target=self._work, name=f"emoe-loader-{i}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError as error:
            self.close()
            raise ReadError(
                f"{threads} loader threads are needed and only {len(self._threads)} could be started: {error}. Raise "
                "the limit of processes (`ulimit -u`, or the cgroup's pids.max), or end others."
            ) from error

    def submit(
        self,
        run: Callable[[], int],
        what: str,
        priority: int = DEMAND,
        first: threading.Event | None = None,
        owner: object = None,
    ) -> Load:
        """Queue a load.

        Args:
            run: reads the expert into its slot and returns the bytes read.
            what: names the expert, for errors.
            priority: lower goes first; equal priorities in the order of submission.
            first: what `run` sets when the parts that are used first are there.
            owner: whose loads `abandon` ends together.

        Raises:
            ReadError: the loader is closed.
        """
        load = Load(run, what, first=first, owner=owner)
        with self._lock:
            if self._closed:
                raise ReadError(f"{what} cannot be loaded: the model was closed. Load it again with emoe.load.")
            self._under_way.add(load)
            heapq.heappush(self._queue, (priority, next(self._order), load))
            self._wake.notify()
        return load

    def wait(self, load: Load) -> int:
        """Return the bytes read once `load` has ended; run it here if no thread has started it.

        Raises:
            ReadError: the read failed (the reader's own error), or the thread that ran it died.
        """
        if self._claim(load):
            self._run(load)
        while not load.done.wait(_LIVENESS_S):
            if not any(thread.is_alive() for thread in self._threads):
                load.error = ReadError(
                    f"{load.what} was not loaded: every loader thread has died. Load the model again; if it repeats, "
                    "report the messages above."
                )
                self._end(load)
        if load.error is not None:
            raise load.error
        return load.nbytes

    def wait_first(self, load: Load) -> bool:
        """Wait until the parts that are used first are there; whether they were there before the rest.

        False at once where nobody has started the load: who waits for it runs it.
        """
        if load.first is None or not load.claimed:
            return False
        while not load.first.wait(_LIVENESS_S):
            if load.done.is_set() or not any(thread.is_alive() for thread in self._threads):
                return False
        return not load.done.is_set()

    def drop(self, load: Load) -> bool:
        """Cancel `load` if nobody has started it; return whether that was so."""
        if not self._claim(load):
            return False
        load.error = ReadError(f"{load.what} was not loaded: the load was cancelled.")
        self._end(load)
        return True

    def cancel(self, load: Load) -> None:
        """Return once `load` no longer runs: dropped if no thread had started it, else waited for."""
        if not self.drop(load) and load.runner == threading.get_ident() and not load.done.is_set():
            # This thread began to run it and was interrupted: nobody else will ever end it.
            self._interrupted(load)
        while not load.done.wait(_LIVENESS_S) and any(thread.is_alive() for thread in self._threads):
            pass

    def abandon(self, owner: object) -> None:
        """Return once no load of `owner` runs or will run, those that nobody knows of after an interrupt among them.

        Only while nobody waits for one: what no thread of the loader runs was then begun by a thread that was
        interrupted, whichever it was, and ends here.
        """
        loads = [load for load in list(self._under_way) if load.owner is owner]
        for load in loads:  # what is queued first: no thread takes it up meanwhile
            self.drop(load)
        ours = {thread.ident for thread in self._threads}
        for load in loads:
            if load.runner not in ours and not load.done.is_set():
                self._interrupted(load)
            self.cancel(load)

    def close(self) -> None:
        """Stop the threads after the loads they are in. Queued loads fail with ReadError. Safe to call twice."""
        with self._lock:
            self._closed = True
            dropped = [load for _, _, load in self._queue if not load.claimed]
            self._queue.clear()
            self._wake.notify_all()
        for load in dropped:
            load.error = ReadError(f"{load.what} was not loaded: the model was closed.")
            self._end(load)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=10)

    def _claim(self, load: Load) -> bool:
        with self._lock:
            if load.claimed:
                return False
            load.runner = threading.get_ident()
            load.claimed = True
            return True

    def _interrupted(self, load: Load) -> None:
        load.error = load.error or ReadError(f"{load.what} was not loaded: it was interrupted.")
        self._end(load)

    def _end(self, load: Load) -> None:
        load.done.set()
        if load.first is not None:
            load.first.set()
        self._under_way.discard(load)

    def _run(self, load: Load) -> None:
        start = time.perf_counter()
        try:
            load.nbytes = load.run()
        except MemoryError as error:
            load.error = ReadError(
                f"{load.what} was not loaded: the machine has no memory left for it ({error or 'MemoryError'}). End "
                "other processes, or load the model again with a smaller budget (expert_memory)."
            )
            load.error.__cause__ = error
        except Exception as error:  # handed to the waiting thread, which raises it
            load.error = error
        finally:
            load.seconds = time.perf_counter() - start
            if load.error is None and load.nbytes == 0 and not load.done.is_set():
                load.error = ReadError(f"{load.what} was not loaded: the load was abandoned.")
            self._end(load)

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._closed:
                    self._wake.wait()
                if self._closed:
                    return
                _, _, load = heapq.heappop(self._queue)
                if load.claimed:
                    continue
                load.runner = threading.get_ident()
                load.claimed = True
            self._run(load)
