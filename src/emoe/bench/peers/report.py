"""A comparison of peers as text."""

from __future__ import annotations

from collections.abc import Sequence

from emoe.bench.peers.entries import LLAMA_PRECISIONS, MemoryLimit
from emoe.bench.peers.results import PeersReport, Ratio, Row, decode_rate, first_prompt, first_token
from emoe.bench.report import share, table
from emoe.bench.results import Spread
from emoe.checkpoint.codecs.formats import NATIVE
from emoe.config import format_bytes

HEAD = (
    "",
    "decode tok/s",
    "of limit",
    "tokens",
    "first token s",
    "of limit",
    "1st prompt s",
    "read/token",
    "read/prompt",
    "peak",
    "cgroup peak",
    "agrees",
)
_SIDE = ("of limit", "times", "best peer")
SUMMARY = ("memory limit", "emoe", "decode tok/s", *_SIDE, "tok/s", "first token s", *_SIDE, "s")


def report_text(report: PeersReport) -> str:
    """A table for each memory limit, the ratios, each row's command, and what could not be measured."""
    lines = _head(report)
    for limit in report.memory_limits:
        lines += _limit(report, limit)
    if any(row.samples for row in report.rows):
        lines += ["Each mode of emoe at its best number of threads beside the best peer of its precision:", ""]
        lines += [*table(_summary(report)), ""]
    lines += [f"{dtype}: {text}" for dtype, text in report.routes.items()]
    lines += [
        f"not measured {row.limit.where}  {row.name}: {row.error}" for row in report.rows if row.error is not None
    ]
    if report.interrupted:
        keep = "; run the same command to go on" if report.settings.out is not None else "; --out FILE would keep it"
        lines.append(f"INTERRUPTED: not every row has {report.settings.rounds} rounds{keep}")
    return "\n".join([*lines, *_legend(report), *_commands(report.rows)])


def _head(report: PeersReport) -> list[str]:
    settings, machine, model = report.settings, report.machine, report.model
    versions = ", ".join(f"{name} {version}" for name, version in sorted(report.versions.items()))
    label = f" ({model['label']})" if model["label"] else ""
    ahead = machine["read_ahead_bytes"]
    before = settings.warmups
    return [
        f"{model['name']}{label}: {model['model_type']}, {model['dtype']}, "
        f"{format_bytes(model['checkpoint_bytes'])}, {model['layers']} layers x "
        f"{model['experts_per_layer']} experts, {model['top_k']} per token",
        f"{machine['cpu']}, {machine['cpus']} CPUs, {format_bytes(machine['memory_bytes'])}; {versions}"
        + (f"; the disk reads ahead {format_bytes(ahead)}" if ahead else ""),
        _cores(report),
        f"{settings.prefill} prompt tokens, then at most {settings.decode} given ones in {settings.decode_s:.0f} s, "
        + (f"after {before} such prompt{'s' * (before > 1)} in the same process; " if before else "in a new process; ")
        + f"{settings.rounds} round{'s' * (settings.rounds > 1)}, one process at a time in turn",
        _rates(report),
        "",
    ]


def _cores(report: PeersReport) -> str:
    """What processes are pinned to, and what that means for threads that read."""
    if report.settings.cores is None:
        return "not pinned to cores: -t N is threads that compute; emoe's and the kernel's helpers may use other cores"
    used = {row.entry.threads: row.entry.cores or () for row in report.rows}
    places = ", ".join(
        f"-t {threads}: core{'s' * (len(cores) > 1)} {','.join(map(str, cores))}"
        + (f" (only {len(cores)} for {threads} threads)" if len(cores) < threads else "")
        for threads, cores in used.items()
    )
    return (
        f"pinned, {places}; whole processes, so emoe's reading threads share those cores with its computing ones, as "
        "mapped files' page faults do in the computing threads of the others"
    )


def _rates(report: PeersReport) -> str:
    if report.unlimited is not None:
        return f"no share of the limit: {report.unlimited}"
    rates = report.rates
    memory = ", ".join(f"{rate / 1e9:.1f} GB/s (-t {threads})" for threads, rate in rates["memory_bytes_per_s"].items())
    disk = rates["disk_direct_bytes_per_s"]
    return f"this machine at best: memory {memory}" + ("" if disk is None else f", disk {disk / 1e9:.2f} GB/s")


