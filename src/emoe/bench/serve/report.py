"""A load's report as text, in the style of vLLM's `bench serve`."""

from __future__ import annotations

from emoe.bench.serve.results import MEASURES, LoadReport, Spread, Summary
from emoe.bench.serve.targets import Targets

WIDTH = 50
LATE_S = 0.01
"""A generator that is later than this at the 99th percentile is said to be late: then it has measured itself."""


def report_text(report: LoadReport) -> str:
    """The tables, and what a reader should know."""
    whole = report.summary()
    lines = [
        f"{' Serving Benchmark Result ':=^{WIDTH}}",
        _line("Successful requests:", str(whole.successful)),
        _line("Failed requests:", str(whole.requests - whole.successful)),
        _line("Benchmark duration (s):", f"{whole.duration_s:.2f}"),
        _line("Total input tokens:", str(whole.input_tokens)),
        _line("Total generated tokens:", str(whole.output_tokens)),
        _line("Request throughput (req/s):", f"{whole.per_s(whole.successful):.2f}"),
        _line("Request goodput (req/s):", f"{whole.goodput:.2f}"),
        _line("Requests that met their targets (%):", f"{whole.met_share:.1%}".removesuffix("%")),
        _line("Output token throughput (tok/s):", f"{whole.per_s(whole.output_tokens):.2f}"),
        _line("Total Token throughput (tok/s):", f"{whole.per_s(whole.input_tokens + whole.output_tokens):.2f}"),
    ]
    for name, title in MEASURES.items():
        lines += [f"{title:-^{WIDTH}}", *_spread(name.upper(), whole.spreads[name])]
    lines += ["=" * WIDTH, "", *_tasks(report, whole)]
    if report.errors():
        lines += ["", "errors:"]
        lines += [f"  {count:5d}  {name}: {text}".rstrip(": ") for name, (count, text) in report.errors().items()]
    return "\n".join([*lines, "", *_notes(report)])


def _line(what: str, value: str) -> str:
    return f"{what:<39} {value:>10}"


def _spread(name: str, spread: Spread | None) -> list[str]:
    rows = (("Mean", "mean"), ("Median", "median"), ("P99", "p99"))
    return [
        _line(f"{title} {name} (ms):", "-" if spread is None else f"{getattr(spread, field) * 1e3:.2f}")
        for title, field in rows
    ]


def _tasks(report: LoadReport, whole: Summary) -> list[str]:
    """A row for each task: how many, how many kept their targets, and the latencies."""
    head = ("task", "sent", "ok", "met", "goodput/s", "TTFT ms", "p99", "TPOT ms", "p99", "E2EL ms", "p99", "targets")
    rows: list[tuple[str, ...]] = [head]
    for task in report.tasks:
        rows.append(_row(task or "(none)", report.of_task(task), report.book.of(task)))
    if len(report.tasks) > 1:
        rows.append(_row("all", whole, None))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if i in {0, len(head) - 1} else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _row(name: str, found: Summary, targets: Targets | None) -> tuple[str, ...]:
    cells = [name, str(found.requests), str(found.successful), f"{found.met_share:.0%}", f"{found.goodput:.3f}"]
    for measure in ("ttft", "tpot", "e2el"):
        spread = found.spreads[measure]
        cells += ["-", "-"] if spread is None else [f"{spread.mean * 1e3:.1f}", f"{spread.p99 * 1e3:.1f}"]
    cells.append("" if targets is None else _targets(targets))
    return tuple(cells)


def _targets(targets: Targets) -> str:
    return "/".join("-" if value is None else f"{value * 1e3:.0f}" for value in (targets.ttft_s, targets.tpot_s))


def _notes(report: LoadReport) -> list[str]:
    lines = ["met: of all that were sent, whole answers within both targets (ms, first token / each later one)"]
    lines += report.notes
    late = report.late()
    if late is not None:
        warning = "; that is too late: use a faster or quieter machine" if late.p99 > LATE_S else ""
        if warning and report.settings.concurrency is not None:
            warning = f"; --concurrency {report.settings.concurrency} holds requests back"
        lines.append(
            f"sent later than planned: mean {late.mean * 1e3:.2f} ms, p99 {late.p99 * 1e3:.2f} ms{warning}; latencies "
            "count from sending"
        )
    if report.interrupted:
        lines.append(f"INTERRUPTED after {len(report.records)} of {report.planned} requests")
    return lines
