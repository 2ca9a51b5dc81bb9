"""Measuring an engine that is fed given tokens: every engine then does the same work on the same routes.

Only the standard library is used: a process that has no torch measures itself with this too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from emoe.bench.process import memory, reset_peak, storage_bytes_read

Counters = dict[str, float]
Logits = TypeVar("Logits")


@dataclass(frozen=True, slots=True)
class Fed:
    """One measured feeding. Times in seconds, `peak_bytes` resident above what the process held before the engine.

    `step_s` has one entry for each token that was fed after the prompt, `log_probabilities` one for each that was
    looked up, which may be one more. The `storage_bytes` are what the kernel fetched from storage in each phase.
    """

    first_token_s: float
    step_s: list[float]
    log_probabilities: list[float]
    prefill_storage_bytes: int
    decode_storage_bytes: int
    peak_bytes: int
    prefill: Counters = field(default_factory=dict)
    decode: Counters = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def feed(
    passes: Iterator[Logits],
    forced: Sequence[int],
    log_probability: Callable[[Logits, int], float],
    *,
    seconds: float,
    counters: Callable[[], Counters] = dict,
    base_bytes: int = 0,
) -> Fed:
    """Measure `passes` until they end or `seconds` of decoding have passed.

    Args:
        passes: each `next` does one pass and gives what is known of the token behind it: the first reads the prompt,
            each other one of `forced`.
        forced: the tokens after the prompt.
        log_probability: of a token, by what a pass gave. Called outside the measured time.
        seconds: of decoding.
        counters: what the engine has counted so far.
        base_bytes: what the process held before the engine was there.
    """
    reset_peak()
    before, read, start = counters(), storage_bytes_read(), time.perf_counter()
    logits = next(passes)
    first_token_s = time.perf_counter() - start
    first, first_read = counters(), storage_bytes_read()
    looked_up: list[float] = []
    step_s: list[float] = []
    for token in forced:
        looked_up.append(log_probability(logits, token))
        if sum(step_s) > seconds:
            break
        begin = time.perf_counter()
        logits = next(passes)
        step_s.append(time.perf_counter() - begin)
    after = counters()
    return Fed(
        first_token_s=first_token_s,
        step_s=step_s,
        log_probabilities=looked_up,
        prefill_storage_bytes=first_read - read,
        decode_storage_bytes=storage_bytes_read() - first_read,
        peak_bytes=memory().peak_bytes - base_bytes,
        prefill={name: first[name] - before[name] for name in before},
        decode={name: after[name] - first[name] for name in before},
    )
