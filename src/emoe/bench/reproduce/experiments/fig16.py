"""Figure 16: inference time by batch size."""

from __future__ import annotations

from typing import Any

from emoe.bench.reproduce import drawing
from emoe.bench.reproduce.accuracy import because
from emoe.bench.reproduce.experiment import Experiment
from emoe.bench.reproduce.findings import Claim, Finding, Picture, Table
from emoe.bench.reproduce.latency import at_least, at_most
from emoe.bench.reproduce.room import share_resident
from emoe.bench.reproduce.ways import (
    ALL,
    DEMAND,
    MATCHING,
    NEXT_GATE,
    OURS,
    STORES,
    Store,
    about_stores,
    batches,
    fitting,
    in_words,
    middle,
    rotated,
)
from emoe.bench.reproduce.workbench import Workbench

WAYS = (ALL, OURS, DEMAND, NEXT_GATE, MATCHING)
PROMPT = 48
MASKING = "on a small model, choosing other experts in Python is a visible share of a layer."
PAPER = {NEXT_GATE: (2.4, 3.5), MATCHING: (1.25, 1.5)}

Times = dict[tuple[str, Store, int], list[float]]
"""Seconds of a batch by way, store and size, one for each round."""


def run(bench: Workbench) -> Finding:
    """Batches of every size in each way; rounds alternate."""
    ways, missing = fitting(bench, WAYS)
    sizes, new = bench.pick((1, 4, 16), (1, 2, 4, 8, 16)), bench.pick(12, 32)
    keys: list[dict[str, Any]] = [
        {
            "way": way,
            "store": store,
            "batch": size,
            "prompt": PROMPT,
            "new": new,
            "repeats": bench.pick(2, 4),
            "round": turn,
        }
        for turn in range(bench.pick(2, 3))
        for store in STORES
        for size in sizes
        for way in rotated(ways, turn)
    ]
    times: Times = {}
    found = bench.cells("batches", keys, lambda **chosen: batches(bench, **chosen))
    for key, seconds in zip(keys, found, strict=True):
        times.setdefault((key["way"], key["store"], key["batch"]), []).append(sum(seconds) / len(seconds))

    def ratio(way: str, base: str, store: Store = "slowed") -> list[float]:
        return [middle(times[way, store, size]) / middle(times[base, store, size]) for size in sizes]

    text = "eMoE takes about as long as all experts resident, at every batch size"
    if ALL in ways:
        ours, ours_free = ratio(OURS, ALL), ratio(OURS, ALL, "as it is")
        near = at_most(middle(ours), 1.1, 1.3)
        here = f"{spread(ours)} (slowed store), {spread(ours_free)} as it is"
        why = f"Holds up to 1.1x at the median size, partly up to 1.3x: {because(bench, MASKING)}"
        claims = [Claim(text, "about 1x", here, near, "" if near == "holds" else why)]
    else:
        claims = [Claim(text, "about 1x", "", "not measured", " ".join(missing))]
    for way in (NEXT_GATE, MATCHING):
        low, high = PAPER[way]
        slowed, free = ratio(way, OURS), ratio(way, OURS, "as it is")
        verdict = at_least(middle(slowed), low, 1.1)
        claims.append(
            Claim(
                f"{way} takes longer than eMoE",
                f"{low:g}x to {high:g}x",
                f"{spread(slowed)} (slowed store), {spread(free)} as it is",
                verdict,
                "" if verdict == "holds" else f"Holds from {low:g}x on at the median size, partly from 1.1x on.",
            )
        )
    rows = tuple(
        (way, store, size, new, *(round(1e3 * s, 2) for s in (middle(each), min(each), max(each))))
        for (way, store, size), each in sorted(
            times.items(), key=lambda item: (item[0][1], item[0][2], ways.index(item[0][0]))
        )
    )
    columns = ("experts", "store", "batch", "tokens of an answer", "batch ms", "fastest round ms", "slowest round ms")
    table = Table("batches", "Time of a batch", columns, rows)
    caption = (
        f"Seconds of a batch of prompts of {PROMPT} tokens with {new} tokens of answer each, from the fastest to the "
        f"slowest round (shaded), and over that of eMoE. "
        f"{in_words(bench.share)} of the experts kept, except where all are."
    )

    def draw() -> Any:
        figure, axes = drawing.panels(3, width=3.9, height=3.4)
        for ax, store in zip(axes[0][:2], STORES, strict=True):
            curves = {way: [(float(size), middle(times[way, store, size])) for size in sizes] for way in ways}
            limits = {way: [(min(times[way, store, n]), max(times[way, store, n])) for n in sizes] for way in ways}
            drawing.lines(ax, curves, "batch, requests", "seconds of a batch", f"store {store}", spread=limits)
            ax.set_ylim(bottom=0)
        over = {way: list(zip(map(float, sizes), ratio(way, OURS), strict=True)) for way in ways}
        drawing.lines(axes[0][2], over, "batch, requests", "times eMoE's seconds", "store slowed")
        for way, (low, high) in PAPER.items():
            drawing.paper_band(axes[0][2], low, high, f"paper: {low:g}x to {high:g}x, {way}")
        axes[0][2].set_ylim(bottom=0)
        for ax in axes[0]:
            ax.set_xscale("log", base=2)
            ax.set_xticks(sizes, [str(size) for size in sizes])
        drawing.legend(axes[0][0])
        return figure

    return Finding(tuple(claims), (table,), (Picture("batches", caption, draw),), (about_stores(bench), *missing))


def spread(values: list[float]) -> str:
    """The median of ratios, least and greatest."""
    return f"{middle(values):.2f}x ({min(values):.2f} to {max(values):.2f})"


EXPERIMENT = Experiment(
    name="fig16",
    title="Figure 16: inference time by batch size",
    question="Does inference time stay that of all experts resident as batches grow?",
    method=(
        "Batches of prompts of one length are fed given answers with all experts resident, with eMoE (resident mode, "
        "one plan in a round), on demand and with both ways of prefetching; slowed store and store as it is; rounds "
        "alternate."
    ),
    expected="eMoE takes about as long as all experts resident, Pre-gated 2.4 to 3.5x, MoE-Infinity 1.25 to 1.5x.",
    kind="speed",
    needs=(share_resident,),
    minutes=(1, 10),
    run=run,
)
