"""Figure 14: memory and accuracy against the share of experts that are resident."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from emoe.bench.reproduce import drawing
from emoe.bench.reproduce.accuracy import COLUMNS, Accuracy, because, measure_name, notes, percent, rounded
from emoe.bench.reproduce.experiment import Experiment
from emoe.bench.reproduce.findings import Claim, Finding, Picture, Table, Verdict
from emoe.bench.reproduce.judging import OURS, Way, accuracies, answers_of, judged
from emoe.bench.reproduce.workbench import Workbench
from emoe.errors import BudgetError
from emoe.planner import Plan, plan

PAPER = {60: 98.2, 80: 99.6}
"""Percent, the lower end where the paper gives two."""
PAPER_LOWEST = 93.7
BALANCED = Way("task-popularity", mode="balanced")
RESIDENT = "resident (the paper)"
WAYS = {RESIDENT: OURS, "balanced": BALANCED}
MIB = 1 << 20


def run(bench: Workbench) -> Finding:
    """Accuracy of the two lossy modes, bytes of experts as measured, and the process as planned."""
    shares = bench.pick((40, 60, 80, 100), (20, 40, 60, 80, 100))
    texts = answers_of(bench)
    grid = [(name, share) for name in WAYS for share in shares]
    found = dict(zip(grid, accuracies(bench, [(texts, WAYS[name], f"{share}%") for name, share in grid]), strict=True))
    plans = {share: made for share in shares if (made := _planned(bench, share)) is not None}
    full = plans[100]
    memory = tuple(
        (
            share,
            rounded(found[RESIDENT, share].judged.stats.get("peak_resident_bytes", 0) / MIB),
            rounded(made.resident_bytes / MIB),
            rounded(_weights(made) / MIB),
            rounded(made.total_bytes / MIB),
            rounded(100 * (1 - _weights(made) / _weights(full)), 1),
        )
        for share, made in plans.items()
    )
    of_memory = (
        "experts resident (%)",
        "experts, measured (MiB)",
        "experts, planned (MiB)",
        "model: weights, cache, activations (MiB)",
        "process (MiB)",
        "less than all (%)",
    )
    rows = tuple(
        (name, share, *each.both(), rounded(each.judged.stats.get("rerouted_share"), 4))
        for (name, share), each in found.items()
    )
    tables = [
        Table("memory", "Memory by share of experts", of_memory, memory),
        Table(
            "accuracy",
            "Accuracy by share of experts",
            ("mode", "experts resident (%)", *COLUMNS, "share of routes redirected"),
            rows,
        ),
    ]
    if not bench.settings.quick:
        tables.append(_dial(bench))

    def draw() -> Any:
        figure, axes = drawing.panels(2, width=4.6)
        ax = axes[0][0]
        curves = {
            name: [(share, value) for share in shares if (value := found[name, share].value()) is not None]
            for name in WAYS
        }
        drawing.lines(ax, curves, "experts resident (%)", f"{measure_name()} (%)", "accuracy")
        drawing.paper_points(ax, [(60, 98.5), (80, 99.65)], "paper (Mixtral, OpenMoE)")
        ax.set_ylim(0, 104)
        drawing.legend(ax)
        ax = axes[0][1]
        parts = {
            "experts": [made.resident_bytes / MIB for made in plans.values()],
            "model without experts": [(_weights(made) - made.resident_bytes) / MIB for made in plans.values()],
        }
        drawing.bars(ax, [str(share) for share in plans], parts, "MiB", "memory of the model")
        ax.set_xlabel("experts resident (%)", fontsize=9)
        ax.set_ylim(top=1.3 * ax.get_ylim()[1])  # room for the names
        drawing.legend(ax)
        return figure

    claims = (*(_accuracy(found, share, because(bench)) for share in PAPER), _saved(plans, found, because(bench)))
    libraries = (full.import_bytes + full.runtime_bytes) / MIB
    said = (
        *notes(bench, [each.judged for each in found.values()]),
        f"The process as planned holds {libraries:.0f} MiB of Python and libraries besides. The paper's numbers are of "
        "GPU memory, which has none of it, so shares of memory here are of the model: weights, cache and activations. "
        "Mode exact loses nothing at any share (its answers are the full model's, bit for bit); it waits for loads.",
    )
    caption = "Left: accuracy against the share of experts; stars: the paper's. Right: what the model takes, by plan."
    return Finding(claims, tuple(tables), (Picture("shares", caption, draw),), said)


def _planned(bench: Workbench, share: int) -> Plan | None:
    """With a context of the prompts and answers here; None under the floor."""
    tokens = bench.settings.prompt_tokens + bench.new_tokens
    try:
        return plan(bench.folder, expert_memory=f"{share}%", context=tokens, prompt=bench.settings.prompt_tokens)
    except BudgetError:
        return None


def _weights(made: Plan) -> int:
    return made.total_bytes - made.import_bytes - made.runtime_bytes


def _dial(bench: Workbench) -> Table:
    """Not in the paper: how far `balanced` goes towards `exact` with the threshold, at the paper's p."""
    texts = answers_of(bench)
    ways = {"resident": Way("task-popularity", 40)} | {
        f"balanced, threshold {threshold:g}": Way("task-popularity", 40, "balanced", threshold=threshold)
        for threshold in (0.7, 0.85, 0.95)
    }
    ways["exact"] = Way("task-popularity", 40, "exact")
    grid = [(share, name) for share in (40, 60, 80) for name in ways]
    found = judged(bench, [(texts, ways[name], f"{share}%") for share, name in grid])
    rows = tuple(
        (share, name, rounded(each.agreement()), rounded(each.stats.get("bytes_read", 0) / 1e6, 1))
        for (share, name), each in zip(grid, found, strict=True)
    )
    columns = ("experts resident (%)", "mode", COLUMNS[1], "read (MB)")
    return Table("dial", "Beside the paper: the dial from resident to exact, p = 40", columns, rows)


