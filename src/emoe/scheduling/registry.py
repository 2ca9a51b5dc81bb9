"""Schedulers by name. Adding one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from emoe.errors import named
from emoe.plugins import Registry, check_conforms
from emoe.scheduling.affinity import Affinity
from emoe.scheduling.edf import Edf
from emoe.scheduling.emoe import Emoe
from emoe.scheduling.fifo import Fifo
from emoe.scheduling.protocol import Scheduler

SCHEDULERS: Registry[Callable[[], Scheduler]] = Registry(
    "scheduler", "scheduler", {each.name: each for each in (Fifo, Edf, Emoe, Affinity)}
)


def make_scheduler(name: str) -> Scheduler:
    """A new scheduler by name.

    Raises:
        UsageError: no scheduler has that name, or what bears it lacks something that `Scheduler` asks for.
    """
    made = named("scheduler", name, SCHEDULERS)()
    check_conforms(made, Scheduler, "scheduler", name)
    return made
