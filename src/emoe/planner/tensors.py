"""What is known of a checkpoint's tensors and config.json, for the modules that make facts of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from emoe.checkpoint.headers import TensorEntry

STORED = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The dtypes of weights: safetensors' names and torch's."""

LAYER = re.compile(r"\.layers\.(\d+)\.(.+)$")
"""A decoder layer's number, and what a tensor is called in it."""


class Unsure(Exception):
    """The headers alone do not settle it; the text says what."""


@dataclass
class DenseLayer:
    """Dense tensors of one decoder layer: name after `layers.N.` -> shape."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def find(self, suffix: str) -> tuple[int, ...] | None:
        """Shape of the one tensor whose name ends in `.suffix`."""
        found = [shape for name, shape in self.shapes.items() if f".{name}".endswith(f".{suffix}")]
        return found[0] if len(found) == 1 else None


def stated(config: Mapping[str, Any], *keys: str) -> int:
    """The first of `keys` that the configuration states as a positive number. Raises Unsure where it states none."""
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise Unsure(f"config.json states none of {', '.join(keys)} as a number")


def element_count(entry: TensorEntry) -> int:
    """Numbers in a tensor of floats. Raises Unsure for one of other things."""
    if entry.dtype not in STORED:
        raise Unsure(f"{entry.name} is stored as {entry.dtype}")
    count = 1
    for size in entry.shape:
        count *= size
    return count
