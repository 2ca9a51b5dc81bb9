"""A decode report as text."""

from __future__ import annotations

import re

from emoe.bench.limits import Limits
from emoe.bench.plant.card import LABEL, PlantCard
from emoe.bench.results import DecodeReport, Outcome, Spread, decode_rate, decoded_tokens
from emoe.checkpoint.codecs.formats import NATIVE
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
LIMITS = ("of limit: decode", "prefill")
"""Two more columns of a replay."""


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
        f"{_fed(report)}, {settings.rounds} rounds ({how}); {_conditions(report)}",
        *_planted(report),
        "",
        *table(
            [
                HEAD + (LIMITS if report.limits else ()),
                *(_row(report, outcome) + _limits(report, outcome) for outcome in report.outcomes),
            ]
        ),
        "",
        *_legend(report),
    ]
    lines += [f"FAILED  {outcome.error}" for outcome in report.failed]
    if report.inexact:
        what = "the logits differ from those" if settings.forced else "the text differs from that"
        lines.append(
            f"DEFECT  {', '.join(report.inexact)}: {what} of "
            f"{report.reference.name if report.reference else '?'}, and must not. Please report it."
        )
    return "\n".join(lines)


def _fed(report: DecodeReport) -> str:
    settings = report.settings
    if not settings.forced:
        return f"{settings.prompt_tokens} prompt tokens, {settings.new_tokens} new"
    many = f"{settings.batch} sequences: " if settings.batch > 1 else ""
    passes = "" if settings.chunk is None else f" in passes of {settings.chunk}"
    return f"{many}{settings.prompt_tokens} prompt tokens{passes}, then {settings.new_tokens - 1} fed one by one"


def _planted(report: DecodeReport) -> list[str]:
    if report.planted is None:
        return []
    card = report.planted
    return [f"{LABEL} ({card['shape']}, {card['layers']} layers; routes of {card['trace']}: {card['kept']})"]


def _guesses(report: DecodeReport) -> str:
    """How right that router is, where that was planted."""
    if report.planted is None:
        return ""
    return f" (it is {PlantCard.from_dict(report.planted).guesses})"


def _limits(report: DecodeReport, outcome: Outcome) -> tuple[str, ...]:
    """The shares of the least time, with what bounds it."""
    if not report.limits:
        return ()
    found = report.limits.get(outcome.name, {})
    return (share(found, "decode"), share(found, "prefill"))


def share(limits: Limits, phase: str) -> str:
    """The share of the least time of a phase, with what bounds it; nothing where that is not known."""
    return f"{limits[phase].share:.0%} ({limits[phase].floor.bound_by})" if phase in limits else ""


def _conditions(report: DecodeReport) -> str:
    settings = report.settings
    said = []
    if settings.memory_limit is not None:
        said.append(f"each in a memory cgroup of {format_bytes(settings.memory_limit)}")
    if settings.expert_dtype != NATIVE:
        said.append(f"emoe's experts in {settings.expert_dtype} (LOSSY)")
    if settings.embeddings == "disk":
        said.append("emoe's input embedding on disk")
    if settings.predictor is not None:
        said.append(f"emoe loads ahead what {settings.predictor} expects")
    if "next-gate" in settings.prefetches:
        said.append("next-gate loads ahead what the next layer's router would choose" + _guesses(report))
    if settings.history is not None:
        said.append(f"{', '.join(settings.evictions)} where it learns: from {settings.history}")
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
        bits = ", and in exact mode every bit of the logits" if report.settings.forced else ""
        lines.append(f"text: rounds whose tokens are those of {reference.name}{bits}")
        sums = [str(sample.get("checksum")) for _, sample in sorted(reference.samples.items())]
        if report.settings.forced:
            lines.append(f"checksums of {reference.name}'s logits: {' '.join(sums)}")
    if report.limits:
        lines.append(
            "of limit: the least time for the contender's own bytes and operations on this machine over the time taken "
            "(what bounds it)"
        )
    lines += _ahead(report)
    lines += _notes(report)
    for outcome in report.outcomes:
        if outcome.still_cached_bytes:
            lines.append(
                f"{outcome.name}: {format_bytes(outcome.still_cached_bytes)} could not be dropped from the page cache"
            )
    return lines


def _ahead(report: DecodeReport) -> list[str]:
    """What was loaded ahead of need, and how much of it was used: a plan's loads begin while a prompt is read."""
    lines = []
    for outcome in report.outcomes:
        samples = [sample for sample in outcome.samples.values() if "ahead_issued" in sample["decode"]]
        if not samples:
            continue
        phases = [sample[phase] for sample in samples for phase in ("prefill", "decode")]
        issued, used = (sum(phase.get(name, 0) for phase in phases) for name in ("ahead_issued", "ahead_used"))
        said = "nothing was loaded ahead"
        if issued:
            said = f"{issued / len(samples):.3g} loads ahead a round, {used / issued:.0%} used"
        lines.append(f"{outcome.name}: {said}")
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
    decoded = sum(decoded_tokens(sample) for sample in outcome.samples.values())
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


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of equal columns: the first left-aligned, the others right. Every row has as many cells as the first."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines
