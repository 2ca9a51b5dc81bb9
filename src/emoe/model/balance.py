"""Mode `balanced`: where the running task is sensitive a miss is loaded and waited for, elsewhere it is rerouted."""

from __future__ import annotations

import numpy as np

from emoe.model.passes import Pass
from emoe.model.runtime import Runtime
from emoe.model.tasking import KnownHabits


class Balance:
    """Sets which layers wait whenever the tasks of a pass change.

    Of a batch of several tasks, a layer waits if one of them is sensitive there.
    """

    def __init__(self, runtime: Runtime, habits: KnownHabits) -> None:
        """Bind to a runtime whose `tasks` are known when a pass starts."""
        self._runtime = runtime
        self._habits = habits
        self._tasks: frozenset[str | None] | None = None

    def start_pass(self, now: Pass) -> None:
        """Look the running tasks up."""
        tasks = frozenset(self._runtime.tasks)
        if tasks == self._tasks:
            return
        self._tasks = tasks
        waits = None
        for task in tasks:
            sensitive = self._habits.sensitive(task)
            if sensitive is not None:
                waits = sensitive if waits is None else np.logical_or(waits, sensitive)
        for rank, number in enumerate(sorted(self._runtime.layers)):
            self._runtime.layers[number].waits = True if waits is None else bool(waits[rank])
