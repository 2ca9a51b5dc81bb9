"""What a comparison of peers found, as numbers and as text. Plain arithmetic, no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from emoe.bench.peers.entries import Entry, PeersSettings
from emoe.bench.report import table
from emoe.bench.results import Spread
from emoe.config import format_bytes

SCHEMA = "emoe-bench-peers/1"

Measure = Callable[[dict[str, Any]], float]
"""A number of one sample (`feeding.Fed` as a dict)."""


def decode_rate(sample: dict[str, Any]) -> float:
    """Tokens/s after the prompt."""
    return len(sample["step_s"]) / float(sum(sample["step_s"]))


def first_token(sample: dict[str, Any]) -> float:
    """Seconds for the prompt."""
    return float(sample["first_token_s"])


@dataclass(slots=True)
class Row:
    """One entry and a sample for each round it completed."""

    entry: Entry
    loads: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[int, dict[str, Any]] = field(default_factory=dict)
    cgroup_peak_bytes: int | None = None
    still_cached_bytes: int = 0
    error: str | None = None

    @property
    def name(self) -> str:
        """The entry's name."""
        return self.entry.name

    def spread(self, of: Measure) -> Spread | None:
        """Over the rounds; None without any."""
        return Spread.of([of(sample) for sample in self.samples.values()]) if self.samples else None

    @property
    def decoded(self) -> int:
        """Tokens decoded in each round, the least."""
        return min((len(sample["step_s"]) for sample in self.samples.values()), default=0)

    @property
    def peak_bytes(self) -> int | None:
        """The most resident (mapped files count) above the imports; None without a load."""
        loads = [int(load["load_peak_bytes"]) for load in self.loads]
        return max([*loads, *(int(sample["peak_bytes"]) for sample in self.samples.values())], default=None)

    def read_per_token(self) -> float | None:
        """Bytes that decoding fetched from storage, per token."""
        tokens = sum(len(sample["step_s"]) for sample in self.samples.values())
        read = sum(int(sample["decode_storage_bytes"]) for sample in self.samples.values())
        return read / tokens if tokens else None


@dataclass(frozen=True, slots=True)
class Ratio:
    """How one of emoe's rows stands to the best peer of its precision, by medians: above 1 is emoe's favour."""

    emoe: str
    measure: str
    times: float
    peer: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"emoe": self.emoe, "measure": self.measure, "times": self.times, "peer": self.peer}


@dataclass(slots=True)
class PeersReport:
    """A finished run."""

    settings: PeersSettings
    limit_bytes: int | None
    machine: dict[str, Any]
    model: dict[str, Any]
    rows: list[Row]
    versions: dict[str, str]
    routes: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> list[Row]:
        """Rows of emoe that did not complete: peers may fail, emoe must not."""
        return [row for row in self.rows if row.entry.peer == "emoe" and row.error is not None]

    def ratios(self) -> list[Ratio]:
        """Each mode of emoe at its best thread count against the best peer, for each precision and measure."""
        found = []
        done = [row for row in self.rows if row.samples]
        own = {(row.entry.how, row.entry.precision) for row in done if row.entry.peer == "emoe"}
        for how, precision in sorted(own, key=[(r.entry.how, r.entry.precision) for r in done].index):
            alike = [row for row in done if row.entry.precision == precision]
            ours = [row for row in alike if (row.entry.peer, row.entry.how) == ("emoe", how)]
            peers = [row for row in alike if row.entry.peer != "emoe"]
            if not peers:
                continue
            for measure, of, sign in (("decode", decode_rate, 1), ("first token", first_token, -1)):
                best, peer = (max(rows, key=lambda row: sign * _median(row, of)) for rows in (ours, peers))
                times = (_median(best, of) / _median(peer, of)) ** sign
                found.append(Ratio(best.name, measure, times, peer.name))
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
            "memory_limit_bytes": self.limit_bytes,
            "routes": self.routes,
            "rows": [self._row(row) for row in self.rows],
            "ratios": [ratio.as_dict() for ratio in self.ratios()],
        }

    def _row(self, row: Row) -> dict[str, Any]:
        def spread(of: Measure) -> dict[str, float] | None:
            found = row.spread(of)
            return found.as_dict() if found else None

        return {
            "name": row.name,
            "peer": row.entry.peer,
            "how": row.entry.how,
            "precision": row.entry.precision,
            "threads": row.entry.threads,
            "command": row.entry.command,
            "decode_tokens_per_s": spread(decode_rate),
            "decoded_tokens": row.decoded,
            "first_token_s": spread(first_token),
            "load_s": [load["load_s"] for load in row.loads],
            "decode_storage_bytes_per_token": row.read_per_token(),
            "prefill_storage_bytes": spread(lambda sample: float(sample["prefill_storage_bytes"])),
            "peak_bytes": row.peak_bytes,
            "cgroup_peak_bytes": row.cgroup_peak_bytes,
            "still_cached_bytes": row.still_cached_bytes,
            "log_probability_difference": self.disagreement(row),
            "rounds": len(row.samples),
            "samples": [{"round": number, **sample} for number, sample in sorted(row.samples.items())],
            "error": row.error,
        }


