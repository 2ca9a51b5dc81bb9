"""Figure 8: do consecutive prompts choose the same experts?"""

from __future__ import annotations

from typing import Any

import numpy as np

from emoe.bench.reproduce import correlation as of
from emoe.bench.reproduce import drawing
from emoe.bench.reproduce.experiment import Experiment
from emoe.bench.reproduce.findings import Claim, Finding, Picture, Table
from emoe.bench.reproduce.needs import pairs
from emoe.bench.reproduce.sources import Source, by_task, mixed, sources
from emoe.bench.reproduce.workbench import Workbench

PAPER = {"OpenMoE": (0.4, 0.6), "Mixtral": (0.75, 0.95)}
NEEDED = 0.9 * PAPER["OpenMoE"][0]
CURVES = ("same task", "mixed tasks", "popularity alone", "no preference")
SPECIAL = tuple(f"{name}, less popularity" for name in CURVES[:2])
MEASURES: dict[str, of.Measure] = {"r": of.correlation, "c": of.uncentred}


def run(bench: Workbench) -> Finding:
    """r and c of neighbours in two orders, and what popularity alone would give."""
    found = {source.name: _curves(source, bench.settings.seed) for source in sources(bench)}
    rows, summary = [], []
    for name, curves in found.items():
        for (measure, curve), values in curves.items():
            rows += [(name, measure, curve, layer, round(of.mean(v), 4)) for layer, v in enumerate(values.T)]
            summary.append((name, measure, curve, round(of.mean(values), 3), round(of.standard_error(values), 4)))

    def draw() -> Any:
        figure, axes = drawing.panels(len(found), 2, width=4.4, height=2.9)
        for column, (name, curves) in enumerate(found.items()):
            for ax, (measure, text) in zip(
                axes[:, column], (("r", "r"), ("c", "c (means not subtracted)")), strict=True
            ):
                for model, (low, high) in PAPER.items():
                    drawing.paper_band(ax, low, high, f"paper, {model}")
                means = {
                    curve: [(layer, of.mean(v)) for layer, v in enumerate(values.T)]
                    for (kind, curve), values in curves.items()
                    if kind == measure
                }
                drawing.lines(ax, means, "MoE layer, from the input", text, name)
                ax.set_ylim(min(-0.1, ax.get_ylim()[0]), 1.02)
        drawing.shared_legend(figure)
        return figure

    caption = (
        "Cross-correlation of consecutive prompts' expert counts by layer, in two orders; the paper's ranges shaded."
    )
    means = Table(
        "consecutive",
        "Means over layers and pairs",
        ("routes", "measure", "prompts", "mean", "standard error"),
        tuple(summary),
    )
    layers = Table("by-layer", "By layer", ("routes", "measure", "prompts", "layer", "mean"), tuple(rows), shown=False)
    note = (
        "Popularity alone: prompts of the same lengths whose tokens are drawn from each layer's overall "
        "popularity. No preference: drawn equally from all experts. Less popularity: each prompt's shares less "
        "the mean share over all prompts, so only what the prompt itself prefers counts."
    )
    claims = tuple(_claim(name, curves) for name, curves in found.items())
    return Finding(claims, (means, layers), (Picture("consecutive", caption, draw),), (note,))


def _curves(source: Source, seed: int) -> dict[tuple[str, str], Any]:
    """[pairs, layers] by measure and curve."""
    counts, task, rng = source.score.counts(), source.score.task, np.random.default_rng(seed)
    together, shuffled = by_task(source.score, seed), mixed(source.score, seed)
    alike = task[together][:-1] == task[together][1:]
    drawn = of.independent(counts, rng), of.without_preference(counts, rng)
    special = of.beyond_popularity(counts)
    found = {}
    for name, measure in MEASURES.items():
        found[name, CURVES[0]] = of.apart(counts[together], 1, measure)[alike]
        found[name, CURVES[1]] = of.apart(counts[shuffled], 1, measure)
        found[name, CURVES[2]] = of.apart(drawn[0], 1, measure)
        found[name, CURVES[3]] = of.apart(drawn[1], 1, measure)
    found["r", SPECIAL[0]] = of.apart(special[together], 1)[alike]
    found["r", SPECIAL[1]] = of.apart(special[shuffled], 1)
    return found


def _claim(name: str, curves: dict[tuple[str, str], Any]) -> Claim:
    same, neighbours, popular = (of.mean(curves["r", curve]) for curve in CURVES[:3])
    own, c, nothing = of.mean(curves["r", SPECIAL[1]]), of.mean(curves["c", CURVES[1]]), of.mean(curves["c", CURVES[3]])
    verdict = of.level(neighbours, same, NEEDED)
    only = "Only prompts of one task choose that much alike. " if verdict == "partly" else ""
    return Claim(
        f"consecutive prompts choose alike ({name})",
        "0.4 to 0.6 (OpenMoE), 0.75 to 0.95 (Mixtral)",
        f"r {neighbours:.2f} with tasks mixed, {same:.2f} within a task",
        verdict,
        f"{only}Popularity alone would give {popular:.2f}; beyond popularity, neighbours of mixed tasks have "
        f"{own:.2f}. Means not subtracted: c {c:.2f}, but routing without any preference has {nothing:.2f}.",
    )


EXPERIMENT = Experiment(
    name="fig8",
    title="Figure 8: consecutive prompts",
    question="Do consecutive prompts choose the same experts?",
    method=f"{of.METHOD} Averaged over layers and pairs of consecutive prompts, in random order (tasks mixed, "
    "as the paper's load draws them) and within each task. The claim holds from r = 0.9 x 0.4 with "
    "tasks mixed, and partly where only prompts of one task reach that.",
    expected="Between 0.4 and 0.6 for OpenMoE, 0.75 to 0.95 for Mixtral.",
    kind="routing",
    minutes=(0.2, 0.5),
    run=run,
    needs=(pairs,),
)
