"""Section 5.7: what does predicting cost?"""

from __future__ import annotations

from typing import Any

from emoe.bench.reproduce import drawing
from emoe.bench.reproduce.accuracy import Judged, graded, notes, rounded
from emoe.bench.reproduce.experiment import KEPT, Experiment
from emoe.bench.reproduce.findings import Claim, Finding, Picture, Table
from emoe.bench.reproduce.judging import Way, answers_of, judged
from emoe.bench.reproduce.needs import networks
from emoe.bench.reproduce.room import share_resident
from emoe.bench.reproduce.ways import in_words
from emoe.bench.reproduce.workbench import Workbench
from emoe.planner import plan

PAPER_TIME = 3.11
"""Percent of request time at p = 40, the higher end."""
PAPER_MEMORY = 1.3
"""Percent of the MoE's memory, the higher end."""
PAPER_CALLS_MS = ((334.0, "paper, eMoE-A: 334 to 381 ms"), (1387.0, "paper, eMoE-L: 1,387 to 4,211 ms"))
NETWORKS = ("emoe-a", "emoe-l")
NAMES = ("task-popularity", "moe-infinity", *NETWORKS)
PERIODS = (40, 1)


def run(bench: Workbench) -> Finding:
    """Time and memory of every predictor, for the paper's p and for a plan at every prompt."""
    texts = answers_of(bench)
    grid = [(name, p) for name in NAMES for p in PERIODS]
    none, *rest = judged(
        bench,
        [(texts, Way(p=40), bench.share), *((texts, Way(name, p), bench.share) for name, p in grid)],
    )
    found = dict(zip(grid, rest, strict=True))
    made = plan(bench.folder)
    model_bytes = made.dense_bytes + made.expert_bytes
    rows = tuple((name, p, *_figures(each, none, model_bytes)) for (name, p), each in found.items())
    columns = (
        "predictor",
        "p",
        "predictions",
        "ms per prediction",
        "predicting (% of request time)",
        "on the critical path (% of request time)",
        "run against no predictor (times)",
        "predictor's process (MB)",
        "of the model's weights (%)",
    )
    table = Table("overheads", f"Predicting, {in_words(bench.share)} of the experts resident", columns, rows)
    share = {(row[0], row[1]): row[4] for row in rows}

    def draw() -> Any:
        figure, axes = drawing.panels(2, width=4.6, height=3.4)
        left, right = axes[0]
        drawing.bars(left, NAMES, _series(rows, 4), "predicting (% of request time)")
        drawing.paper_line(left, PAPER_TIME, "paper, p = 40: 0.24 to 3.11 %")
        drawing.bars(right, NAMES, _series(rows, 3), "ms per prediction")
        if any(row[3] for row in rows):
            right.set_yscale("log")
        for value, text in PAPER_CALLS_MS:
            drawing.paper_line(right, value, text)
        for ax in (left, right):
            ax.tick_params(axis="x", rotation=20)
        drawing.legend(left)
        return figure

    claims = (_time(share), _memory(rows), _every_prompt(found))
    said = (
        *notes(bench, [none, *rest])[1:],
        "Times are of this machine as it was: a quiet one gives steadier ones. Networks predict in a process of their "
        "own, beside the engine; a prediction that comes too late is not waited for, and one that a newer question "
        "overtakes is dropped, so that there are fewer plans than prompts.",
    )
    caption = (
        "Time spent predicting, as a share of request time and for each call; "
        f"{in_words(bench.share)} of the experts resident."
    )
    return Finding(claims, (table,), (Picture("overheads", caption, draw),), said)


