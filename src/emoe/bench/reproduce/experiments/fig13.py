"""Figure 13: what does knowing the task do for accuracy?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from emoe.bench.reproduce import drawing
from emoe.bench.reproduce.accuracy import COLUMNS, FEW, Gap, because, by_prompt, gap, graded, measure_name, notes
from emoe.bench.reproduce.experiment import Experiment
from emoe.bench.reproduce.findings import Claim, Finding, Picture, Table, Verdict
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

    def gains(tasks: tuple[str, ...], share: str = "60%") -> dict[str, Gap]:
        aware, agnostic = (by[share, name] for name in WAYS)
        pairs = {task: gap(aware, agnostic, task) for task in tasks}
        return {task: each for task, each in pairs.items() if each is not None}

    def draw() -> Any:
        figure, axes = drawing.panels(1, rows=len(shares), width=7.2, height=2.6)
        for (ax,), share in zip(axes, shares, strict=True):
            series = {name: [by[share, name].value(task) for task in bench.tasks] for name in WAYS}
            drawing.bars(ax, bench.tasks, series, f"{measure_name()} (%)", f"{share} of the experts resident")
            ax.set_ylim(0, 105)
        drawing.legend(axes[0][0], outside=True)
        return figure

    caption = "Accuracy of whole answers by task: loading that knows the prompt's task, and loading that does not."
    pairs = {share: gap(by[share, "task-aware"], by[share, "task-agnostic"]) for share in shares}
    gaps = {share: each for share, each in pairs.items() if each is not None}
    claims = (_same(gains(SAME)), _better(gains(BETTER), because(bench)), _mean(gaps))
    said = notes(bench, [each.judged for each in found])
    prompts = by_prompt({f"{share}, {name}": each for (share, name), each in by.items()})
    return Finding(claims, (table, prompts), (Picture("accuracy", caption, draw),), said)


def _same(gains: dict[str, Gap]) -> Claim:
    """Equal: the whole interval within `EQUAL`; different: the interval without zero, and further apart."""
    text, paper = f"on {' and '.join(SAME)} both kinds of loading are equally accurate", "equal"
    if len(gains) < len(SAME):
        return Claim(text, paper, "", "not measured", f"the prompts have no tasks of the names {', '.join(SAME)}.")
    equal = [task for task, each in gains.items() if each.within(EQUAL)]
    apart = [task for task, each in gains.items() if (each.better or each.worse) and abs(each.points) > EQUAL]
    why = f"Equal means an interval within {EQUAL:g} points. "
    if not apart and len(equal) < len(gains):
        why += f"The prompts do not decide it for {_and(task for task in gains if task not in equal)}."
        return Claim(text, paper, _signed(gains), "undecided", why)
    why += f"Knowing the task makes a difference on {_and(apart)}. "
    unsaid = [task for task in gains if task not in apart and task not in equal]
    why += f"The prompts do not decide it for {_and(unsaid)}." if unsaid else ""
    verdict: Verdict = "holds" if not apart else "partly" if equal else "does not hold"
    return Claim(text, paper, _signed(gains), verdict, "" if verdict == "holds" else why.strip())


def _better(gains: dict[str, Gap], why: str) -> Claim:
    text, paper = f"on {', '.join(BETTER)} knowing the task is more accurate", "task-aware better"
    if len(gains) < len(BETTER):
        return Claim(text, paper, "", "not measured", f"the prompts have no tasks of the names {', '.join(BETTER)}.")
    better = [task for task, each in gains.items() if each.better]
    worse = [task for task, each in gains.items() if each.worse]
    open_ = [task for task in gains if task not in better and task not in worse]
    here = _signed(gains)
    if len(better) == len(gains):
        return Claim(text, paper, here, "holds")
    if not better and not worse:
        return Claim(text, paper, here, "undecided", FEW)
    said = f"It is on {_and(better)}. " if better else ""
    said += f"The prompts do not decide it for {_and(open_)}. " if open_ else ""
    said += f"On {_and(worse)} it is less accurate: {why}" if worse else ""
    return Claim(text, paper, here, "partly" if better else "does not hold", said.strip())


def _and(names: Iterable[str]) -> str:
    return " and ".join(names)


def _mean(gaps: dict[str, Gap]) -> Claim:
    text = "over all tasks knowing the task is more accurate"
    here = ", ".join(f"{share}: {each}" for share, each in gaps.items()) + " points"
    if not gaps:
        return Claim(text, "yes", "", "not measured", "no share can run on this model.")
    if not any(each.tells for each in gaps.values()):
        return Claim(text, "yes", here, "undecided", FEW)
    verdict = graded([each.better for each in gaps.values()])
    why = "" if verdict == "holds" else "not at every share do the prompts show it."
    return Claim(text, "yes", here, verdict, why)


def _signed(gains: dict[str, Gap]) -> str:
    return ", ".join(f"{name} {each.short}" for name, each in gains.items()) + " points"


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
