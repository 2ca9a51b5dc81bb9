"""What requests took in several ways, as rows, bars and ratios: Figures 1 and 2 look at the same measurement."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from emoe.bench.reproduce import drawing
from emoe.bench.reproduce.findings import Picture, Table, Verdict
from emoe.bench.reproduce.ways import STORES, Rounds, Store, kept, middle
from emoe.bench.reproduce.workbench import Workbench

COLUMNS = (
    "experts",
    "kept",
    "store",
    "rounds x requests",
    "latency ms",
    "fastest round ms",
    "slowest round ms",
    "computing ms",
    "waiting for loads ms",
    "loaded MiB",
    "experts loaded",
)


def at_least(value: float, holds: float, partly: float) -> Verdict:
    """The verdict on a number that should be large: it holds from `holds` on, partly from `partly` on."""
    return "holds" if value >= holds else "partly" if value >= partly else "does not hold"


def at_most(value: float, holds: float, partly: float) -> Verdict:
    """The verdict on a number that should be small."""
    return at_least(-value, -holds, -partly)


def by_round(found: Rounds, way: str, base: str, judge: Callable[[float], Verdict]) -> tuple[Verdict, str]:
    """The verdict on the latency over that of `base` (slowed store), and how far the rounds are apart.

    Undecided where one round alone would say that the claim holds and another one that it does not.
    """
    pairs = zip(means(found, way, "slowed"), means(found, base, "slowed"), strict=True)
    ratios = sorted(one / other for one, other in pairs)
    verdict = judge(latency(found, way, "slowed") / latency(found, base, "slowed"))
    if {judge(ratios[0]), judge(ratios[-1])} >= {"holds", "does not hold"}:
        verdict = "undecided"
    return verdict, f"Rounds had {ratios[0]:.2f}x to {ratios[-1]:.2f}x."


def means(found: Rounds, way: str, store: Store, name: str = "latency_s") -> list[float]:
    """The mean request of each round."""
    return [statistics.fmean(getattr(one, name) for one in each) for each in found[way, store]]


def latency(found: Rounds, way: str, store: Store) -> float:
    """Seconds of the mean request, so that plans made now and then count; the median round's."""
    return middle(means(found, way, store))


def requests_table(bench: Workbench, found: Rounds, ways: Sequence[str]) -> Table:
    """A row for each way and store: of each round's mean request, the median over the rounds."""
    rows: list[tuple[Any, ...]] = []
    for store in STORES:
        for way in ways:
            each = means(found, way, store)
            counts = (len(each), len(found[way, store][0]))
            parts = {n: middle(means(found, way, store, n)) for n in ("compute_s", "wait_s", "bytes_read", "loads")}
            rows.append(
                (
                    way,
                    kept(bench, way),
                    store,
                    f"{counts[0]} x {counts[1]}",
                    *(round(1e3 * s, 2) for s in (middle(each), min(each), max(each))),
                    round(1e3 * parts["compute_s"], 2),
                    round(1e3 * parts["wait_s"], 2),
                    round(parts["bytes_read"] / 2**20, 2),
                    round(parts["loads"], 1),
                )
            )
    return Table("requests", "What a request takes", COLUMNS, tuple(rows))


def requests_picture(
    found: Rounds, ways: Sequence[str], base: str, paper: Mapping[str, Sequence[float]], what: str
) -> Picture:
    """Parts of the latency in each way (slowed store), and its ratio to that of `base` with both stores.

    paper: the paper's ratios by way; `what`: whose they are, for the legend.
    """

    def draw() -> Any:
        figure, axes = drawing.panels(2, width=4.6, height=3.4)
        left, right = axes[0]
        at = range(len(ways))
        parts = {
            "computing": [1e3 * middle(means(found, way, "slowed", "compute_s")) for way in ways],
            "waiting for loads": [1e3 * middle(means(found, way, "slowed", "wait_s")) for way in ways],
        }
        below = [0.0] * len(ways)
        for number, (name, heights) in enumerate(parts.items()):
            style = {"color": drawing.COLOURS[number], "hatch": drawing.HATCHES[number], "edgecolor": "white"}
            left.bar(at, heights, 0.6, bottom=below, label=name, linewidth=0.5, **style)
            below = [a + b for a, b in zip(below, heights, strict=True)]
        low_high = [(1e3 * min(each), 1e3 * max(each)) for each in (means(found, way, "slowed") for way in ways)]
        tops = [1e3 * latency(found, way, "slowed") for way in ways]
        errors = [[max(0.0, t - a) for t, (a, _) in zip(tops, low_high, strict=True)]]
        errors.append([max(0.0, b - t) for t, (_, b) in zip(tops, low_high, strict=True)])
        left.errorbar(at, tops, yerr=errors, fmt="none", ecolor="black", elinewidth=0.9, capsize=3)
        left.set_xticks(at, [wrapped(way) for way in ways])
        drawing.finish(left, "", "milliseconds of a request", "slowed store")
        drawing.legend(left)
        series = {
            f"store {store}": [latency(found, way, store) / latency(found, base, store) for way in ways]
            for store in STORES
        }
        drawing.bars(right, [wrapped(way) for way in ways], series, f"times the latency of {base}")
        right.set_xticks(at, [wrapped(way) for way in ways], rotation=0)
        points = [(ways.index(way), value) for way, values in paper.items() for value in values]
        drawing.paper_points(right, points, what)
        drawing.legend(right)
        for ax in (left, right):
            ax.tick_params(axis="x", labelsize=7)
        return figure

    caption = (
        f"Left: a request's latency with the slowed store and what of it was waiting for loads; lines from the fastest "
        f"to the slowest round. Right: latency over that of {base}, with both stores; stars: {what}."
    )
    return Picture("requests", caption, draw)


def wrapped(name: str) -> str:
    """In lines of about a dozen letters."""
    lines = [""]
    for word in name.replace("Infinity-", "Infinity- ").split():
        if lines[-1] and len(lines[-1]) + len(word) > 12:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
