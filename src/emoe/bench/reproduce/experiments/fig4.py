"""Figure 4: does an answer's length depend on the task?"""

from __future__ import annotations

from typing import Any

import numpy as np

from emoe.bench.reproduce import drawing
from emoe.bench.reproduce.experiment import Experiment
from emoe.bench.reproduce.findings import Claim, Finding, Picture, Table, Verdict
from emoe.bench.reproduce.workbench import Workbench

PAPER_RATIO = 2.0


def run(bench: Workbench) -> Finding:
    """Lengths of the greedy answers to the prompts of both sides."""
    lengths: dict[str, list[int]] = {task: [] for task in bench.tasks}
    cut: dict[str, int] = dict.fromkeys(bench.tasks, 0)
    for side in ("learn", "score"):
        _, answers = bench.recorded(side)
        for prompt, answer in zip(bench.prompts[side], answers, strict=True):
            if prompt.task in lengths:
                lengths[prompt.task].append(len(answer.ids))
                cut[prompt.task] += answer.cut
    order = sorted(bench.tasks, key=lambda task: float(np.mean(lengths[task])))
    rows: tuple[tuple[Any, ...], ...] = tuple(
        (
            task,
            len(lengths[task]),
            round(float(np.mean(lengths[task])), 2),
            *(float(q) for q in np.quantile(lengths[task], (0.1, 0.5, 0.9))),
            round(cut[task] / len(lengths[task]), 3),
        )
        for task in order
    )
    shortest, longest = rows[0], rows[-1]
    ratio = longest[2] / shortest[2]
    limited = sum(cut.values())
    why = f"{limited} answers ended at the limit of {bench.new_tokens} tokens, so long ones are longer still."
    holds = ratio >= PAPER_RATIO
    claims = [
        Claim(
            "the mean length of an answer depends on the task",
            "up to 2x",
            f"{ratio:.1f}x",
            "holds" if holds else "does not hold",
            why if limited or not holds else "",
        )
    ]
    if {"qa", "converse"} <= set(order):
        ends = (shortest[0], longest[0])
        verdicts: tuple[Verdict, ...] = ("does not hold", "partly", "holds")
        hits = (ends[0] == "qa") + (ends[1] == "converse")
        claims.append(
            Claim(
                "question answering has the shortest answers, conversation the longest",
                "qa, converse",
                ", ".join(ends),
                verdicts[hits],
                "" if hits == 2 else f"Other prompts and another model's habits. {why if limited else ''}".strip(),
            )
        )
    columns = ("task", "answers", "mean tokens", "1 of 10 within", "median", "9 of 10 within", "share cut")
    table = Table("lengths", "Answer lengths by task", columns, rows)

    def draw() -> Any:
        figure, axes = drawing.panels(1, width=5.6)
        ax = axes[0][0]
        means = {"marker": "^", "markerfacecolor": drawing.COLOURS[1], "markeredgecolor": "none"}
        middle = {"color": drawing.COLOURS[0], "linewidth": 2}
        values = [lengths[task] for task in order]
        ax.boxplot(values, whis=(10, 90), showfliers=False, showmeans=True, meanprops=means, medianprops=middle)
        ax.set_xticks(range(1, len(order) + 1), order, rotation=30)
        drawing.finish(ax, "", "tokens of an answer")
        return figure

    caption = "Tokens of greedy answers: quartiles, whiskers at 10 and 90 %, line: median, triangle: mean."
    return Finding(tuple(claims), (table,), (Picture("lengths", caption, draw),))


EXPERIMENT = Experiment(
    name="fig4",
    title="Figure 4: output lengths",
    question="Does the length of an answer depend on its task, so that a scheduler can expect it?",
    method="Every prompt is answered greedily by the full model; lengths are counted by task.",
    expected="Output length depends on the task, up to twice: question answering shortest, conversation longest.",
    kind="quality",
    minutes=(1, 4),
    run=run,
)
