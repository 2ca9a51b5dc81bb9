"""Which layers a task lets route wrongly (paper, section 2.4): measured curves, and the rule that reads them.

The router's choice is replaced by random experts in the MoE layers 1..l, from the input side, for growing l, and the
answers are compared with the full model's. A layer is insensitive (s = 0) while its prefix keeps the accuracy at the
threshold or above, else sensitive (s = 1). Curves are kept, not verdicts, so the threshold stays a dial.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from emoe.errors import UsageError
from emoe.prediction.protocol import Array

THRESHOLD = 0.85
"""The paper's example."""

MEASURES = {
    "similarity": "cosine of the answers' sentence embeddings (both generated greedily)",
    "agreement": "share of the full model's answer tokens that are still the likeliest, each given those before it",
    "perplexity": "perplexity of the answer under the full model over that under random routing",
}
"""What can be compared; 1 is "no difference" in each. Without a sentence encoder `agreement` decides."""


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Measured curves, and the measure that decides.

    measure: the deciding one; curves: measure -> task -> float64 [layers], entry r for random routing in the MoE
    layers of rank 0..r; layers: how many there are; threshold: the default one; prompts: how many each task had.

    Raises:
        UsageError: no curve of that measure, or curves of another number of layers.
    """

    measure: str
    curves: Mapping[str, Mapping[str, Array]]
    layers: int
    threshold: float = THRESHOLD
    prompts: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        if self.curves and self.measure not in self.curves:
            raise UsageError(f"sensitivity by {self.measure!r} was not measured: {', '.join(self.curves)} were.")
        for measure, curves in self.curves.items():
            for task, curve in curves.items():
                if curve.shape != (self.layers,) or not np.isfinite(curve).all():
                    raise UsageError(
                        f"the {measure} curve of task {task!r} must be {self.layers} numbers, not {curve.tolist()}."
                    )

    @classmethod
    def unknown(cls, layers: int) -> Sensitivity:
        """Nothing measured: every layer of every task is sensitive."""
        return cls("agreement", {}, layers)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that were measured."""
        return tuple(self.curves.get(self.measure, {}))

    def sensitive(self, task: str | None, threshold: float | None = None, measure: str | None = None) -> Array:
        """bool [layers]: s of Equation 2. All True for a task that was not measured (None: unknown).

        The insensitive layers are a prefix: where a longer prefix is better again by chance, it counts as bad.

        Raises:
            UsageError: that measure was not taken.
        """
        measure = self.measure if measure is None else measure
        if self.curves and measure not in self.curves:
            raise UsageError(f"sensitivity by {measure!r} was not measured: {', '.join(self.curves)} were.")
        curve = None if task is None else self.curves.get(measure, {}).get(task)
        if curve is None:
            return np.ones(self.layers, dtype=bool)
        kept: Array = np.minimum.accumulate(curve) < (self.threshold if threshold is None else threshold)
        return kept

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; the inverse of `from_json`."""
        curves = {
            measure: {task: [round(float(x), 5) for x in curve] for task, curve in by_task.items()}
            for measure, by_task in self.curves.items()
        }
        return {
            "measure": self.measure,
            "threshold": self.threshold,
            "prompts": dict(self.prompts or {}),
            "curves": curves,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], layers: int) -> Sensitivity:
        """Read what `as_json` gave. Raises KeyError, TypeError, ValueError or UsageError for anything else."""
        curves = {
            str(measure): {str(task): np.asarray(curve, dtype=np.float64) for task, curve in by_task.items()}
            for measure, by_task in values["curves"].items()
        }
        prompts = {str(task): int(count) for task, count in values["prompts"].items()}
        return cls(str(values["measure"]), curves, layers, float(values["threshold"]), prompts)
