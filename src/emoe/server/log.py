"""The status line: what the server does, while it does something."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from emoe.engine.interface import EngineStats

LOGGER = logging.getLogger("emoe.server")


@dataclass(frozen=True, slots=True)
class Reading:
    """The engine's counters at a moment, and targets met so far of those asked for."""

    at_s: float
    stats: EngineStats
    slo_met: int
    slo_asked: int


def status_line(before: Reading, now: Reading) -> str | None:
    """What happened between two readings; None when nothing did."""
    a, b = before.stats, now.stats
    seconds = max(now.at_s - before.at_s, 1e-9)
    read, written = b.prompt_tokens - a.prompt_tokens, b.generation_tokens - a.generation_tokens
    if not (b.running or b.waiting or read or written):
        return None
    parts = [
        f"{b.running} running, {b.waiting} waiting",
        f"{read / seconds:.1f} tokens/s in, {written / seconds:.1f} out",
        f"KV {b.kv_tokens_used / b.kv_tokens if b.kv_tokens else 0:.0%}",
    ]
    hits = sum(b.hits.values()) - sum(a.hits.values())
    wanted = hits + sum(b.misses.values()) - sum(a.misses.values())
    if wanted:
        parts.append(
            f"experts {hits / wanted:.1%} hits, {(b.bytes_loaded - a.bytes_loaded) / (1 << 20):.1f} MiB loaded"
        )
    asked = now.slo_asked - before.slo_asked
    if asked:
        parts.append(f"targets met {now.slo_met - before.slo_met} of {asked}")
    if b.preemptions > a.preemptions:
        parts.append(f"{b.preemptions - a.preemptions} preempted")
    return "; ".join(parts)


async def log_status(read: Callable[[], tuple[EngineStats, int, int]], interval_s: float) -> None:
    """Log a status line every `interval_s` seconds, until cancelled."""

    def reading() -> Reading:
        return Reading(time.monotonic(), *read())

    before = reading()
    while True:
        await asyncio.sleep(interval_s)
        now = reading()
        line = status_line(before, now)
        if line is not None:
            LOGGER.info(line)
        before = now
