"""Sizes and settings that users write: pure, frozen, and without torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

from emoe.errors import UsageError

Mode = Literal["exact", "balanced", "resident"]
MODES: tuple[Mode, ...] = ("exact", "balanced", "resident")
LayerSplit = Literal["uniform", "expected-misses"]
LAYER_SPLITS: tuple[LayerSplit, ...] = ("uniform", "expected-misses")
Prefetch = Literal["plan", "next-gate"]
PREFETCHES: tuple[Prefetch, ...] = ("plan", "next-gate")
Embeddings = Literal["memory", "disk", "auto"]
EMBEDDINGS: tuple[Embeddings, ...] = ("memory", "disk", "auto")
"""Where the input embedding lies: "auto" is on disk where not every expert is resident."""
OnMiss = Literal["load", "hybrid"]
ON_MISS: tuple[OnMiss, ...] = ("load", "hybrid")

_UNITS: dict[str, int] = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgtp", start=1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgtp", start=1)},
}
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*", re.ASCII)
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*%\s*", re.ASCII)
_PER_LAYER = re.compile(r"\s*(\d+)\s*/\s*layer\s*", re.ASCII | re.IGNORECASE)


def parse_bytes(value: str | int) -> int:
    """Bytes named by `value`: an int, or text such as "8GiB" (1024^3), "512MB" (1000^2), "1.5 GiB", "4096".

    A fraction of a byte is rounded down. Raises UsageError for anything else, also for "8G", which people
    read both ways.
    """
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UsageError(f"a size must be bytes (int) or text like '8GiB' or '512MB', not {value!r}")
    if isinstance(value, int):
        if value < 0:
            raise UsageError(f"a size cannot be negative: {value}")
        return value
    match = _NUMBER.fullmatch(value)
    if match is None:
        raise UsageError(
            f"cannot read {value!r} as a size; write e.g. '8GiB' (1024^3 bytes), '512MB' (1000^2) or bytes"
        )
    number, unit = match.groups()
    factor = _UNITS.get(unit.lower())
    if factor is None:
        if unit.lower() in set("kmgtp"):
            letter = unit.upper()
            raise UsageError(
                f"the unit of {value!r} can be read two ways: write {number}{letter}iB for powers of 1024 "
                f"or {number}{letter}B for powers of 1000"
            )
        raise UsageError(f"unknown unit {unit!r} in {value!r}; use B, kB, MB, GB, TB or KiB, MiB, GiB, TiB")
    return int(Fraction(number) * factor)


def format_bytes(nbytes: int) -> str:
    """`nbytes` for people, in powers of 1024: "512 B", "1.24 GiB", "-3.00 MiB"."""
    if abs(nbytes) < 1024:
        return f"{nbytes} B"
    size, unit = float(nbytes), 0
    # 1023.995 rather than 1024: what would print as "1024.00 KiB" goes one unit up.
    while abs(size) >= 1023.995 and unit < len(_BINARY) - 1:
        size /= 1024
        unit += 1
    return f"{size:.2f} {_BINARY[unit]}"


@dataclass(frozen=True, slots=True)
class ExpertMemory:
    """Fast memory for experts: bytes in all, a share (0 to 1) of all expert bytes, or experts per layer."""

    kind: Literal["bytes", "share", "per_layer"]
    value: int | float

    def __post_init__(self) -> None:
        if self.value <= 0:
            raise UsageError(f"expert memory must be positive, not {self}")
        if self.kind == "share" and self.value > 1:
            raise UsageError(f"expert memory {self} is more than all experts; '100%' keeps everything resident")

    @classmethod
    def parse(cls, value: str | int | ExpertMemory) -> ExpertMemory:
        """Read "8GiB", "40%", "12/layer", a number of bytes, or an ExpertMemory; else raise UsageError."""
        if isinstance(value, ExpertMemory):
            return value
        if isinstance(value, str):
            if match := _PERCENT.fullmatch(value):
                return cls("share", float(Fraction(match[1]) / 100))
            if match := _PER_LAYER.fullmatch(value):
                return cls("per_layer", int(match[1]))
        elif isinstance(value, bool) or not isinstance(value, int):
            raise UsageError(f"expert memory must be like '8GiB', '40%', '12/layer' or bytes (int), not {value!r}")
        try:
            return cls("bytes", parse_bytes(value))
        except UsageError as error:
            if isinstance(value, str) and ("%" in value or "/" in value or not _NUMBER.fullmatch(value)):
                raise UsageError(
                    f"cannot read {value!r} as expert memory; write e.g. '8GiB', '40%' or '12/layer'"
                ) from error
            raise

    def __str__(self) -> str:
        """Text that `parse` reads back to an equal value."""
        if self.kind == "share":
            return f"{self.value * 100:.12g}%"
        if self.kind == "per_layer":
            return f"{self.value}/layer"
        for power in range(len(_BINARY) - 1, 0, -1):
            if self.value and self.value % 1024**power == 0:
                return f"{self.value // 1024**power}{_BINARY[power]}"
        return f"{self.value}B"


AUTO = "auto"
"""Host memory that the machine's free memory decides."""


def parse_host_memory(value: str | int | ExpertMemory | None) -> ExpertMemory | str | None:
    """Read "16GiB", "50%" (of all experts), "auto", 0 (none), bytes, or None (not said).

    Raises:
        UsageError: anything else.
    """
    if value is None or value in (AUTO, 0, "0"):
        return AUTO if value == AUTO else None if value is None else "0"
    try:
        memory = ExpertMemory.parse(value)
    except UsageError as error:
        raise UsageError(
            f"cannot read {value!r} as host memory; write e.g. '16GiB', '50%' (of all experts), 'auto' or 0"
        ) from error
    if memory.kind == "per_layer":
        raise UsageError(f"host memory is a size or a share, not {value!r}: it is one pool over all layers")
    return memory


def user_cache() -> Path:
    """Where emoe keeps what it made for the user: $EMOE_CACHE, else $XDG_CACHE_HOME/emoe, else ~/.cache/emoe."""
    given = os.environ.get("EMOE_CACHE")
    if given:
        return Path(given).expanduser()
    named = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(named) if os.path.isabs(named) else Path.home() / ".cache") / "emoe"
