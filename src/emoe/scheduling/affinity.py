"""Ours: what Algorithm 1 leaves on the table."""

from __future__ import annotations

from emoe.scheduling.edf import Edf


class Affinity(Edf):
    """Earliest deadline first, for now."""

    name = "affinity"
