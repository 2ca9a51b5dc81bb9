"""Figure 9: do prompts that are far apart still choose the same experts?"""

from __future__ import annotations

from typing import Any

import numpy as np

from emoe.bench.reproduce import correlation as of
from emoe.bench.reproduce import drawing
from emoe.bench.reproduce.experiment import Experiment
from emoe.bench.reproduce.findings import Claim, Finding, Picture, Table, Verdict
from emoe.bench.reproduce.needs import pairs
from emoe.bench.reproduce.sources import Source, by_task, mixed, sources
from emoe.bench.reproduce.workbench import Workbench

PAPER = (0.48, 0.55)
REACH = 20
FURTHER = (25, 30, 40, 50, 60, 80, 100)
NEEDED = 0.9 * PAPER[0]
FALL = PAPER[1] - PAPER[0]
CURVES = ("task by task", "mixed tasks", "popularity alone", "no preference")

Curves = dict[str, dict[int, tuple[float, float]]]
"""By curve and distance: r and c, means over layers and pairs of prompts."""


def run(bench: Workbench) -> Finding:
    """r and c of prompts 1 to 20 apart and further, in two orders, and of prompts made up."""
    found = {source.name: _curves(source, bench.settings.seed) for source in sources(bench)}
    columns = ("routes", "prompts", "apart", "r", "c")
    rows = tuple(
        (name, curve, distance, round(r, 4), round(c, 4))
        for name, curves in found.items()
        for curve, values in curves.items()
        for distance, (r, c) in values.items()
    )

    def draw() -> Any:
        figure, axes = drawing.panels(len(found), 2, width=4.4, height=2.9)
        for column, (name, curves) in enumerate(found.items()):
            for number, text in enumerate(("r", "c (means not subtracted)")):
                ax = axes[number, column]
                ax.fill_between((1, REACH), *PAPER, color=drawing.PAPER, alpha=0.15, linewidth=0, label="paper")
                points = {curve: [(d, both[number]) for d, both in values.items()] for curve, values in curves.items()}
                drawing.lines(ax, points, "prompts apart", text, name)
                ax.set_ylim(min(-0.1, ax.get_ylim()[0]), 1.02)
        drawing.shared_legend(figure)
        return figure

    caption = (
        "Cross-correlation of prompts by how far they are apart, in two orders; shaded: the paper's, 1 to 20 apart."
    )
    note = (
        "With tasks mixed at random, any two prompts are alike, so distance cannot matter: that curve is flat "
        "by construction, and its height is what experts are popular with everybody. Task by task, prompts far "
        "apart are of other tasks. Popularity alone and no preference: as in Figure 8."
    )
    table = Table("distance", "Means over layers and pairs of prompts", columns, rows, shown=False)
    claims = tuple(_claim(name, curves) for name, curves in found.items())
    return Finding(claims, (table,), (Picture("distance", caption, draw),), (note,))


def _curves(source: Source, seed: int) -> Curves:
    counts, rng = source.score.counts(), np.random.default_rng(seed)
    orders = {
        CURVES[0]: counts[by_task(source.score, seed)],
        CURVES[1]: counts[mixed(source.score, seed)],
        CURVES[2]: of.independent(counts, rng),
        CURVES[3]: of.without_preference(counts, rng),
    }
    # Further than half of the prompts apart, the few pairs that are left say little.
    distances = [distance for distance in (*range(1, REACH + 1), *FURTHER) if distance <= max(1, len(counts) // 2)]
    return {
        name: {d: (of.mean(of.apart(rows, d)), of.mean(of.apart(rows, d, of.uncentred))) for d in distances}
        for name, rows in orders.items()
    }


def _claim(name: str, curves: Curves) -> Claim:
    text = f"prompts up to 20 apart choose as alike as neighbours ({name})"
    paper = "0.48 to 0.55 from 1 to 20 apart"
    ordered, shuffled = ([r for d, (r, _) in curves[curve].items() if d <= REACH] for curve in CURVES[:2])
    lowest, highest = min(shuffled), max(shuffled)
    here = f"r {lowest:.2f} to {highest:.2f} with tasks mixed; task by task {ordered[0]:.2f} to {ordered[-1]:.2f}"
    if len(shuffled) < REACH:
        return Claim(
            text, paper, here, "not measured", f"{len(shuffled)} prompts apart is the most that can be measured."
        )
    flat = highest - lowest <= FALL
    high = lowest >= NEEDED
    verdict: Verdict = "holds" if flat and high else "partly" if flat else "does not hold"
    reasons = {
        "holds": "",
        "partly": f"It is as flat, but lower than 0.9 x {PAPER[0]}. ",
        "does not hold": "It changes with the distance. ",
    }
    c, nothing = curves[CURVES[1]][REACH][1], curves[CURVES[3]][REACH][1]
    return Claim(
        text,
        paper,
        here,
        verdict,
        f"{reasons[verdict]}Means not subtracted: c {c:.2f} at {REACH} apart, but routing without any preference has "
        f"{nothing:.2f}.",
    )


EXPERIMENT = Experiment(
    name="fig9",
    title="Figure 9: prompts further apart",
    question="Does one prompt say which experts later prompts use, and how far does that reach?",
    method=f"{of.METHOD} Averaged over layers and pairs of prompts 1 to 20 and up to 100 apart, in random order "
    "(tasks mixed) and task by task. The claim holds if, with tasks mixed, r varies by no more than the "
    "paper's 0.07 over 1 to 20 and is never below 0.9 x 0.48; partly if it is only as flat.",
    expected="0.48 to 0.55 for prompts 1 to 20 apart.",
    kind="routing",
    minutes=(0.2, 0.5),
    run=run,
    needs=(pairs,),
)