def _accuracy(found: dict[tuple[str, int], Accuracy], share: int, why: str) -> Claim:
    curve = {each: value for (name, each), one in found.items() if name == RESIDENT and (value := one.value())}
    here = curve.get(share)
    text, paper = f"{share} % of the experts keep the accuracy", {60: "98.2 to 98.8 %", 80: "99.6 to 99.7 %"}[share]
    if here is None:
        return Claim(text, paper, percent(here), "not measured", "this share cannot run on this model.")
    balanced = found["balanced", share].value()
    said = f"{percent(here)} (balanced: {percent(balanced)})"
    if here >= PAPER[share]:
        return Claim(text, paper, said, "holds")
    ordered = [curve[each] for each in sorted(curve)]
    rises = all(a <= b for a, b in pairwise(ordered))
    why = f"accuracy rises with the share of experts, as in the paper, but is lower: {why}" if rises else why
    return Claim(text, paper, said, "partly" if here >= PAPER_LOWEST else "does not hold", why)


def _saved(plans: dict[int, Plan], found: dict[tuple[str, int], Accuracy], why: str) -> Claim:
    """Memory that is saved, and what accuracy is left where it is."""
    text, paper = "20 to 80 % less memory at 93.7 to 99.8 % accuracy", "20 to 80 % less"
    kept = {share: value for share in plans if share < 100 and (value := found[RESIDENT, share].value()) is not None}
    if not kept:
        return Claim(text, paper, "", "not measured", "no smaller share can run on this model.")
    saved = {share: 100 * (1 - _weights(plans[share]) / _weights(plans[100])) for share in kept}
    here = ", ".join(f"{share} % of the experts: {saved[share]:.0f} % less at {kept[share]:.1f} %" for share in saved)
    most = max((saved[s] for s in saved if kept[s] >= PAPER_LOWEST), default=0.0)
    verdict: Verdict = "holds" if most >= 20 else "partly" if most >= 5 else "does not hold"
    why = (
        f"the memory is saved, the accuracy is not kept in mode resident: {why}"
        if max(saved.values()) >= 20
        else "less is saved, since less of the model's memory is experts."
    )
    return Claim(text, paper, here, verdict, "" if verdict == "holds" else why)


EXPERIMENT = Experiment(
    name="fig14",
    title="Figure 14: memory and accuracy against the share of experts",
    question="How much memory do fewer experts save, and what do they cost in accuracy?",
    method="Mode resident (the paper's) and balanced, task-popularity, a plan for every prompt, labels known. Memory: "
    "peak bytes of experts as measured, and the rest as `emoe plan` has it.",
    expected="20 to 80 % less memory at 93.7 to 99.8 % accuracy; 98.2 to 98.8 % with 60 % of the experts, 99.6 to 99.7 "
    "% with 80 %.",
    kind="quality",
    minutes=(1, 10),
    run=run,
)
