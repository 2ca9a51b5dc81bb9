"""What a decode benchmark found: samples of each contender, and what follows from them. Plain arithmetic, no torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from emoe.bench.limits import Limits
from emoe.bench.settings import Contender, DecodeSettings

SCHEMA = "emoe-bench-decode/1"
REPLAY_SCHEMA = "emoe-bench-replay/1"

Measure = Callable[[dict[str, Any]], float]
"""A number of one sample."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and greatest of some rounds."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {"median": self.median, "min": self.least, "max": self.greatest}


@dataclass(slots=True, kw_only=True)
class Measured:
    """What was measured of something that runs in a process of its own: how it loaded, each time, and a sample for each
    round it completed.

    `cgroup_peak_bytes` is what was charged to its memory cgroup, page cache included; `still_cached_bytes` what of its
    files could not be dropped from the page cache; `error` says why it did not complete.
    """

    loads: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[int, dict[str, Any]] = field(default_factory=dict)
    cgroup_peak_bytes: int | None = None
    still_cached_bytes: int = 0
    error: str | None = None

    def values(self, of: Measure) -> Spread | None:
        """`of` each round; None without rounds."""
        return Spread.of([of(sample) for sample in self.samples.values()]) if self.samples else None

    @property
    def load_peak_bytes(self) -> int | None:
        """The most resident while loading, above the imports."""
        return max((int(load["load_peak_bytes"]) for load in self.loads), default=None)

    @property
    def peak_bytes(self) -> int | None:
        """The most resident while generating, above the imports."""
        return max((int(sample["peak_bytes"]) for sample in self.samples.values()), default=None)

    def note_peak(self, cgroup_peak_bytes: int | None) -> None:
        """What a cgroup was charged at most: the greatest stays."""
        if cgroup_peak_bytes is not None:
            self.cgroup_peak_bytes = max(cgroup_peak_bytes, self.cgroup_peak_bytes or 0)

    def note_cached(self, still_cached_bytes: int) -> None:
        """What stayed in the page cache: the greatest stays."""
        self.still_cached_bytes = max(still_cached_bytes, self.still_cached_bytes)


@dataclass(slots=True)
class Outcome(Measured):
    """One contender; its samples are `engines.Sample` as dicts.

    `plan_bytes` is what the planner expects above a process that has only imported its libraries.
    """

    contender: Contender
    plan_bytes: int

    @property
    def name(self) -> str:
        """The contender's name."""
        return self.contender.name

    @property
    def decode_tokens_per_s(self) -> Spread | None:
        """Tokens after the first, over the time they took."""
        return self.values(decode_rate)

    def hit_rate(self, phase: str) -> float | None:
        """Of "prefill" or "decode", over all rounds; None where nothing was counted."""
        hits = sum(sample[phase].get("hits", 0) for sample in self.samples.values())
        misses = sum(sample[phase].get("misses", 0) for sample in self.samples.values())
        return hits / (hits + misses) if hits + misses else None


def decode_rate(sample: dict[str, Any]) -> float:
    """Tokens/s after the first token."""
    return float(decoded_tokens(sample) / sample["decode_s"])


def decoded_tokens(sample: dict[str, Any]) -> int:
    """Tokens after the first, of all sequences."""
    return (len(sample["tokens"]) - 1) * int(sample.get("batch", 1))


