"""Figure 5: how many layers may route wrongly before a task's answers change?"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from emoe.bench.reproduce import drawing
from emoe.bench.reproduce.accuracy import because, graded
from emoe.bench.reproduce.experiment import Experiment
from emoe.bench.reproduce.findings import Claim, Finding, Picture, Table
from emoe.bench.reproduce.workbench import Workbench
from emoe.profiling.plot import sensitivity_figure
from emoe.tasks.sensitivity import MEASURES, Sensitivity

PAPER = ((0.25, 0.8), (0.5, 0.8), (1.0, 0.9))
"""Share of layers that route at random, and similarity: what the paper says of its tasks there is in the caption."""
CLAIMS: tuple[tuple[str, tuple[str, ...], float, float], ...] = (
    ("classify and compare keep over 90 % with all routing wrong", ("classify", "compare"), 1.0, 0.9),
    ("conversation falls under 80 % with a quarter of the layers wrong", ("converse",), 0.25, -0.8),
    ("question answering keeps over 80 % with half of the layers wrong", ("qa",), 0.5, 0.8),
    ("summaries fall under 80 % with half of the layers wrong", ("summarise",), 0.5, -0.8),
)
"""Text, tasks, share of layers, and what is kept at least (negative: less than its amount)."""
WHY = (
    "emoe-nano has 6 layers, each a larger part of the model than in the paper, and experts of tasks: a random one "
    "knows nothing of this task. The last claim says whether the tasks' order is the paper's."
)


def run(bench: Workbench) -> Finding:
    """The curves of the profile that the prompts to learn from gave."""
    known = bench.profile.sensitivity
    if not known.curves:
        why = "the profile in the run's folder holds no sensitivity."
        return Finding((Claim("tolerance to wrong routing depends on the task", "yes", "", "not measured", why),))
    rows = tuple(
        (measure, task, layer + 1, round(100 * (layer + 1) / known.layers, 1), round(100 * float(value), 2))
        for measure, curves in known.curves.items()
        for task, curve in curves.items()
        for layer, value in enumerate(curve)
    )
    columns = ("measure", "task", "first layers that route at random", "of all layers (%)", "as the full model (%)")
    table = Table("sensitivity", "Answers under random routing", columns, rows, shown=False)
    claims = (*(_claim(known, *each, because(bench, WHY)) for each in CLAIMS), _order(known))
    caption = (
        "First layers whose routing is random against how alike the answers stay (1: as the full model), by measure. "
        f"Dashed: the threshold {known.threshold:g} under which a layer counts as sensitive. The paper's measure is "
        "the similarity; at its stars, conversation is below (1), question answering above and summaries below (2), "
        "classification and comparison above (3)."
    )
    said = tuple(f"{name}: {MEASURES[name]}." for name in known.curves)

    def draw() -> Any:
        figure = sensitivity_figure(known)
        measured = [name for name in MEASURES if name in known.curves]  # the order of the panels
        if "similarity" in measured:
            ax = figure.axes[measured.index("similarity")]
            for number, (share, value) in enumerate(PAPER, start=1):
                at = (share * known.layers, value)
                drawing.paper_points(ax, [at], "")
                ax.annotate(str(number), at, (4, 4), textcoords="offset points", fontsize=8, color=drawing.PAPER)
        return figure

    missing = () if "similarity" in known.curves else ("The similarity was not measured: no sentence encoder.",)
    return Finding(claims, (table,), (Picture("sensitivity", caption, draw),), said + missing)


def _claim(known: Sensitivity, text: str, tasks: tuple[str, ...], share: float, bound: float, why: str) -> Claim:
    """See `CLAIMS`; by the measure that decides. A quarter of 6 layers is 2: rounded up."""
    paper = f"{'over' if bound > 0 else 'under'} {abs(bound):.0%}"
    layers = math.ceil(share * known.layers)
    curves = known.curves[known.measure]
    found = {task: float(curves[task][layers - 1]) for task in tasks if task in curves}
    if len(found) < len(tasks):
        return Claim(text, paper, "", "not measured", f"the prompts have no tasks of the names {', '.join(tasks)}.")
    verdict = graded([value >= bound if bound > 0 else value < -bound for value in found.values()])
    here = ", ".join(f"{task} {value:.0%}" for task, value in found.items())
    return Claim(text, paper, f"{here} ({layers} of {known.layers} layers)", verdict, "" if verdict == "holds" else why)


def _order(known: Sensitivity) -> Claim:
    """Tolerance, as the mean over all prefixes; the paper's order of its five tasks."""
    text, paper = "tolerance to wrong routing depends on the task", "classify, compare > qa > summarise > converse"
    means = {task: float(curve.mean()) for task, curve in known.curves[known.measure].items()}
    order = sorted(means, key=means.__getitem__, reverse=True)
    here = " > ".join(f"{task} {means[task]:.0%}" for task in order)
    wanted = ("classify", "compare", "qa", "summarise", "converse")
    if not set(wanted) <= set(means):
        spread = max(means.values()) - min(means.values())
        why = "" if spread >= 0.1 else "all tasks within 10 points."
        return Claim(text, paper, here, "does not hold" if why else "holds", why)
    levels = ((0, 1), (2,), (3,), (4,))
    flags = [means[wanted[i]] >= means[wanted[j]] for upper, lower in pairwise(levels) for i in upper for j in lower]
    verdict = graded(flags)
    why = "" if verdict == "holds" else "the order differs in part; the mean over all prefixes is compared."
    return Claim(text, paper, here, verdict, why)


EXPERIMENT = Experiment(
    name="fig5",
    title="Figure 5: sensitivity to wrong routing",
    question="How wrongly may a layer route before a task's answers change?",
    method="The router's choice is replaced by random experts in the first layers, from the input side, for growing "
    "numbers of layers; answers to prompts to learn from are compared with the full model's, as `emoe profile` does.",
    expected="Classification and comparison keep over 90 % similarity with all routing wrong; conversation falls under "
    "80 % with 25 % of the layers wrong; question answering keeps over 80 % with half, summaries fall under 80 %.",
    kind="quality",
    minutes=(0.5, 3),
    run=run,
)
