"""Figure 10: for how many prompts do one prompt's experts serve?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from emoe.bench.reproduce import drawing
from emoe.bench.reproduce.accuracy import Judged, because, notes, rounded
from emoe.bench.reproduce.experiment import Experiment
from emoe.bench.reproduce.findings import Claim, Finding, Picture, Table
from emoe.bench.reproduce.judging import FULL, Order, Texts, Way, judged
from emoe.bench.reproduce.needs import references
from emoe.bench.reproduce.room import sixty_resident
from emoe.bench.reproduce.workbench import Workbench

PAPER_P = (0, 20, 40, 60, 80)
COARSE_P = (0, 4, 8, 16)
"""Where there are too few prompts for the paper's: the largest p should be reached twice."""
MEMORY = "60%"
UNKNOWN = 0.25
"""Perplexity of a model that knows nothing of the texts, over the size of its vocabulary."""
FLAT = 1.05
"""A perplexity within 5 % of that at p = 0 is called flat."""
WHY = (
    "most of the loss comes before p = 20: experts that one prompt used do not serve the next ones, since emoe-nano "
    "has experts for each task. The paper's models have few experts, which serve every task."
)
OWN, ASKED = "own routes", "task-popularity"
ORDERS: tuple[tuple[Order, str], ...] = (("shuffled", "tasks shuffled"), ("blocks", "one task after another"))


def run(bench: Workbench) -> Finding:
    """The references' perplexity for every p, in both orders, by what chooses the experts."""
    most = bench.pick(4, 50)
    count = min(len(bench.prompts["score"]), most * len(bench.tasks))
    points = PAPER_P if count >= 2 * PAPER_P[-1] else COARSE_P
    grid = [(order, name, p) for order, _ in ORDERS for name in (OWN, ASKED) for p in points]
    texts = {order: Texts("references", most, bench.pick(12, 16), order) for order, _ in ORDERS}
    ways = [
        (texts[order], Way(None if name == OWN else "task-popularity", max(p, 1)), MEMORY) for order, name, p in grid
    ]
    full, *found = judged(bench, [(texts["shuffled"], FULL, None), *ways])
    base = full.perplexity() or 0.0
    by = dict(zip(grid, found, strict=True))
    rows = tuple(
        (
            order,
            name,
            p,
            rounded(each.perplexity(), 3),
            each.stats.get("plans"),
            rounded(each.stats.get("rerouted_share"), 4),
        )
        for (order, name, p), each in by.items()
    )
    columns = ("order of tasks", "experts chosen by", "p", "perplexity", "plans", "share of routes redirected")
    table = Table("perplexity", f"Perplexity of the references; every expert resident: {base:.3f}", columns, rows)

    def draw() -> Any:
        figure, axes = drawing.panels(len(ORDERS), width=4.4)
        for ax, (order, title) in zip(axes[0], ORDERS, strict=True):
            curves = {
                name: [(p, value) for p in points if (value := by[order, name, p].perplexity()) is not None]
                for name in (OWN, ASKED)
            }
            drawing.lines(ax, curves, "p (prompts from one plan to the next)", "perplexity", title)
            ax.axhline(base, color="#555555", linewidth=1, label="every expert resident")
            if 40 in points:
                ax.axvline(40, color=drawing.PAPER, linestyle=(0, (5, 2)), linewidth=1.1, label="the paper's p = 40")
            ax.set_ylim(bottom=0)
            ax.set_xticks(points)
        drawing.legend(axes[0][0])
        return figure

    caption = (
        f"Perplexity of the references with {MEMORY} of the experts resident against p. The paper: flat to p = 40, "
        "rising from p = 60."
    )
    claims = tuple(_claim(by, order, title, points, because(bench, WHY)) for order, title in ORDERS)
    vocabulary = bench.vocabulary
    if base > UNKNOWN * vocabulary:
        why = (
            f"with every expert resident the references have a perplexity of {base:,.0f}, of {vocabulary:,} tokens in "
            f"all: the model does not know these texts, and no choice of experts can lose what is not there."
        )
        claims = tuple(replace(claim, verdict="not measured", why=why) for claim in claims)
    return Finding(claims, (table,), (Picture("perplexity", caption, draw),), notes(bench, found)[1:])


def _claim(by: dict[Any, Judged], order: str, title: str, points: tuple[int, ...], why: str) -> Claim:
    """Flat at 20 and 40 within `FLAT`, higher at 60: the curve of one prompt's own routes, as the paper has it."""
    values = {p: by[order, OWN, p].perplexity() or 0.0 for p in points}
    here = ", ".join(f"p = {p}: {value:.2f}" for p, value in values.items())
    text = f"one prompt's experts serve the next 40 ({title})"
    paper = "perplexity flat to p = 40, rises from 60"
    if points != PAPER_P:
        few = "too few prompts for p = 40 to be reached twice: give --prompts with more, and leave --quick out."
        return Claim(text, paper, here, "not measured", few)
    flat = [values[p] <= FLAT * values[0] for p in (20, 40)]
    rises = values[60] > FLAT * max(values[20], values[40])
    if all(flat) and rises:
        return Claim(text, paper, here, "holds")
    if any(flat):
        return Claim(text, paper, here, "partly", "only part of the curve has the paper's shape.")
    return Claim(text, paper, here, "does not hold", why)


EXPERIMENT = Experiment(
    name="fig10",
    title="Figure 10: perplexity against p",
    question="For how many prompts can the experts that were chosen for one prompt stay?",
    method=f"Mode resident with {MEMORY} of the experts. At every p-th prompt a plan is made: from that prompt's own "
    "routes (the paper's measurement) or by Equation 2 from task-popularity. References are fed token by token; "
    "p = 0 is a plan for every prompt. Prompts come with their tasks shuffled, and one task after another.",
    expected="Perplexity is flat for p = 20 and 40, and rises from p = 60; p = 40 is the paper's default.",
    kind="quality",
    minutes=(1.5, 12),
    run=run,
    needs=(
        references,
        sixty_resident,
    ),
)
