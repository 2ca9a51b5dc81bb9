"""First come, first served."""

from __future__ import annotations

from emoe.scheduling.protocol import Request, Situation


class Fifo:
    """In order of arrival; one that does not fit yet keeps all behind it waiting."""

    name = "fifo"

    def admit(self, now: Situation) -> list[Request]:
        """As many of the waiting, in order, as may run."""
        return list(now.waiting[: max(0, now.max_running - len(now.running))])
