"""A decode report as text."""

from __future__ import annotations

import re

from emoe.bench.results import DecodeReport, Outcome, Spread, decode_rate
from emoe.config import format_bytes

_NUMBER = re.compile(r"\d+(\.\d+)?( [KMG]iB)?")

HEAD = (
    "",
    "decode tok/s",
    "times",
    "first token s",
    "prefill tok/s",
    "times",
    "hits",
    "read/token",
    "peak",
    "plan",
    "text",
)


def report_text(report: DecodeReport) -> str:
    """The table, what it was measured on, and what went wrong."""
    machine, settings = report.machine, report.settings
    versions = ", ".join(f"{name} {version}" for name, version in sorted(report.versions.items()))
    threads = "/".join(map(str, report.threads)) or "?"
    how = "alternating, all loaded" if report.alternating else "one process at a time"
    lines = [
        f"{report.model['name']}: {report.model['description']}",
        f"{machine['cpu']}, {machine['cpus']} CPUs, {format_bytes(machine['memory_bytes'])}; {threads} threads; "
        f"{versions}",
        f"{settings.prompt_tokens} prompt tokens, {settings.new_tokens} new, {settings.rounds} rounds ({how}); "
        f"{_conditions(report)}",
        "",
        *_table([HEAD, *(_row(report, outcome) for outcome in report.outcomes)]),
        "",
        *_legend(report),
    ]
    lines += [f"FAILED  {outcome.error}" for outcome in report.failed]
    if report.inexact:
        lines.append(
            f"DEFECT  {', '.join(report.inexact)}: the text differs from that of "
            f"{report.reference.name if report.reference else '?'}, and must not. Please report it."
        )
    return "\n".join(lines)


def _conditions(report: DecodeReport) -> str:
    settings = report.settings
    said = []
    if settings.memory_limit is not None:
        said.append(f"each in a memory cgroup of {format_bytes(settings.memory_limit)}")
    said.append("page cache dropped before every generation" if settings.cold else "page cache as it comes")
    return ", ".join(said)


def _legend(report: DecodeReport) -> list[str]:
    decode, prefill = report.baseline(decode_rate), report.baseline(report.prefill_rate)
    reference = report.reference
    lines = []
    if decode is not None and prefill is not None:
        against = decode.name if decode is prefill else f"{decode.name} (decode), {prefill.name} (prefill)"
        lines.append(f"times: against {against}, median of the rounds' ratios; (least..greatest) of the rounds")
    lines.append(
        "hits, read/token: of decoding; peak: resident above the imports while loading / generating; plan: what "
        "`emoe plan` expects there"
    )
    if reference is not None:
        lines.append(f"text: rounds whose tokens are those of {reference.name}")
    lines += _notes(report)
    for outcome in report.outcomes:
        if outcome.still_cached_bytes:
            lines.append(
                f"{outcome.name}: {format_bytes(outcome.still_cached_bytes)} could not be dropped from the page cache"
            )
    return lines


def _notes(report: DecodeReport) -> list[str]:
    """What contenders said of themselves; notes alike but for numbers share a line, with the first one's."""
    groups: dict[str, tuple[str, list[str]]] = {}
    for outcome in report.outcomes:
        for note in dict.fromkeys(note for load in outcome.loads for note in load["notes"]):
            groups.setdefault(_NUMBER.sub("#", note), (note, []))[1].append(outcome.name)
    return [f"{', '.join(names)}: {note}" for note, names in groups.values()]


def _row(report: DecodeReport, outcome: Outcome) -> tuple[str, ...]:
    hits = outcome.hit_rate("decode")
    decoded = sum(len(sample["tokens"]) - 1 for sample in outcome.samples.values())
    read = sum(_read(sample) for sample in outcome.samples.values())
    peaks = (outcome.load_peak_bytes, outcome.peak_bytes)
    identical = report.identical_rounds(outcome)
    return (
        outcome.name,
        _spread(outcome.decode_tokens_per_s),
        _times(report.ratio(outcome, decode_rate)),
        _median(outcome.values(lambda sample: float(sample["first_token_s"]))),
        _spread(outcome.values(report.prefill_rate), digits=0),
        _times(report.ratio(outcome, report.prefill_rate)),
        "" if hits is None else f"{hits:.1%}",
        format_bytes(int(read / decoded)) if decoded else "",
        " / ".join("-" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks) + " MiB",
        f"{outcome.plan_bytes / 2**20:.0f} MiB",
        "" if identical is None else f"{identical}/{len(outcome.samples)}",
    )


def _read(sample: dict[str, object]) -> float:
    """Bytes of experts read while decoding, as far as the engine counts them."""
    counted = sample["decode"]
    return float(counted.get("bytes_read", 0)) if isinstance(counted, dict) else 0.0


def _spread(spread: Spread | None, digits: int = 2) -> str:
    if spread is None:
        return "-"
    return f"{spread.median:.{digits}f} ({spread.least:.{digits}f}..{spread.greatest:.{digits}f})"


def _median(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.median:.2f}"


def _times(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.2f}"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines
