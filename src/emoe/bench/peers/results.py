"""What a comparison of peers found, as numbers. Plain arithmetic, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from emoe.bench.limits import Limits
from emoe.bench.peers.entries import Entry, MemoryLimit, PeersSettings
from emoe.bench.results import Measure, Measured

SCHEMA = "emoe-bench-peers/2"


def decode_rate(sample: dict[str, Any]) -> float:
    """Tokens/s after the prompt."""
    return len(sample["step_s"]) / float(sum(sample["step_s"]))


def first_token(sample: dict[str, Any]) -> float:
    """Seconds for the prompt."""
    return float(sample["first_token_s"])


def first_prompt(sample: dict[str, Any]) -> float:
    """Seconds for the first prompt that the process read, the measured one where none came before it."""
    return float(sample.get("first_prompt_s", sample["first_token_s"]))


@dataclass(slots=True)
class Row(Measured):
    """One entry under one memory limit; samples are `feeding.Fed` as dicts, with `first_prompt_s` after warm-ups.

    `limits` are the least times for what it did (`peers.limits`).
    """

    entry: Entry
    limit: MemoryLimit
    limits: Limits = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The entry's name."""
        return self.entry.name

    @property
    def decoded(self) -> int:
        """Tokens decoded in each round, the least."""
        return min((len(sample["step_s"]) for sample in self.samples.values()), default=0)

    @property
    def most_bytes(self) -> int | None:
        """The most resident (mapped files count) above the imports, loading included; None without a load."""
        return max((peak for peak in (self.load_peak_bytes, self.peak_bytes) if peak is not None), default=None)

    def read_per_token(self) -> float | None:
        """Bytes that decoding fetched from storage, per token."""
        tokens = sum(len(sample["step_s"]) for sample in self.samples.values())
        read = sum(int(sample["decode_storage_bytes"]) for sample in self.samples.values())
        return read / tokens if tokens else None


@dataclass(frozen=True, slots=True)
class Ratio:
    """How one of emoe's rows stands to the best peer of its precision under its limit, by medians: above 1 is emoe's
    favour. `peer` None: no peer completed."""

    emoe: Row
    measure: str
    value: float
    peer: Row | None = None
    peer_value: float | None = None
    times: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "memory_limit": self.emoe.limit.text,
            "precision": self.emoe.entry.precision,
            "emoe": self.emoe.name,
            "measure": self.measure,
            "times": self.times,
            "peer": None if self.peer is None else self.peer.name,
            "emoe_median": self.value,
            "peer_median": self.peer_value,
        }


MEASURES: tuple[tuple[str, Measure, int], ...] = (("decode", decode_rate, 1), ("first token", first_token, -1))
"""What is compared, and whether more (1) or less (-1) of it is better."""


@dataclass(slots=True)
class PeersReport:
    """A finished run, or one that was interrupted. `rates` are those of the machine that limits refer to; `unlimited`
    says why there are no limits."""

    settings: PeersSettings
    memory_limits: tuple[MemoryLimit, ...]
    machine: dict[str, Any]
    model: dict[str, Any]
    rows: list[Row]
    versions: dict[str, str]
    routes: dict[str, str] = field(default_factory=dict)
    rates: dict[str, Any] = field(default_factory=dict)
    unlimited: str | None = None
    interrupted: bool = False

    @property
    def failed(self) -> list[Row]:
        """Rows of emoe that did not complete: peers may fail, emoe must not."""
        return [row for row in self.rows if row.entry.peer == "emoe" and row.error is not None]

    def ratios(self) -> list[Ratio]:
        """Under each limit, each mode of emoe at its best thread count against the best peer, for each precision and
        measure."""
        return [ratio for limit in self.memory_limits for ratio in self._ratios(limit)]

    def _ratios(self, limit: MemoryLimit) -> list[Ratio]:
        found = []
        done = [row for row in self.rows if row.samples and row.limit == limit]
        own = dict.fromkeys((row.entry.how, row.entry.precision) for row in done if row.entry.peer == "emoe")
        for how, precision in own:
            alike = [row for row in done if row.entry.precision == precision]
            ours = [row for row in alike if (row.entry.peer, row.entry.how) == ("emoe", how)]
            peers = [row for row in alike if row.entry.peer != "emoe"]
            for measure, of, sign in MEASURES:
                best, value = _best(ours, of, sign)
                if not peers:
                    found.append(Ratio(best, measure, value))
                    continue
                peer, other = _best(peers, of, sign)
                found.append(Ratio(best, measure, value, peer, other, (value / other) ** sign))
        return found

    def disagreement(self, row: Row) -> float | None:
        """The greatest difference of a given token's log-probability from emoe's first exact native row."""
        reference = next((r for r in self.rows if r.entry.peer == "emoe" and r.samples), None)
        if reference is None or not row.samples:
            return None
        differences = [
            abs(a - b)
            for number in row.samples.keys() & reference.samples.keys()
            for a, b in zip(
                row.samples[number]["log_probabilities"], reference.samples[number]["log_probabilities"], strict=False
            )
        ]
        return max(differences, default=None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; docs/benchmarks.md explains every field."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "machine": self.machine,
            "versions": self.versions,
            "settings": self.settings.as_dict(),
            "memory_limits": [{"memory_limit": one.text, "bytes": one.nbytes} for one in self.memory_limits],
            "routes": self.routes,
            "rates": self.rates,
            "no_roofline": self.unlimited,
            "interrupted": self.interrupted,
            "rows": [self._row(row) for row in self.rows],
            "ratios": [ratio.as_dict() for ratio in self.ratios()],
        }

    def _row(self, row: Row) -> dict[str, Any]:
        def spread(of: Measure) -> dict[str, float] | None:
            found = row.values(of)
            return found.as_dict() if found else None

        return {
            "name": row.name,
            "peer": row.entry.peer,
            "how": row.entry.how,
            "precision": row.entry.precision,
            "threads": row.entry.threads,
            "cores": row.entry.cores,
            "memory_limit": row.limit.text,
            "memory_limit_bytes": row.limit.nbytes,
            "command": row.entry.command,
            "decode_tokens_per_s": spread(decode_rate),
            "decoded_tokens": row.decoded,
            "first_token_s": spread(first_token),
            "first_prompt_s": spread(first_prompt),
            "roofline": {phase: limit.as_dict() for phase, limit in row.limits.items()},
            "load_s": [load["load_s"] for load in row.loads],
            "decode_storage_bytes_per_token": row.read_per_token(),
            "prefill_storage_bytes": spread(lambda sample: float(sample["prefill_storage_bytes"])),
            "peak_bytes": row.most_bytes,
            "cgroup_peak_bytes": row.cgroup_peak_bytes,
            "still_cached_bytes": row.still_cached_bytes,
            "log_probability_difference": self.disagreement(row),
            "rounds": len(row.samples),
            "samples": [{"round": number, **sample} for number, sample in sorted(row.samples.items())],
            "error": row.error,
        }


def _best(rows: list[Row], of: Measure, sign: int) -> tuple[Row, float]:
    """The row with the most (sign 1) or least (-1) of it, by medians; each has a sample."""
    medians = [(found.median, row) for row in rows if (found := row.values(of)) is not None]
    value, row = max(medians, key=lambda one: sign * one[0])
    return row, value
