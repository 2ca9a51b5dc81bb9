"""How many different task labels there can be: each costs counters, and clients choose them."""

from __future__ import annotations

from collections.abc import Iterable
from threading import Lock

from emoe.tasks.keywords import OTHER

TASKS_AT_MOST = 64
"""Labels that are told apart; further ones are taken as `OTHER`."""


class TaskLabels:
    """Tells the first `TASKS_AT_MOST` labels apart, and those known from the start always. From any thread."""

    def __init__(self, known: Iterable[str] = ()) -> None:
        """`known` labels, as a profile's, are their own whatever else has come."""
        self._known = {OTHER, *known}
        self._lock = Lock()

    def __call__(self, task: str | None) -> str:
        """The label under which a request of `task` is counted; None: no task."""
        name = task or OTHER
        with self._lock:
            if name not in self._known and len(self._known) >= TASKS_AT_MOST:
                return OTHER
            self._known.add(name)
        return name
