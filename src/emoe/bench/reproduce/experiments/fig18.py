"""Figure 18: the largest batch in the memory of the full model, and the throughput at it."""

from __future__ import annotations

from typing import Any

from emoe.bench.reach import largest_batch
from emoe.bench.reproduce import drawing
from emoe.bench.reproduce.experiment import KEPT, Experiment
from emoe.bench.reproduce.experiments.fig17 import MIB, mib
from emoe.bench.reproduce.findings import Claim, Finding, Picture, Table
from emoe.bench.reproduce.latency import at_least
from emoe.bench.reproduce.peaks import NEW, SAME, base_prompt, facts, largest_run, peak
from emoe.bench.reproduce.room import all_resident
from emoe.bench.reproduce.ways import ALL, OURS, STORES, Store, about_stores, batches, middle, rotated
from emoe.bench.reproduce.workbench import Workbench
from emoe.config import ExpertMemory

BATCH = 4
PAPER = {"OpenMoE": 2.0, "Mixtral": 4.5}
PAPER_RATE = (1.3, 1.5)


def run(bench: Workbench) -> Finding:
    """The planner's largest batch, run: its peak, and tokens per second beside the full model's base batch."""
    of, share = facts(bench), bench.share
    prompt = base_prompt(of)
    found = largest_batch(of, ExpertMemory.parse(share), prompt, NEW, BATCH)
    full = peak(bench, ALL, BATCH, prompt)
    fits = largest_run(bench, found.found, BATCH, SAME * full, lambda batch: peak(bench, OURS, batch, prompt))
    ran = list(dict.fromkeys([(ALL, BATCH), (OURS, fits), (OURS, found.found)]))
    keys: list[dict[str, Any]] = [
        {"way": way, "store": store, "batch": size, "prompt": prompt, "new": NEW, "repeats": 4, "round": turn}
        for turn in range(bench.pick(3, 5))
        for store in STORES
        for way, size in rotated(ran, turn)
    ]
    rates: dict[tuple[str, int, Store], list[float]] = {}
    for key, seconds in zip(keys, bench.cells("batches", keys, lambda **one: batches(bench, **one)), strict=True):
        tokens = key["batch"] * NEW * len(seconds)
        rates.setdefault((key["way"], key["batch"], key["store"]), []).append(tokens / sum(seconds))

    def times(size: int, store: Store) -> float:
        return middle(rates[OURS, size, store]) / middle(rates[ALL, BATCH, store])

    larger = at_least(fits / BATCH, PAPER["OpenMoE"], 1.2)
    faster = at_least(times(fits, "slowed"), PAPER_RATE[0], 1.05)
    claims = (
        Claim(
            f"with {share} of the experts a larger batch fits in the full model's memory",
            "2x (OpenMoE, 4 to 8), 4.5x (Mixtral, 4 to 18)",
            f"planned {found.times:.2f}x ({BATCH} to {found.found}); run {fits / BATCH:.2f}x ({BATCH} to {fits})",
            larger,
            ""
            if larger == "holds"
            else f"Holds from 2x on, partly from 1.2x on, by what was run: its peak above the imports must be within "
            f"{SAME} of the full model's, {full / MIB:.0f} MiB here. {found.freed_bytes / MIB:.0f} MiB of experts are "
            f"left out; where that is little, what PyTorch itself takes for a batch counts as much.",
        ),
        Claim(
            "the larger batch has the higher throughput",
            "1.3x to 1.4x (OpenMoE), 1.3x to 1.5x (Mixtral)",
            "; ".join(
                f"{times(size, 'slowed'):.2f}x (slowed store), {times(size, 'as it is'):.2f}x as it is at {what} {size}"
                for what, size in (("the batch that fitted,", fits), ("the planned one,", found.found))
            ),
            faster,
            ""
            if faster == "holds"
            else "Holds from 1.3x on, partly from 1.05x on, at the batch that fitted. A batch that grows little gains "
            "little, and rerouting itself takes time.",
        ),
    )
    peaks = {(way, size): peak(bench, way, size, prompt) for way, size in ran}
    rows = tuple(
        (way, size, store, *(round(value, 1) for value in (middle(each), min(each), max(each))), mib(peaks[way, size]))
        for way, size in ran
        for store in STORES
        for each in (rates[way, size, store],)
    )
    columns = ("experts", "batch", "store", "tokens/s", "slowest round", "fastest round", "peak MiB, measured")

    def draw() -> Any:
        figure, axes = drawing.panels(3, width=3.2)
        labels = [f"{'all' if way == ALL else share},\n{size}" for way, size in ran]
        names = ["all experts", f"{share} (eMoE)"]
        series: dict[str, list[float | None]] = {
            "planned": [None, float(found.found)],
            "run in that memory": [float(BATCH), float(fits)],
        }
        drawing.bars(axes[0][0], names, series, "largest batch, requests")
        drawing.legend(axes[0][0])
        for name, ratio in PAPER.items():
            drawing.paper_line(axes[0][0], ratio * BATCH, f"paper: {ratio:g}x ({name})")
        axes[0][0].set_ylim(top=1.35 * max(float(found.found), *(ratio * BATCH for ratio in PAPER.values())))
        axes[0][0].yaxis.get_major_locator().set_params(integer=True)
        drawing.bars(axes[0][1], labels, {"peak": [peaks[each] / MIB for each in ran]}, "peak above imports, MiB")
        by_store = {f"store {store}": [middle(rates[way, size, store]) for way, size in ran] for store in STORES}
        drawing.bars(axes[0][2], labels, by_store, "tokens of answers per second")
        for ratio in PAPER_RATE:
            drawing.paper_line(axes[0][2], ratio * middle(rates[ALL, BATCH, "slowed"]), f"paper: {ratio:g}x")
        axes[0][2].set_ylim(top=1.35 * axes[0][2].get_ylim()[1])  # room for the names
        drawing.legend(axes[0][2])
        axes[0][0].set_xticks(range(2), names, rotation=0)
        for ax in axes[0][1:]:
            ax.set_xticks(range(len(ran)), labels, rotation=0)
        return figure

    caption = f"Batches of prompts of {prompt} tokens and {NEW} of answer: the largest, its peak and its throughput."
    table = Table("batches", "Batches in the same memory", columns, rows)
    return Finding(claims, (table,), (Picture("batches", caption, draw),), (about_stores(bench),))


EXPERIMENT = Experiment(
    name="fig18",
    title="Figure 18: the largest batch and its throughput",
    question="How much larger a batch fits in the memory that all experts need, and is it faster?",
    method=(
        f"The planner finds the largest batch with {KEPT} in the memory of the full model's batch of {BATCH}. It is "
        "run, and smaller ones until the measured peak fits; the throughput of that one is measured beside the full "
        "model's; rounds alternate."
    ),
    expected="2 times the batch on OpenMoE, 4.5 times on Mixtral; throughput 1.3 to 1.5 times.",
    kind="speed",
    needs=(all_resident,),
    minutes=(1, 4),
    run=run,
)
