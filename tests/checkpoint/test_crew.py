"""A crew runs everybody's tasks, some at a time, and lets none outlive its call."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from emoe.checkpoint.crew import Crew
from emoe.errors import ReadError


@pytest.fixture
def crew() -> Iterator[Crew]:
    made = Crew(4, "test-crew")
    yield made
    made.close()


def test_every_task_runs_once_and_some_at_a_time(crew: Crew) -> None:
    lock = threading.Lock()
    done: list[int] = []
    under_way = most = 0

    def task(number: int) -> None:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.001)
        with lock:
            under_way -= 1
            done.append(number)

    def call(start: int) -> None:
        crew.run([lambda n=n: task(n) for n in range(start, start + 20)])  # type: ignore[misc]

    callers = [threading.Thread(target=call, args=(20 * i,)) for i in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert sorted(done) == list(range(60))
    assert 1 < most <= 3 + 3  # helpers, and each caller with a task of its own


def test_one_task_is_run_by_its_caller_and_starts_no_thread(crew: Crew) -> None:
    ran: list[str] = []
    crew.run([lambda: ran.append(threading.current_thread().name)])
    crew.run([])
    assert ran == [threading.current_thread().name]
    assert not any(thread.name.startswith("test-crew") for thread in threading.enumerate())


def test_the_first_failing_task_is_told_when_none_runs_any_more(crew: Crew) -> None:
    ended: list[int] = []

    def task(number: int) -> None:
        time.sleep(0.002 * (4 - number % 4))
        ended.append(number)
        if number in (1, 2):
            raise ValueError(str(number))

    with pytest.raises(ValueError, match="1"):
        crew.run([lambda n=n: task(n) for n in range(30)])  # type: ignore[misc]
    count = len(ended)
    time.sleep(0.02)
    assert len(ended) == count < 30
    crew.run([lambda: ended.append(99)] * 2)
    assert ended[-1] == 99


def test_what_is_urgent_goes_first() -> None:
    crew = Crew(3, "urgent")  # two helpers, one of which may work beside two callers
    gate, begun, both = threading.Event(), threading.Semaphore(0), threading.Event()
    order: list[str] = []

    def first() -> None:
        begun.release()
        assert gate.wait(5)

    callers = [threading.Thread(target=crew.run, args=([first] * 3,))]
    callers[0].start()
    for _ in range(3):  # all are taken: who comes next would help with the rest before its own
        assert begun.acquire(timeout=5)

    def queued(name: str, priority: int) -> threading.Thread:
        stuck = threading.Event()

        def own() -> None:  # keeps the caller from the rest of its tasks
            stuck.set()
            assert both.wait(5)

        def helped() -> None:
            order.append(name)
            if len(order) == 2:
                both.set()

        caller = threading.Thread(target=crew.run, args=([own, helped], priority))
        caller.start()
        assert stuck.wait(5)
        return caller

    callers += [queued("later", 2), queued("now", 0)]
    gate.set()
    for caller in callers:
        caller.join()
    crew.close()
    assert order == ["now", "later"]


def test_who_comes_later_helps_who_came_before() -> None:
    crew = Crew(1, "alone")  # no helpers: callers run everything
    gate, begun = threading.Event(), threading.Event()
    order: list[str] = []

    def stuck() -> None:
        begun.set()
        assert gate.wait(5)

    first = threading.Thread(target=crew.run, args=([stuck, *(lambda n=n: order.append(n) for n in ("a", "b"))],))
    first.start()
    assert begun.wait(5)
    crew.run([lambda: order.append("c"), lambda: order.append("d")])
    assert order == ["a", "b", "c", "d"]
    gate.set()
    first.join()
    crew.close()


def test_closing_ends_the_threads() -> None:
    crew = Crew(3, "closing")
    crew.run([lambda: None] * 4)
    crew.close()
    crew.close()
    assert not any(thread.name.startswith("closing") for thread in threading.enumerate())


def test_who_is_interrupted_in_anothers_task_ends_that_call_and_its_own() -> None:
    crew = Crew(1, "interrupted")  # no helpers: callers run everything
    gate, begun = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def stuck() -> None:
        begun.set()
        assert gate.wait(5)

    def interrupted() -> None:
        raise KeyboardInterrupt

    def call() -> None:
        try:
            crew.run([stuck, interrupted])
        except BaseException as error:
            errors.append(error)

    first = threading.Thread(target=call)
    first.start()
    assert begun.wait(5)
    ran: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        crew.run([lambda: ran.append(1)] * 2)  # helps the other call first
    gate.set()
    first.join(5)
    assert not ran
    assert [type(error) for error in errors] == [ReadError]
    assert "interrupted" in str(errors[0])
    crew.run([lambda: ran.append(1)] * 2)
    assert ran == [1, 1]
    crew.close()


@pytest.mark.parametrize("allowed", [0, 1])
def test_threads_that_cannot_be_started_are_told_of_and_missed(
    allowed: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start, left = threading.Thread.start, [allowed]

    def refused(thread: threading.Thread) -> None:
        if left[0] == 0:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    crew = Crew(4, "few")
    ran: list[int] = []
    for _ in range(2):
        crew.run([lambda: ran.append(1)] * 10)
    assert len(ran) == 20
    assert [f"{3 - allowed} of 3 threads" in line and "ulimit -u" in line for line in caplog.messages] == [True]
    crew.close()


def test_an_interrupt_as_a_caller_begins_to_wait_does_not_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the wait is Python's, an interrupt can leave a lock within it taken."""
    crew = Crew(3, "waits")
    enter = threading.Condition.__enter__
    interrupted: list[bool] = []
    ended: list[bool] = []

    def taken(condition: threading.Condition) -> bool:
        found = enter(condition)
        frame = sys._getframe(2)
        if frame.f_code is Crew._leave.__code__ and not interrupted:
            interrupted.append(found)
            raise KeyboardInterrupt
        return found

    def call() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            crew.run([lambda: time.sleep(0.05)] * 6)
        ended.append(True)

    monkeypatch.setattr(threading.Condition, "__enter__", taken)
    caller = threading.Thread(target=call, daemon=True)
    caller.start()
    caller.join(5)
    assert ended
    crew.close()
