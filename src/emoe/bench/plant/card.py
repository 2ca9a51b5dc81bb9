"""`emoe_plant.json`: what a planted checkpoint is. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emoe.errors import UsageError

CARD = "emoe_plant.json"
ROUTES = "emoe_plant_trace.npz"
"""The routes that were planted, in emoe's own trace format: row i routes token id i."""

FORMAT = 1
LABEL = "planted: sizes and routing are real, text is not"
"""Stands beside everything that is printed about such a checkpoint."""


@dataclass(frozen=True, slots=True)
class PlantCard:
    """What was planted. Token id i is position i of the trace; ids 0..tokens-1 are fed in order.

    layers: decoder layers written; experts, top_k: of each layer with experts; trace: the name of the recorded trace;
    resampled: whether it was made to fit another shape, and kept: how, in words; prompts: [start, end) of each;
    next_gate: the share of a token's experts that the next layer's router finds when it is asked a layer early: 1 where
    nothing else was asked for (`next_gate.plant_signs`).
    """

    shape: str
    model: str
    layers: int
    experts: int
    top_k: int
    trace: str
    tokens: int
    seed: int
    dtype: str
    resampled: bool
    kept: str
    prompts: tuple[tuple[int, int], ...]
    vocabulary: int
    next_gate: float = 1.0

    @property
    def guesses(self) -> str:
        """`next_gate` in words."""
        if self.next_gate < 1:
            return f"right about {self.next_gate:.1%} of a token's experts, as planted"
        return "right every time, as planted: more than any trained model's is"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"format": FORMAT, **asdict(self), "prompts": [list(span) for span in self.prompts], "label": LABEL}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PlantCard:
        """The opposite of `as_dict`. Raises KeyError, TypeError, ValueError for anything else."""
        fields = {name: values[name] for name in cls.__dataclass_fields__ if name not in ("prompts", "next_gate")}
        return cls(
            **fields,
            prompts=tuple((int(start), int(end)) for start, end in values["prompts"]),
            next_gate=float(values.get("next_gate", 1.0)),  # older cards have none, and nothing but that was planted
        )


def is_planted(folder: Path) -> bool:
    """Whether `folder` holds a planted checkpoint."""
    return (folder / CARD).is_file()


def read_card(folder: str | Path) -> PlantCard:
    """The card in `folder`. Raises UsageError where there is none, or one that this emoe cannot read."""
    path = Path(folder) / CARD
    try:
        values = json.loads(path.read_text())
    except OSError:
        raise UsageError(
            f"{folder} is no planted checkpoint (it has no {CARD}); make one with emoe bench plant"
        ) from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not JSON ({error}); plant the checkpoint again") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UsageError(f"{path} is not of format {FORMAT}, which this emoe reads; plant the checkpoint again")
    try:
        return PlantCard.from_dict(values)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} is incomplete ({error!r}); plant the checkpoint again") from error
