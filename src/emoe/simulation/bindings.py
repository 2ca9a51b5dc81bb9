"""What a miss is bound to, layer by layer: a load that is waited for, or the best resident expert (lossy).

As in the engine: `exact` waits everywhere; `resident` waits only for prompts read with their own routes, the first of
all and, without a predictor, every p-th; `balanced` waits also where the task is sensitive to wrong routing. A trace
does not hold what a rerouted token would have chosen next, so later routes are those recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from emoe.config import MODES, Mode
from emoe.errors import UsageError, unknown
from emoe.routing.trace import Array
from emoe.simulation.lookups import Lookups
from emoe.tasks.sensitivity import Sensitivity

Waits = Callable[[int], Array]
"""Sequence number -> bool [layers]: where its misses are loaded and waited for."""


@dataclass(frozen=True, slots=True)
class Binding:
    """A mode, and for `balanced` which layers are sensitive at which threshold (None: the profile's).

    Raises:
        UsageError: no such mode, or `balanced` without sensitivities.
    """

    mode: Mode = "exact"
    sensitivity: Sensitivity | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown("binding", self.mode, MODES)
        if self.mode == "balanced" and self.sensitivity is None:
            raise UsageError("balanced needs to know which layers are sensitive: give --profile.")

    @property
    def lossy(self) -> bool:
        """Whether a miss may be rerouted."""
        return self.mode != "exact"

    def waits(self, lookups: Lookups, own_routes_every: int | None) -> Waits | None:
        """Where misses are waited for; None: everywhere.

        Args:
            lookups: what is looked up.
            own_routes_every: p, for policies that do not plan; None: only the first prompt has its own routes.

        Raises:
            UsageError: the sensitivities are of a model with another number of layers.
        """
        if not self.lossy:
            return None
        layers = lookups.shape.layers
        everywhere, nowhere = np.ones(layers, dtype=bool), np.zeros(layers, dtype=bool)

        def where(number: int) -> Array:
            if number == 0 or (own_routes_every is not None and number % own_routes_every == 0):
                return everywhere
            if self.mode != "balanced" or self.sensitivity is None:
                return nowhere
            found = self.sensitivity.sensitive(lookups.sequences[number].task, self.threshold)
            if found.shape != (layers,):
                raise UsageError(
                    f"the profile knows {len(found)} MoE layers and the trace has {layers}: give its model's."
                )
            return found

        return where


EXACT = Binding()
