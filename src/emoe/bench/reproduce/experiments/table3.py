"""Table 3: fewer experts, or smaller ones?"""

from __future__ import annotations

from typing import Any

from emoe.bench.reproduce import drawing
from emoe.bench.reproduce.accuracy import (
    COLUMNS,
    FEW,
    Accuracy,
    by_prompt,
    gap,
    graded,
    measure_name,
    notes,
    percent,
    rounded,
)
from emoe.bench.reproduce.experiment import Experiment
from emoe.bench.reproduce.findings import Claim, Finding, Picture, Table
from emoe.bench.reproduce.judging import FULL, OURS, Texts, Way, accuracies, answers_of, judged
from emoe.bench.reproduce.needs import references
from emoe.bench.reproduce.workbench import Workbench
from emoe.checkpoint.codecs.formats import EXPERT_DTYPES, NATIVE

MIB = 1 << 20
SIXTY = "ours, 60 %"
PAPER = {"ours": (64.5, 98.2), "int8": (57.8, 95.2), "int4": (30.5, 91.5)}
"""GB of memory and percent, Mixtral-8x7B."""


def run(bench: Workbench) -> Finding:
    """Quantised experts, all resident, and ours with as many native ones as take the same bytes."""
    answers, references = answers_of(bench), Texts("references", bench.pick(4, 15), bench.pick(12, 24))
    forms = [form for form in EXPERT_DTYPES if form != NATIVE]
    quantised = {form: Way(mode="exact", expert_dtype=form) for form in forms}
    by_form = accuracies(bench, [(answers, way, None) for way in quantised.values()])
    bytes_of = {
        form: each.judged.stats["total_expert_bytes"]
        for form, each in zip(forms, by_form, strict=True)
        if each.judged.refused is None
    }
    asked: list[tuple[str, str, Way, Any]] = [("native, all resident", NATIVE, FULL, None)]
    asked += [(f"{form}, all resident", form, quantised[form], None) for form in forms]
    asked += [(f"ours, {form}'s bytes", form, OURS, nbytes) for form, nbytes in bytes_of.items()]
    asked += [(SIXTY, NATIVE, OURS, "60%")]
    found = accuracies(bench, [(answers, way, memory) for _, _, way, memory in asked])
    likely = judged(bench, [(references, way, memory) for _, _, way, memory in asked])
    rows = tuple(
        (
            name,
            rounded(_held(each, memory) / MIB) if each.judged.refused is None else None,
            *each.both(),
            rounded(text.perplexity(), 3),
        )
        for (name, _, _, memory), each, text in zip(asked, found, likely, strict=True)
    )
    columns = ("experts", "experts' bytes at the peak of the run (MiB)", *COLUMNS, "perplexity of the references")
    table = Table("memory", "Accuracy at equal memory", columns, rows)
    by = {name: each for (name, _, _, _), each in zip(asked, found, strict=True)}

    def draw() -> Any:
        figure, axes = drawing.panels(1, width=7.6, height=3.8)
        ax = axes[0][0]
        shown = [name for name, each in by.items() if each.value() is not None]
        sizes = [_held(by[name], memory) / MIB for name, _, _, memory in asked if name in shown]
        names = [f"{name.replace(', ', chr(10))}\n{size:.1f} MiB" for name, size in zip(shown, sizes, strict=True)]
        drawing.bars(ax, names, {"here": [by[name].value() for name in shown]}, f"{measure_name()} (%)")
        at = {"int8, all resident": PAPER["int8"], "int4, all resident": PAPER["int4"], SIXTY: PAPER["ours"]}
        points = [(shown.index(name), value) for name, (_, value) in at.items() if name in shown]
        drawing.paper_points(ax, points, "paper: int8 57.8 GB, int4 30.5 GB, eMoE 64.5 GB")
        ax.set_xticks(range(len(shown)), names, rotation=0, fontsize=7.5)
        ax.set_ylim(0, 125)  # room for the names
        ax.set_yticks(range(0, 101, 20))
        drawing.legend(ax)
        return figure

    caption = "Accuracy and the bytes of the experts: quantised ones, and as many native ones as take the same bytes."
    claims = tuple(_claim(by, form) for form in forms)
    said = (
        *notes(bench, [each.judged for each in found]),
        "Ours here is mode resident: nothing waits for an expert. In the same memory mode exact gives the full model's "
        "answers bit for bit, and loads for them; and the two can be combined (a share of quantised experts resident).",
    )
    return Finding(claims, (table, by_prompt(by)), (Picture("memory", caption, draw),), said)


def _held(each: Accuracy, memory: Any) -> float:
    """Bytes of experts; where all are meant they are, although a run with little memory holds them in turn."""
    return float(each.judged.stats["total_expert_bytes" if memory is None else "peak_resident_bytes"])


def _claim(by: dict[str, Accuracy], form: str) -> Claim:
    text = f"fewer whole experts keep more than {form} ones"
    paper = f"{PAPER['ours'][1]} % in {PAPER['ours'][0]} GB against {PAPER[form][1]} % in {PAPER[form][0]} GB"
    small, ours = by[f"{form}, all resident"].value(), by.get(f"ours, {form}'s bytes")
    kept = None if ours is None else ours.value()
    if small is None or kept is None:
        why = "one of the two cannot run on this model: the notes say why."
        return Claim(text, paper, f"{form} {percent(small)}, ours {percent(kept)}", "not measured", why)
    here = f"ours {percent(kept)} against {percent(small)}, in the same memory"
    wider = by[SIXTY].value()
    if wider is not None:
        here += f" (ours with 60 % of the experts: {percent(wider)})"
    apart = gap(by[f"ours, {form}'s bytes"], by[f"{form}, all resident"])
    if apart is not None and not apart.tells:
        return Claim(text, paper, f"{here}: {apart} points", "undecided", FEW)
    verdict = graded([kept >= small])
    why = (
        "rounding each weight changes every expert a little, and answers hardly at all; leaving experts out to fit in "
        f"{form}'s bytes takes most experts from every layer. The paper's eMoE has more memory than its rivals."
    )
    return Claim(text, paper, here, verdict, "" if verdict == "holds" else why)


EXPERIMENT = Experiment(
    name="table3",
    title="Table 3: quantised experts",
    question="In the same memory, are fewer experts or quantised experts better?",
    method="int8 and int4 experts, all resident, against mode resident with as many native experts as take the same "
    "bytes (task-popularity, a plan for every prompt). The paper compares different sizes: 64.5, 57.8 and 30.5 GB.",
    expected="eMoE 98.2 % in 64.5 GB, 8-bit 95.2 % in 57.8 GB, 4-bit 91.5 % in 30.5 GB (Mixtral-8x7B).",
    kind="quality",
    minutes=(1, 5),
    run=run,
    needs=(references,),
)
