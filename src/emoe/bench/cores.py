"""The cores that measured processes are pinned to: as many as threads, the same ones for every engine.

A process is pinned whole. Threads that compute and threads that wait for the disk share its cores: an engine gets no
more of the machine by reading with threads of its own than one whose computing thread waits for page faults.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from emoe.errors import UsageError

Cores = tuple[int, ...]

AUTO, NONE = "auto", "none"
_TOPOLOGY = Path("/sys/devices/system/cpu")


def usable_cores() -> Cores:
    """The cores this process may run on; nothing where the system cannot tell."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


def parse_cores(text: str) -> Cores | None:
    """The cores that `--cores` allows: "auto" all that are usable, "none" None (no pinning), or a list, as "2,3".

    Raises:
        UsageError: no such list, or a core that this process may not run on.
    """
    usable = usable_cores()
    if text == NONE or (text == AUTO and not usable):
        return None
    if text == AUTO:
        return _apart(usable)
    try:
        chosen = tuple(dict.fromkeys(int(word) for word in text.split(",") if word.strip()))
    except ValueError as error:
        raise UsageError(f"cores are {AUTO}, {NONE} or numbers, as 0,1, not {text!r}") from error
    wrong = [core for core in chosen if core not in usable]
    if wrong or not chosen:
        raise UsageError(
            f"cores are {AUTO}, {NONE} or among {', '.join(map(str, usable)) or 'nothing here'}, not {text!r}"
        )
    return chosen


def cores_for(threads: int, allowed: Cores | None) -> Cores | None:
    """The first `threads` of those allowed (all of them where there are fewer); None: not pinned."""
    return None if allowed is None else allowed[:threads]


@contextmanager
def pinned(cores: Cores | None) -> Iterator[None]:
    """Processes started inside begin on these cores, and their threads with them; None leaves them free."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)  # of this thread alone: a child inherits that of the thread that starts it
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _apart(cores: Sequence[int]) -> Cores:
    """One hardware thread of each core first: two of one core share what they compute with."""
    taken: set[str] = set()
    first: list[int] = []
    rest: list[int] = []
    for core in cores:
        name = _siblings(core)
        (rest if name in taken else first).append(core)
        taken.add(name)
    return (*first, *rest)


def _siblings(core: int) -> str:
    try:
        return (_TOPOLOGY / f"cpu{core}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(core)
