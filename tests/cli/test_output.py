"""Tables and progress lines."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.cli.output import ProgressLine, table


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.floats(0, 1e6))
def test_a_progress_line_never_fails(done: int, more: int, seconds: float) -> None:
    line = ProgressLine("reading", io.StringIO()).line(done, done + more, seconds, done)
    assert line.startswith("reading ")
    assert "\n" not in line


def test_bytes_rate_and_time_left() -> None:
    line = ProgressLine("reading", io.StringIO()).line(2**30, 4 * 2**30, 2.0, 2**30)
    assert line == "reading 1.00 GiB of 4.00 GiB (25%)  512.00 MiB/s  0:06 left"


def test_a_terminal_gets_one_line_that_is_redrawn() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    progress = ProgressLine("reading", terminal)
    for done in range(0, 101):
        progress(done, 100)
    assert terminal.getvalue().count("\n") == 1
    assert terminal.getvalue().endswith("\n")


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    log = io.StringIO()
    progress = ProgressLine("reading", log)
    for now in range(60):
        progress(now, 60)
    assert len(log.getvalue().splitlines()) == 5


def test_columns_line_up() -> None:
    assert table([("a", "10"), ("bbb", "1")], right=(1,), indent="") == "a    10\nbbb   1"