def _figures(each: Judged, none: Judged, model_bytes: int) -> tuple[Any, ...]:
    if not each.stats:
        return (None,) * 7
    spent, ahead, seconds = each.stats["predictions"], each.stats["prefetch"], each.stats["seconds"]
    return (
        spent["calls"],
        rounded(1e3 * spent["seconds"] / spent["calls"], 3) if spent["calls"] else None,
        rounded(100 * spent["seconds"] / seconds, 3),
        rounded(100 * (ahead["overhead_s"] if ahead else 0.0) / seconds, 3),
        rounded(seconds / none.stats["seconds"]),
        rounded(spent["memory_bytes"] / 1e6, 1),
        rounded(100 * spent["memory_bytes"] / model_bytes, 2),
    )


def _series(rows: tuple[tuple[Any, ...], ...], column: int) -> dict[str, list[float | None]]:
    return {f"p = {p}": [row[column] for row in rows if row[1] == p] for p in PERIODS}


def _time(share: dict[tuple[str, int], float | None]) -> Claim:
    text, paper = "predicting takes a few percent of request time (p = 40)", "0.24 to 3.11 %"
    found = {name: value for name in NAMES if (value := share[name, 40]) is not None}
    if not found:
        return Claim(text, paper, "", "not measured", "no predictor could run: the notes say why.")
    verdict = graded([value <= PAPER_TIME for value in found.values()])
    here = ", ".join(f"{name} {value:.2g} %" for name, value in found.items())
    why = "a call takes about as long for any model, and the requests here are over in a fraction of a second."
    return Claim(text, paper, here, verdict, "" if verdict == "holds" else why)


def _memory(rows: tuple[tuple[Any, ...], ...]) -> Claim:
    text, paper = "the predictor takes little memory beside the model", "0.24 to 1.3 % of the model's"
    found = {row[0]: row[8] for row in rows if row[1] == 40 and row[8] is not None}
    if not found:
        return Claim(text, paper, "", "not measured", "no predictor could run: the notes say why.")
    verdict = graded([value <= PAPER_MEMORY for value in found.values()])
    here = ", ".join(
        f"{name} {value:,.0f} %" if value >= 100 else f"{name} {value:.3g} %" for name, value in found.items()
    )
    why = (
        "a network's process holds hundreds of megabytes of Python and libraries, more than the whole of a small "
        "model; of a model of 90 GB it would be under 1 %. Counting (task-popularity, the default) needs no process."
    )
    return Claim(text, paper, here, verdict, "" if verdict == "holds" else why)


def _every_prompt(found: dict[tuple[str, int], Judged]) -> Claim:
    """eMoE-E beside eMoE-A."""
    text, paper = (
        "eMoE-E (eMoE-A at every prompt) is a little more accurate and slower",
        "+0.1 to 0.4 points, 9 to 34 % more time",
    )
    often, seldom = found["emoe-a", 1], found["emoe-a", 40]
    a, b = often.agreement(), seldom.agreement()
    if a is None or b is None:
        return Claim(text, paper, "", "not measured", "eMoE-A could not run: the notes say why.")
    times = often.stats["seconds"] / seldom.stats["seconds"]
    verdict = graded([a - b >= 0.1, times > 1])
    here = f"{a - b:+.1f} points of token agreement, {times:.2f}x the time"
    why = "not both show here: the network runs beside the engine, and reading a small model's experts costs little."
    return Claim(text, paper, here, verdict, "" if verdict == "holds" else why)


EXPERIMENT = Experiment(
    name="sec57",
    title="Section 5.7: overheads",
    question="What do predictions cost in time and memory?",
    method=f"Mode resident with {KEPT}; every predictor's own clock, the time the engine spent on its "
    "predictions, the run beside one without a predictor, and the memory of the process a network runs in.",
    expected="0.24 to 3.11 % of request time at p = 40 (a call takes 0.33 to 0.38 s for eMoE-A, 1.4 to 4.2 s for "
    "eMoE-L); 0.24 to 1.3 % of the model's memory; eMoE-E gains 0.1 to 0.4 % accuracy for 9 to 34 % more time.",
    kind="speed",
    minutes=(0.5, 4),
    run=run,
    needs=(
        networks,
        share_resident,
    ),
)
