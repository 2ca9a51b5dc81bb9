"""When requests come and how long they are: from a file, or drawn. The benchmark and the simulator read the same."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from emoe.errors import UsageError

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
"""The head of an arrivals file, as in Azure's published traces of 2023 and 2024."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to come: `at_s` seconds after the first, and its lengths in tokens where they are given."""

    at_s: float
    input_tokens: int | None = None
    output_tokens: int | None = None


def read_arrivals(
    path: Path | str, *, time_scale: float = 1.0, length_scale: float = 1.0, start: int = 0, limit: int | None = None
) -> list[Arrival]:
    """Arrivals of a CSV file with the columns `COLUMNS`, in order of time; the first is at 0.

    Args:
        path: the file.
        time_scale: factor for the time between arrivals; 0.1 sends ten times as fast.
        length_scale: factor for both lengths, which are rounded and at least 1.
        start: rows to leave out at the beginning.
        limit: rows to take at most, None: all.

    Raises:
        UsageError: the file cannot be read, a row is malformed or out of order (named by file and line), none is
            left, or a factor is impossible.
    """
    for name, factor in (("time scale", time_scale), ("length scale", length_scale)):
        if not (math.isfinite(factor) and factor > 0):
            raise UsageError(f"the {name} must be above 0, not {factor:g}")
    if start < 0 or (limit is not None and limit < 1):
        raise UsageError(f"arrivals can start at row 0 or later and be 1 or more, not start {start}, limit {limit}")
    path = Path(path)
    found: list[Arrival] = []
    first: datetime | None = None
    last: datetime | None = None
    for number, (line, at, context, generated) in enumerate(_rows(path)):
        if last is not None and at < last:
            raise UsageError(f"{path}, line {line}: {at} is before the row above it; sort the file by {COLUMNS[0]}")
        last = at
        if number < start:
            continue
        if limit is not None and len(found) >= limit:
            break
        first = at if first is None else first
        seconds = (at - first).total_seconds() * time_scale
        found.append(Arrival(seconds, *(max(1, round(tokens * length_scale)) for tokens in (context, generated))))
    if not found:
        raise UsageError(f"{path} has no arrivals from row {start} on")
    return found


def _rows(path: Path) -> Iterator[tuple[int, datetime, int, int]]:
    """Line number, time and the two lengths of each row. Raises UsageError."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            head = [name.strip() for name in next(reader, [])]
            missing = [name for name in COLUMNS if name not in head]
            if missing:
                raise UsageError(f"{path}, line 1: no column {missing[0]}; arrivals have the head {','.join(COLUMNS)}")
            places = [head.index(name) for name in COLUMNS]
            for row in reader:
                if row:
                    yield (reader.line_num, *_row(path, reader.line_num, row, places))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"cannot read arrivals from {path}: {error}") from error


def _row(path: Path, line: int, row: list[str], places: list[int]) -> tuple[datetime, int, int]:
    cells = [row[place].strip() if place < len(row) else "" for place in places]
    try:
        at = datetime.fromisoformat(cells[0])
    except ValueError as error:
        raise UsageError(
            f"{path}, line {line}: {COLUMNS[0]} {cells[0]!r} is no time like 2023-11-16 18:15:46.68"
        ) from error
    lengths = []
    for name, cell in zip(COLUMNS[1:], cells[1:], strict=True):
        if not (cell.isascii() and cell.isdigit()):
            raise UsageError(f"{path}, line {line}: {name} {cell!r} is no whole number of tokens")
        lengths.append(int(cell))
    return at, lengths[0], lengths[1]


def poisson_arrivals(rate: float, requests: int, seed: int = 0) -> list[Arrival]:
    """`requests` arrivals without lengths, on average `rate` of them per second, the first at 0.

    Raises:
        UsageError: a rate that is not above 0, or no requests.
    """
    if not (math.isfinite(rate) and rate > 0):
        raise UsageError(f"the rate must be above 0 requests per second, not {rate:g}")
    if requests < 1:
        raise UsageError(f"there must be at least 1 request, not {requests}")
    drawn = random.Random(seed)
    times = [0.0]
    while len(times) < requests:
        times.append(times[-1] + drawn.expovariate(rate))
    return [Arrival(at_s) for at_s in times]
