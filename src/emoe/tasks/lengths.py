"""How long answers are, by task: W_o of the paper's Equation 2 and G of its Equation 3 come from here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from emoe.errors import UsageError

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
"""The quantiles that are kept."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Answers in tokens.

    mean: tokens; quantiles: level (`LEVELS`) -> tokens; answers: how many were seen; cut: the share of them that ended
    because of a limit, so that their real length is not known and the mean is too small.
    """

    mean: float
    quantiles: Mapping[float, float]
    answers: int
    cut: float = 0.0

    @classmethod
    def of(cls, tokens: Iterable[int], cut: int = 0) -> Lengths:
        """From the tokens of each answer, `cut` of which ended at a limit.

        Raises:
            UsageError: there is no answer.
        """
        counts = np.array(list(tokens), dtype=np.float64)
        if not counts.size:
            raise UsageError("no answer was given, so there are no lengths to learn.")
        levels = zip(LEVELS, np.quantile(counts, LEVELS).tolist(), strict=True)
        return cls(float(counts.mean()), dict(levels), len(counts), cut / len(counts))

    def remaining(self, generated: int) -> float:
        """Tokens that an answer of `generated` tokens so far is expected to take yet, by the kept quantiles.

        The mean of the quantiles above `generated`, less `generated`; 1 where none is above: the answer may end now.
        """
        if generated <= 0:
            return self.mean
        above = [tokens for tokens in self.quantiles.values() if tokens > generated]
        return sum(above) / len(above) - generated if above else 1.0

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; the inverse of `from_json`."""
        levels = {str(level): round(tokens, 3) for level, tokens in self.quantiles.items()}
        return {"mean": round(self.mean, 3), "quantiles": levels, "answers": self.answers, "cut": round(self.cut, 4)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Lengths:
        """Read what `as_json` gave. Raises KeyError, TypeError or ValueError for anything else."""
        levels = {float(level): float(tokens) for level, tokens in values["quantiles"].items()}
        return cls(float(values["mean"]), levels, int(values["answers"]), float(values["cut"]))
