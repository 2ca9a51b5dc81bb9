"""Figure 5: how many layers may route wrongly before a task's answers change?"""

from __future__ import annotations

import math
from itertools import pairwise

from emoe.bench.reproduce.experiment import Experiment
from emoe.bench.reproduce.findings import Claim, Finding, Picture, Table
from emoe.bench.reproduce.judging import graded
from emoe.bench.reproduce.workbench import Workbench
from emoe.profiling.plot import sensitivity_figure
from emoe.tasks.sensitivity import MEASURES, Sensitivity

WHY = (
    "the model here differs: each layer is a larger part of a model with few of them, and where experts belong to "
    "tasks a random one knows nothing of this one. The last claim says whether the tasks' order is the paper's."
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
    claims = (
        _claim(known, "classify and compare keep over 90 % with all routing wrong", ("classify", "compare"), 1.0, 0.9),
        _claim(known, "conversation falls under 80 % with a quarter wrong", ("converse",), 0.25, -0.8),
        _claim(known, "question answering keeps over 80 % with half of the layers wrong", ("qa",), 0.5, 0.8),
        _claim(known, "summaries fall under 80 % with half of the layers wrong", ("summarise",), 0.5, -0.8),
        _order(known),
    )
    caption = (
        "First layers whose routing is random against how alike the answers stay (1: as the full model), by measure. "
        f"Dashed: the threshold {known.threshold:g} under which a layer counts as sensitive. The paper's measure is "
        "the similarity."
    )
    said = tuple(f"{name}: {MEASURES[name]}." for name in known.curves)
    missing = () if "similarity" in known.curves else ("The similarity was not measured: no sentence encoder.",)
    return Finding(
        claims, (table,), (Picture("sensitivity", caption, lambda: sensitivity_figure(known)),), said + missing
    )


def _claim(known: Sensitivity, text: str, tasks: tuple[str, ...], share: float, bound: float) -> Claim:
    """bound: at least that much is kept; negative: less than its amount. By the measure that decides."""
    paper = f"{'over' if bound > 0 else 'under'} {abs(bound):.0%}"
    layers = math.ceil(share * known.layers)
    curves = known.curves[known.measure]
    found = {task: float(curves[task][layers - 1]) for task in tasks if task in curves}
    if len(found) < len(tasks):
        return Claim(text, paper, "", "not measured", f"the prompts have no tasks of the names {', '.join(tasks)}.")
    verdict = graded([value >= bound if bound > 0 else value < -bound for value in found.values()])
    here = ", ".join(f"{task} {value:.0%}" for task, value in found.items())
    return Claim(text, paper, f"{here} ({layers} of {known.layers} layers)", verdict, "" if verdict == "holds" else WHY)


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