def _limit(report: PeersReport, limit: MemoryLimit) -> list[str]:
    rows = [row for row in report.rows if row.limit == limit and row.samples]
    title = "no memory limit"
    if limit.nbytes is not None:
        share_of = limit.nbytes / report.model["checkpoint_bytes"]
        title = (
            f"each process in a memory cgroup of {format_bytes(limit.nbytes)} "
            f"({share_of:.0%} of the checkpoint, page cache included)"
        )
    return [title, "", *(table([HEAD, *(_cells(report, row) for row in rows)]) if rows else ["nothing measured"]), ""]


def _cells(report: PeersReport, row: Row) -> tuple[str, ...]:
    read, difference = row.read_per_token(), report.disagreement(row)
    return (
        row.name,
        _spread(row.values(decode_rate)),
        share(row.limits, "decode"),
        str(row.decoded),
        _spread(row.values(first_token)),
        share(row.limits, "prefill"),
        _spread(row.values(first_prompt)),
        "" if read is None else format_bytes(int(read)),
        _bytes(row.values(lambda sample: float(sample["prefill_storage_bytes"]))),
        "" if row.most_bytes is None else format_bytes(row.most_bytes),
        "" if row.cgroup_peak_bytes is None else format_bytes(row.cgroup_peak_bytes),
        "" if difference is None else f"{difference:.4f}",
    )


def _summary(report: PeersReport) -> list[tuple[str, ...]]:
    """The ratios, two of them in a row: decode and first token of one mode under one limit."""
    found: dict[tuple[MemoryLimit, str, str], list[Ratio]] = {}
    for ratio in report.ratios():
        entry = ratio.emoe.entry
        precision = "" if entry.precision == "native" else f" {entry.precision}"
        found.setdefault((ratio.emoe.limit, entry.how, precision), []).append(ratio)
    rows: list[tuple[str, ...]] = [SUMMARY]
    for (limit, how, precision), (decode, prompt) in found.items():
        rows.append((limit.text, f"{how}{precision}", *_side(decode, "decode"), *_side(prompt, "prefill")))
    return rows


def _side(ratio: Ratio, phase: str) -> tuple[str, ...]:
    threads = f"{ratio.value:.2f} -t {ratio.emoe.entry.threads}"
    if ratio.peer is None or ratio.times is None:
        return (threads, share(ratio.emoe.limits, phase), "", "none measured", "")
    return (
        threads,
        share(ratio.emoe.limits, phase),
        f"{ratio.times:.2f}",
        ratio.peer.name,
        f"{ratio.peer_value:.2f}",
    )


def _legend(report: PeersReport) -> list[str]:
    settings = report.settings
    lines = [
        "-t N: threads (OMP_NUM_THREADS and the engine's own setting); agrees: the greatest difference of a "
        "given token's log-probability from emoe's first row",
    ]
    lossy = [f"{name} beside {LLAMA_PRECISIONS[name].upper()}" for name in settings.expert_dtypes if name != NATIVE]
    lossy += [f"mode {mode}" for mode in settings.modes if mode != "exact"]
    if lossy:
        lines.append(f"LOSSY: {', '.join(lossy)}")
    if report.unlimited is None:
        lines.append(
            "of limit: the least time for the row's own bytes and operations on this machine over the time taken (what "
            "bounds it); an engine that reads more than it needs has a low limit"
        )
    if settings.warmups:
        lines.append("1st prompt: the time to the first token of the first prompt that each process read")
    return lines


def _commands(rows: Sequence[Row]) -> list[str]:
    """Of each row, with the cores it ran on; rows of several limits that are the same are printed once."""
    made = []
    for row in rows:
        cores = "" if row.entry.cores is None else f"taskset -c {','.join(map(str, row.entry.cores))} "
        made.append(f"{row.name}: OMP_NUM_THREADS={row.entry.threads} {cores}{row.entry.command}")
    return list(dict.fromkeys(made))


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    if spread.least == spread.greatest:
        return f"{spread.median:.2f}"
    return f"{spread.median:.2f} ({spread.least:.2f}..{spread.greatest:.2f})"


def _bytes(spread: Spread | None) -> str:
    return "" if spread is None else format_bytes(int(spread.median))
