"""Loader threads: order, helping, errors, dead threads, closing."""

from __future__ import annotations

import threading
import time

import pytest

from emoe.errors import ReadError
from emoe.residency.loader import Load, Loader


def test_the_waiting_thread_runs_a_load_nobody_has_started() -> None:
    loader = Loader(threads=0)
    ran_in: list[int] = []

    def run() -> int:
        ran_in.append(threading.get_ident())
        return 7

    load = loader.submit(run, "expert 0 of layer 0")
    assert loader.wait(load) == 7
    assert ran_in == [threading.get_ident()]
    loader.close()


def test_demand_loads_go_before_others() -> None:
    loader = Loader(threads=1)
    gate, order = threading.Event(), []

    def block() -> int:
        gate.wait(5)
        return 1

    def note(name: str) -> int:
        order.append(name)
        return 1

    first = loader.submit(block, "blocker")
    while not first.claimed:
        time.sleep(0.001)
    late = loader.submit(lambda: note("prefetch"), "prefetch", priority=5)
    soon = loader.submit(lambda: note("demand"), "demand")
    gate.set()
    while not (late.done.is_set() and soon.done.is_set()):
        time.sleep(0.001)
    assert order == ["demand", "prefetch"]
    loader.close()


def test_an_error_reaches_the_waiting_thread_and_the_loader_lives_on() -> None:
    loader = Loader(threads=1)

    def fail() -> int:
        raise ReadError("shard 3 ends at byte 10")

    with pytest.raises(ReadError, match="shard 3 ends at byte 10"):
        loader.wait(loader.submit(fail, "expert 1 of layer 2"))
    assert loader.wait(loader.submit(lambda: 3, "expert 2 of layer 2")) == 3
    loader.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dying_thread_fails_its_load_and_hangs_nobody() -> None:
    loader = Loader(threads=1)
    started = threading.Event()

    def die() -> int:
        started.set()
        raise SystemExit

    load = loader.submit(die, "expert 4 of layer 1")
    started.wait(5)
    with pytest.raises(ReadError, match="expert 4 of layer 1"):
        loader.wait(load)
    assert loader.wait(loader.submit(lambda: 9, "expert 5 of layer 1")) == 9  # helped by the waiting thread
    loader.close()


def test_closing_fails_what_is_queued_and_later_submissions() -> None:
    loader = Loader(threads=0)
    load = loader.submit(lambda: 1, "expert 0 of layer 0")
    loader.close()
    assert load.done.is_set()  # who watches it rather than waits is told, too
    loader.close()
    with pytest.raises(ReadError, match="the model was closed"):
        loader.wait(load)
    with pytest.raises(ReadError, match="the model was closed"):
        loader.submit(lambda: 1, "expert 1 of layer 0")


def test_cancelling_drops_what_has_not_started() -> None:
    loader = Loader(threads=0)
    ran: list[int] = []

    def run() -> int:
        ran.append(1)
        return 1

    load = loader.submit(run, "expert 0 of layer 0")
    loader.cancel(load)
    assert load.done.is_set() and not ran
    loader.close()


def test_the_parts_used_first_are_waited_for_only_while_a_thread_reads_the_rest() -> None:
    loader = Loader(threads=1)
    first, rest = threading.Event(), threading.Event()
    load = loader.submit(lambda: 5 if rest.wait(5) else 0, "expert 0 of layer 0", first=first)
    other = loader.submit(lambda: 1, "expert 1 of layer 0", first=threading.Event())
    plain = loader.submit(lambda: 1, "expert 2 of layer 0")
    while not load.claimed:
        time.sleep(0.001)
    assert not loader.wait_first(other)  # nobody has started it
    first.set()
    assert loader.wait_first(load)
    rest.set()
    assert loader.wait(load) == 5 and load.seconds > 0
    assert not loader.wait_first(load)  # nothing left to gain
    assert loader.wait(plain) == 1 and not loader.wait_first(plain)
    loader.close()


