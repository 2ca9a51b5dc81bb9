"""What the benchmarks' options have in common: lists of words, modes, and ending in order."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from emoe.config import MODES, Mode
from emoe.errors import UsageError


def words(text: str) -> list[str]:
    """The words of a list with commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str, what: str) -> tuple[int, ...]:
    """The numbers of a list with commas. Raises UsageError, which calls them `what`."""
    try:
        return tuple(int(word) for word in words(text))
    except ValueError as error:
        raise UsageError(f"{what} must be numbers, as 1,2, not {text!r}") from error


def seed(text: str) -> int:
    """argparse type for a seed: a number that numpy and torch both take."""
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to {2**32 - 1}, not {text!r}")
    return int(text)


def share(text: str) -> float:
    """argparse type for a share in percent, above 0 and at most 100: 0.79 for "79%"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip(), re.ASCII)
    value = float(found[1]) / 100 if found else 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0% and at most 100%, e.g. 79%, not {text!r}")
    return value


def modes(text: str) -> tuple[Mode, ...]:
    """emoe's modes of a list with commas. Raises UsageError."""
    found: list[Mode] = []
    for word in words(text):
        mode = next((mode for mode in MODES if mode == word), None)
        if mode is None:
            raise UsageError(f"no mode is called {word!r}; use {', '.join(MODES)}")
        found.append(mode)
    return tuple(found)


@contextmanager
def ended_in_order() -> Iterator[Callable[[], None]]:
    """Ended from outside (SIGTERM), the processes started inside and the files they wrote go too: as with Ctrl-C.

    Yields a function that raises KeyboardInterrupt if one was asked for: Python loses those that come while a finaliser
    or the callback of a weak reference runs, so long work calls it now and then.
    """
    asked = False

    def stop(*_: object) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    kinds = [k for k in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(k) is not signal.SIG_IGN]
    before = {kind: signal.signal(kind, stop) for kind in kinds}
    try:
        yield check
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def say(text: str) -> None:
    """One line on stderr."""
    print(f"emoe: {text}", file=sys.stderr, flush=True)
