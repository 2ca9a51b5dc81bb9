"""Table 1: the tasks, and how long their prompts and answers are."""

from __future__ import annotations

from typing import Any

import numpy as np

from emoe.bench.reproduce import drawing
from emoe.bench.reproduce.experiment import Experiment
from emoe.bench.reproduce.findings import Claim, Finding, Picture, Table, Verdict
from emoe.bench.reproduce.workbench import Workbench

PAPER = {
    "summarise": "XSum",
    "classify": "tweets, finance",
    "qa": "SQuAD",
    "compare": "headlines",
    "converse": "human-assistant pairs",
}
"""The paper's tasks and what it took them from."""


def run(bench: Workbench) -> Finding:
    """Counts of prompts, tokens of prompts and of the full model's greedy answers."""
    given: dict[str, list[int]] = {task: [] for task in bench.tasks}
    made: dict[str, list[int]] = {task: [] for task in bench.tasks}
    sides: dict[str, dict[str, int]] = {task: {"learn": 0, "score": 0} for task in bench.tasks}
    references = dict.fromkeys(bench.tasks, 0)
    for side in ("learn", "score"):
        _, answers = bench.recorded(side)
        for prompt, ids, answer in zip(bench.prompts[side], bench.ids(side), answers, strict=True):
            if prompt.task in sides:
                sides[prompt.task][side] += 1
                given[prompt.task].append(len(ids))
                made[prompt.task].append(len(answer.ids))
                references[prompt.task] += prompt.reference is not None
    rows = tuple(
        (
            task,
            PAPER.get(task, ""),
            sides[task]["learn"],
            sides[task]["score"],
            round(float(np.mean(given[task])), 1),
            max(given[task]),
            round(float(np.mean(made[task])), 1),
            references[task],
        )
        for task in bench.tasks
    )
    columns = (
        "task",
        "the paper's data",
        "prompts to learn from",
        "prompts scored",
        "mean prompt, tokens",
        "longest prompt, tokens",
        "mean answer, tokens",
        "with a reference answer",
    )

    def draw() -> Any:
        figure, axes = drawing.panels(2, width=4.6)
        for ax, lengths, what in zip(axes[0], (given, made), ("prompt", "answer"), strict=True):
            means = [float(np.mean(lengths[task])) for task in bench.tasks]
            drawing.bars(ax, bench.tasks, {what: means}, f"mean tokens of a {what}".replace("a a", "an a"))
        return figure

    caption = "Mean tokens of the prompts and of the full model's greedy answers, by task."
    return Finding(
        (_claim(bench.tasks),), (Table("tasks", "Tasks", columns, rows),), (Picture("tokens", caption, draw),)
    )


def _claim(tasks: tuple[str, ...]) -> Claim:
    shared = [task for task in PAPER if task in tasks]
    more = [task for task in tasks if task not in PAPER]
    missing = [task for task in PAPER if task not in tasks]
    verdict: Verdict = "holds" if not missing else "partly" if shared else "not measured"
    why = f"Other data and other prompts than the paper's{'; besides ' + ', '.join(more) if more else ''}."
    return Claim(
        "one model serves tasks of different kinds",
        f"{len(PAPER)} tasks: {', '.join(PAPER)}",
        f"{len(tasks)} tasks, {len(shared)} of them the paper's",
        verdict,
        why + (f" Without {', '.join(missing)}." if missing else ""),
    )


EXPERIMENT = Experiment(
    name="table1",
    title="Table 1: tasks",
    question="Which tasks are measured, on how many prompts, and how long are prompts and answers?",
    method="Tokens of every prompt as the model reads it, and of the full model's greedy answer, are counted by task. "
    "Prompts to learn from make profiles and train predictors; the others are scored, and are never learned from.",
    expected="Five tasks: summarise (XSum), classify (tweets, finance), question answering (SQuAD), compare "
    "(headlines) and converse (human-assistant pairs).",
    kind="routing",
    minutes=(0.5, 4),
    run=run,
)