@pytest.mark.parametrize("how", ["wait", "drop", "cancel"])
def test_a_load_runs_once_at_most_whoever_comes_first(how: str) -> None:
    """A second run would fill a slot that by then may hold another expert."""
    loader = Loader(threads=1)
    gate, ran = threading.Event(), []

    def note(name: str) -> int:
        ran.append(name)
        return len(name)

    first = loader.submit(lambda: note("first") if gate.wait(5) else 0, "expert 0 of layer 0")
    while not first.claimed:
        time.sleep(0.001)
    queued = loader.submit(lambda: note("queued"), "expert 1 of layer 0")
    assert not loader.drop(first)  # a thread runs it
    if how == "wait":
        assert loader.wait(queued) == 6
    elif how == "drop":
        assert loader.drop(queued) and not loader.drop(queued)
    else:
        loader.cancel(queued)
    threading.Timer(0.05, gate.set).start()
    loader.cancel(first)  # returns when it has ended
    assert first.done.is_set() and ran[-1] == "first"
    assert loader.wait(first) == 5
    last = loader.submit(lambda: note("last"), "expert 2 of layer 0")
    assert last.done.wait(5)  # run by the thread, after whatever it finds in the queue before
    assert ran == [*(["queued"] if how == "wait" else []), "first", "last"]
    if how != "wait":
        with pytest.raises(ReadError, match="was cancelled"):
            loader.wait(queued)
    loader.close()


def test_what_needs_no_reading_has_ended_and_is_nobodys_to_drop() -> None:
    loader = Loader(threads=0)
    load = Load.ended("expert 0 of layer 0", 0.25)
    assert not loader.drop(load)
    assert loader.wait(load) == 0 and load.seconds == 0.25
    loader.close()


def test_threads_that_cannot_be_started_refuse_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    made: list[threading.Thread] = []

    def refused(thread: threading.Thread) -> None:
        if made:
            raise RuntimeError("can't start new thread")
        made.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(ReadError, match=r"2 loader threads are needed and only 1 could be started: can't.*ulimit -u"):
        Loader(threads=2)
    assert not made[0].is_alive()


def test_abandoned_loads_have_ended_and_those_of_others_go_on() -> None:
    loader = Loader(threads=1)
    gate, ran = threading.Event(), []

    def run(name: str) -> int:
        assert gate.wait(5)
        ran.append(name)
        return 1

    mine = object()
    started = loader.submit(lambda: run("started"), "a", owner=mine)
    while not started.claimed:
        time.sleep(0.001)
    queued = loader.submit(lambda: run("queued"), "b", owner=mine)  # nobody knows of it
    other = loader.submit(lambda: run("other"), "c")

    def let_go() -> None:  # not before the queued one is given up: else the loader's thread could take it
        queued.done.wait(5)
        gate.set()

    threading.Thread(target=let_go).start()
    loader.abandon(mine)
    assert ran[0] == "started"
    assert loader.wait(other) == 1
    loader.close()
    assert ran == ["started", "other"] and not loader._under_way


def test_a_load_whose_runner_was_interrupted_before_it_ran_can_be_cancelled() -> None:
    loader = Loader(threads=1)
    gate = threading.Event()
    loader.submit(lambda: int(gate.wait(5)), "keeps the thread")
    load = loader.submit(lambda: 1, "expert 0 of layer 0")
    assert loader._claim(load)  # and then Ctrl-C
    loader.cancel(load)
    with pytest.raises(ReadError, match="interrupted"):
        loader.wait(load)
    gate.set()
    loader.close()


def test_loads_begun_by_another_thread_that_was_interrupted_can_be_abandoned() -> None:
    loader = Loader(threads=1)
    gate, claimed, mine = threading.Event(), threading.Event(), object()
    loader.submit(lambda: int(gate.wait(10)), "keeps the thread")
    load = loader.submit(lambda: 1, "expert 0 of layer 0", owner=mine)

    def serve() -> None:
        assert loader._claim(load)  # and then an interrupt, which ends the request but not this thread
        claimed.set()
        gate.wait(10)

    threading.Thread(target=serve, daemon=True).start()
    assert claimed.wait(5)
    next_pass = threading.Thread(target=loader.abandon, args=(mine,), daemon=True)
    next_pass.start()
    next_pass.join(3)
    assert not next_pass.is_alive() and load.done.is_set()
    gate.set()
    loader.close()