@dataclass(slots=True)
class DecodeReport:
    """A finished run."""

    settings: DecodeSettings
    model: dict[str, Any]
    machine: dict[str, Any]
    alternating: bool
    outcomes: list[Outcome]
    versions: dict[str, str]
    threads: list[int]
    planted: dict[str, Any] | None = None
    limits: dict[str, Limits] = field(default_factory=dict)

    def outcome(self, name: str) -> Outcome | None:
        """The contender called `name`."""
        return next((outcome for outcome in self.outcomes if outcome.name == name), None)

    def baseline(self, of: Measure) -> Outcome | None:
        """What ratios of `of` refer to: the contender asked for; else that of transformers' implementations with the
        highest median (one may be the fastest in decoding, another in prefill); else emoe with the most experts."""
        if self.settings.baseline is not None:
            return self.outcome(self.settings.baseline)
        plain = [
            (found.median, -number)
            for number, outcome in enumerate(self.outcomes)
            if outcome.contender.engine == "transformers" and (found := outcome.values(of))
        ]
        return self.outcomes[-max(plain)[1]] if plain else self.reference

    @property
    def reference(self) -> Outcome | None:
        """The first exact contender of emoe: its text is what the others' is held against."""
        return next((o for o in self.outcomes if o.contender.mode == "exact" and o.samples), None)

    def identical_rounds(self, outcome: Outcome) -> int | None:
        """Rounds whose tokens are those of the reference, and in exact mode all bits of all logits where there is a
        checksum of them; None where there is nothing to compare."""
        reference = self.reference
        if reference is None or not outcome.samples:
            return None
        shared = outcome.samples.keys() & reference.samples.keys()
        exact = outcome.contender.mode == "exact"
        return sum(_same(outcome.samples[r], reference.samples[r], exact) for r in shared)

    @property
    def inexact(self) -> list[str]:
        """Exact contenders whose text differs from the reference's: there must be none."""
        return [
            o.name
            for o in self.outcomes
            if o.contender.mode == "exact" and o.samples and self.identical_rounds(o) != len(o.samples)
        ]

    @property
    def failed(self) -> list[Outcome]:
        """Contenders that did not complete."""
        return [outcome for outcome in self.outcomes if outcome.error is not None]

    def ratio(self, outcome: Outcome, of: Measure) -> Spread | None:
        """How many times the baseline's `of`, round by round: what disturbs a whole round then cancels out."""
        baseline = self.baseline(of)
        if baseline is None:
            return None
        shared = sorted(outcome.samples.keys() & baseline.samples.keys())
        if not shared:
            return None
        return Spread.of([of(outcome.samples[r]) / of(baseline.samples[r]) for r in shared])

    def prefill_rate(self, sample: dict[str, Any]) -> float:
        """Prompt tokens/s until the first new token."""
        return float(self.settings.prompt_tokens * self.settings.batch / sample["first_token_s"])

    def as_dict(self) -> dict[str, Any]:
        """For JSON; docs/benchmarks.md explains every field."""
        decode, prefill = self.baseline(decode_rate), self.baseline(self.prefill_rate)
        return {
            "schema": REPLAY_SCHEMA if self.settings.forced else SCHEMA,
            "planted": self.planted,
            "model": self.model,
            "machine": self.machine,
            "versions": self.versions,
            "threads": self.threads,
            "settings": self.settings.as_dict(),
            "alternating": self.alternating,
            "decode_baseline": decode.name if decode else None,
            "prefill_baseline": prefill.name if prefill else None,
            "reference": self.reference.name if self.reference else None,
            "inexact": self.inexact,
            "contenders": [self._contender(outcome) for outcome in self.outcomes],
        }

    def _contender(self, outcome: Outcome) -> dict[str, Any]:
        decode = [sample["decode"] for sample in outcome.samples.values()]
        decoded = sum(decoded_tokens(sample) for sample in outcome.samples.values())

        def spread(of: Measure) -> dict[str, float] | None:
            found = outcome.values(of)
            return found.as_dict() if found else None

        def ratio(of: Measure) -> dict[str, float] | None:
            found = self.ratio(outcome, of)
            return found.as_dict() if found else None

        def per_token(name: str) -> float | None:
            counted = [phase[name] for phase in decode if name in phase]
            return sum(counted) / decoded if counted else None

        return {
            "name": outcome.name,
            **outcome.contender.as_dict(),
            "decode_tokens_per_s": spread(decode_rate),
            "decode_ratio": ratio(decode_rate),
            "decode_cpu_s_per_token": spread(lambda s: float(s["decode_cpu_s"]) / decoded_tokens(s)),
            "first_token_cpu_s": spread(lambda sample: float(sample["first_token_cpu_s"])),
            "first_token_s": spread(lambda sample: float(sample["first_token_s"])),
            "prefill_tokens_per_s": spread(self.prefill_rate),
            "prefill_ratio": ratio(self.prefill_rate),
            "prefill_hit_rate": outcome.hit_rate("prefill"),
            "decode_hit_rate": outcome.hit_rate("decode"),
            "decode_misses_per_token": per_token("misses"),
            "decode_bytes_read_per_token": per_token("bytes_read"),
            "decode_load_wait_s_per_token": per_token("load_wait_s"),
            "roofline": {phase: limit.as_dict() for phase, limit in self.limits.get(outcome.name, {}).items()},
            "checksums": [sample.get("checksum") for _, sample in sorted(outcome.samples.items())],
            "plan_bytes": outcome.plan_bytes,
            "load_peak_bytes": outcome.load_peak_bytes,
            "peak_bytes": outcome.peak_bytes,
            "cgroup_peak_bytes": outcome.cgroup_peak_bytes,
            "still_cached_bytes": outcome.still_cached_bytes,
            "identical_rounds": self.identical_rounds(outcome),
            "rounds": len(outcome.samples),
            "loads": outcome.loads,
            "samples": [{"round": r, **sample} for r, sample in sorted(outcome.samples.items())],
            "error": outcome.error,
        }


def _same(sample: dict[str, Any], other: dict[str, Any], bits: bool) -> bool:
    """The same tokens, and with `bits` the same logits as far as both have a checksum of them."""
    sums = (sample.get("checksum"), other.get("checksum"))
    return bool(sample["tokens"] == other["tokens"]) and not (bits and None not in sums and sums[0] != sums[1])
