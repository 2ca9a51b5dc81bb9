"""Work that is ended from outside ends, whenever the signal comes."""

from __future__ import annotations

import os
import signal
import sys
import weakref
from collections.abc import Iterator

import pytest

from emoe.bench.options import ended_in_order


class Thing:
    """Something that a weak reference can be made of."""


@pytest.fixture
def quiet_about_lost_errors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "unraisablehook", lambda _: None)
        yield


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_work_and_the_handlers_come_back(kind: signal.Signals) -> None:
    before = signal.getsignal(kind)
    with pytest.raises(KeyboardInterrupt), ended_in_order():
        os.kill(os.getpid(), kind)
        signal.pause()
    assert signal.getsignal(kind) is before


@pytest.mark.usefixtures("quiet_about_lost_errors")
def test_a_signal_that_python_loses_is_raised_at_the_next_check() -> None:
    def told(_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):  # the handler runs here, and what it raises is "ignored"
            pass

    with ended_in_order() as check:
        check()
        thing = Thing()
        kept = weakref.ref(thing, told)
        del thing
        assert kept() is None
        with pytest.raises(KeyboardInterrupt):
            check()


def test_who_ignores_interrupts_goes_on_ignoring_them() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ended_in_order():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
