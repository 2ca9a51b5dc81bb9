"""Every error emoe raises on purpose. The text names the thing, the value and the remedy.

`exit_code` is what the command line returns for it, so that scripts can tell the cases apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

_T = TypeVar("_T")


class EmoeError(Exception):
    """Base of all deliberate errors: catch this to catch every one of them."""

    exit_code = 1


class UsageError(EmoeError, ValueError):
    """An argument that cannot be meant: a malformed size, an unknown mode, two options at odds."""

    exit_code = 2


class CheckpointError(EmoeError):
    """The files at rest are missing, truncated, damaged or contradict their own headers."""

    exit_code = 3


class UnsupportedModelError(EmoeError):
    """The checkpoint is sound, but emoe cannot run it: a dense model, an unknown layout, no routing rule."""

    exit_code = 4


class BudgetError(EmoeError):
    """The memory allowed is less than the smallest amount that works; the text names that amount."""

    exit_code = 5


class ReadError(EmoeError):
    """Reading experts failed while the model ran: an i/o error, a file changed since it was indexed."""

    exit_code = 6


def unknown(what: str, name: object, choices: Iterable[str]) -> UsageError:
    """The error for a `name` that is none of `choices`, in their order: "no `what` is called ..."."""
    return UsageError(f"no {what} is called {name!r}: choose one of {', '.join(choices)}.")


def named(what: str, name: str, table: Mapping[str, _T]) -> _T:
    """What `table` holds under `name`. Raises UsageError naming the choices, in its order."""
    if name not in table:
        raise unknown(what, name, table)
    return table[name]