def _median(row: Row, of: Measure) -> float:
    found = row.spread(of)
    return found.median if found is not None else float("nan")


HEAD = ("", "decode tok/s", "tokens", "first token s", "read/token", "read/prompt", "peak", "cgroup peak", "agrees")


def report_text(report: PeersReport) -> str:
    """The table, the ratios, each row's command, and what could not be measured."""
    settings, machine = report.settings, report.machine
    limit = (
        "no memory limit"
        if report.limit_bytes is None
        else (
            f"each process in a memory cgroup of {format_bytes(report.limit_bytes)} "
            f"({report.limit_bytes / report.model['checkpoint_bytes']:.0%} of the checkpoint, page cache included)"
        )
    )
    versions = ", ".join(f"{name} {version}" for name, version in sorted(report.versions.items()))
    label = f" ({report.model['label']})" if report.model["label"] else ""
    lines = [
        f"{report.model['name']}{label}: {report.model['model_type']}, {report.model['dtype']}, "
        f"{format_bytes(report.model['checkpoint_bytes'])}, {report.model['layers']} layers x "
        f"{report.model['experts_per_layer']} experts, {report.model['top_k']} per token",
        f"{machine['cpu']}, {machine['cpus']} CPUs, {format_bytes(machine['memory_bytes'])}; {versions}"
        + (f"; the disk reads ahead {format_bytes(ahead)}" if (ahead := machine["read_ahead_bytes"]) else ""),
        f"{settings.prefill} prompt tokens, then at most {settings.decode} given ones in {settings.decode_s:.0f} s; "
        f"{settings.rounds} rounds, one process at a time in turn; {limit}",
        "",
        *table([HEAD, *(_cells(report, row) for row in report.rows if row.samples)]),
        "",
    ]
    lines += [f"{ratio.emoe}: {ratio.measure} {ratio.times:.2f} times {ratio.peer}" for ratio in report.ratios()]
    lines += [f"{dtype}: {text}" for dtype, text in report.routes.items()]
    lines += [f"not measured  {row.name}: {row.error}" for row in report.rows if row.error is not None]
    lines += [
        "",
        "-t N: threads (OMP_NUM_THREADS and the engine's own setting); agrees: the greatest difference of a "
        "given token's log-probability from the first row's",
        *_commands(report.rows),
    ]
    return "\n".join(lines)


def _commands(rows: Sequence[Row]) -> list[str]:
    return [f"{row.name}: OMP_NUM_THREADS={row.entry.threads} {row.entry.command}" for row in rows]


def _cells(report: PeersReport, row: Row) -> tuple[str, ...]:
    read, difference = row.read_per_token(), report.disagreement(row)
    return (
        row.name,
        _spread(row.spread(decode_rate)),
        str(row.decoded),
        _spread(row.spread(first_token)),
        "" if read is None else format_bytes(int(read)),
        _bytes(row.spread(lambda sample: float(sample["prefill_storage_bytes"]))),
        "" if row.peak_bytes is None else format_bytes(row.peak_bytes),
        "" if row.cgroup_peak_bytes is None else format_bytes(row.cgroup_peak_bytes),
        "" if difference is None else f"{difference:.4f}",
    )


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    if spread.least == spread.greatest:
        return f"{spread.median:.2f}"
    return f"{spread.median:.2f} ({spread.least:.2f}..{spread.greatest:.2f})"


def _bytes(spread: Spread | None) -> str:
    return "" if spread is None else format_bytes(int(spread.median))
