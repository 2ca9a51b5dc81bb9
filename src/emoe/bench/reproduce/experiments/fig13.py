"""Figure 13: what does knowing the task do for accuracy?"""

from __future__ import annotations

from typing import Any

from emoe.bench.reproduce import drawing
from emoe.bench.reproduce.accuracy import COLUMNS, FEW, Gap, because, gap, graded, measure_name, notes
from emoe.bench.reproduce.experiment import Experiment
from emoe.bench.reproduce.findings import Claim, Finding, Picture, Table
from emoe.bench.reproduce.judging import AGNOSTIC, OURS, accuracies, answers_of
from emoe.bench.reproduce.workbench import Workbench

EQUAL = 2.0
"""Points within which two accuracies are called equal."""
SAME, BETTER = ("classify", "compare"), ("converse", "qa", "summarise")
"""The paper's tasks: those where both kinds of loading are equal, and those where knowing the task helps."""
WAYS = {"task-aware": OURS, "task-agnostic": AGNOSTIC}


def run(bench: Workbench) -> Finding:
    """Accuracy by task, share and kind of loading."""
    shares = bench.pick(("60%",), ("40%", "60%", "80%"))
    texts = answers_of(bench)
    grid = [(share, name) for share in shares for name in WAYS]
    found = accuracies(bench, [(texts, WAYS[name], share) for share, name in grid])
    by = dict(zip(grid, found, strict=True))
    rows = tuple(
        (share, name, task or "all", *by[share, name].both(task))
        for share, name in grid
        for task in (None, *bench.tasks)
    )
    table = Table("accuracy", "Accuracy by task", ("experts resident", "loading", "task", *COLUMNS), rows)

    def gain(task: str | None, share: str) -> float | None:
        aware, agnostic = (by[share, name].value(task) for name in WAYS)
        return None if aware is None or agnostic is None else aware - agnostic

    def draw() -> Any:
        figure, axes = drawing.panels(1, rows=len(shares), width=7.2, height=2.6)
        for (ax,), share in zip(axes, shares, strict=True):
            series = {name: [by[share, name].value(task) for task in bench.tasks] for name in WAYS}
            drawing.bars(ax, bench.tasks, series, f"{measure_name()} (%)", f"{share} of the experts resident")
            ax.set_ylim(0, 105)
        drawing.legend(axes[0][0], outside=True)
        return figure

    caption = "Accuracy of whole answers by task: loading that knows the prompt's task, and loading that does not."
    pairs = {share: gap(*(by[share, name] for name in WAYS)) for share in shares}
    gaps = {share: each for share, each in pairs.items() if each is not None}
    claims = (_same(bench, gain), _better(bench, gain), _mean(gaps))
    said = notes(bench, [each.judged for each in found])
    return Finding(claims, (table,), (Picture("accuracy", caption, draw),), said)


def _same(bench: Workbench, gain: Any) -> Claim:
    text, paper = f"on {' and '.join(SAME)} both kinds of loading are equally accurate", "equal"
    gains = {task: value for task in SAME if task in bench.tasks and (value := gain(task, "60%")) is not None}
    if len(gains) < len(SAME):
        return Claim(text, paper, "", "not measured", f"the prompts have no tasks of the names {', '.join(SAME)}.")
    equal = [abs(value) <= EQUAL for value in gains.values()]
    why = (
        "these tasks' answers are a word or two, and here they do depend on the experts that are there: knowing the "
        "task helps more than it did in the paper."
        if min(gains.values()) >= -EQUAL
        else f"equal means within {EQUAL:g} points."
    )
    verdict = graded(equal)
    return Claim(text, paper, _signed(gains), verdict, "" if verdict == "holds" else why)


def _better(bench: Workbench, gain: Any) -> Claim:
    text, paper = f"on {', '.join(BETTER)} knowing the task is more accurate", "task-aware better"
    gains = {task: value for task in BETTER if task in bench.tasks and (value := gain(task, "60%")) is not None}
    if len(gains) < len(BETTER):
        return Claim(text, paper, "", "not measured", f"the prompts have no tasks of the names {', '.join(BETTER)}.")
    better = [value > 0 for value in gains.values()]
    verdict = graded(better)
    why = "" if verdict == "holds" else f"not on every one of them: {because(bench)}"
    return Claim(text, paper, _signed(gains), verdict, why)


def _mean(gaps: dict[str, Gap]) -> Claim:
    text = "over all tasks knowing the task is more accurate"
    here = ", ".join(f"{share}: {each}" for share, each in gaps.items()) + " points"
    if not gaps:
        return Claim(text, "yes", "", "not measured", "no share can run on this model.")
    if not any(each.tells for each in gaps.values()):
        return Claim(text, "yes", here, "not measured", FEW)
    verdict = graded([each.points > 0 for each in gaps.values()])
    why = "" if verdict == "holds" else "what is popular with one task alone leaves out what its prompts need besides."
    return Claim(text, "yes", here, verdict, why)


def _signed(gains: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:+.1f}" for name, value in gains.items()) + " points"


EXPERIMENT = Experiment(
    name="fig13",
    title="Figure 13: task-aware loading",
    question="Are answers better when the loader knows the prompt's task?",
    method="Mode resident, a plan for every prompt. Task-aware: the label, task-popularity and the profile's "
    "sensitivity; task-agnostic: one popularity for all prompts, every layer sensitive, no label. Claims at 60 %.",
    expected="Equal on classification and comparison, better on conversation, question answering and summaries.",
    kind="quality",
    minutes=(0.5, 7),
    run=run,
)
