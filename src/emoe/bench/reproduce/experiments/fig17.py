"""Figure 17: the longest prompt in the memory of the full model."""

from __future__ import annotations

from typing import Any

from emoe.bench.reach import Reach, longest_prompt
from emoe.bench.reproduce import drawing
from emoe.bench.reproduce.experiment import KEPT, Experiment
from emoe.bench.reproduce.findings import Claim, Finding, Picture, Table
from emoe.bench.reproduce.latency import at_least
from emoe.bench.reproduce.peaks import NEW, SAME, USUAL_PROMPT, base_prompt, facts, largest_run, peak
from emoe.bench.reproduce.room import all_resident
from emoe.bench.reproduce.ways import ALL, OURS
from emoe.bench.reproduce.workbench import Workbench
from emoe.config import ExpertMemory

PAPER = {"OpenMoE": 16.0, "Mixtral": 40.0}
PAPER_LESS = {"OpenMoE": 1 - 14 / 24, "Mixtral": 1 - 59 / 96}
MIB = 2**20


def run(bench: Workbench) -> Finding:
    """The planner's longest prompts, read in one pass and in short ones; then prompts as long as that, run."""
    of, share = facts(bench), bench.share
    base = base_prompt(of)
    memory = ExpertMemory.parse(share)
    reaches = [longest_prompt(of, memory, base, NEW, chunk) for chunk in (None, 2 * base)]
    full, ours = peak(bench, ALL, 1, base), peak(bench, OURS, 1, base)
    runs = [_longest_run(bench, reach, SAME * full) for reach in reaches]
    rows: list[tuple[Any, ...]] = [
        ("all", base, None, 1.0, mib(full), 1.0),
        (share, base, None, 1.0, mib(ours), round(ours / full, 3)),
    ]
    for reach, found in zip(reaches, runs, strict=True):
        for tokens in sorted({reach.found, found}):
            measured = peak(bench, OURS, 1, tokens, reach.chunk)
            rows.append((share, tokens, reach.chunk, round(tokens / base, 2), mib(measured), round(measured / full, 3)))
    most = max(runs) / base
    longer = at_least(most, PAPER["OpenMoE"], 2.0)
    less = 1 - ours / full
    smaller = at_least(less, PAPER_LESS["Mixtral"], 0.2)
    of_weights = of.expert_bytes / (of.expert_bytes + of.dense_bytes)
    claims = (
        Claim(
            f"with {share} of the experts a far longer prompt fits in the full model's memory",
            "16x (OpenMoE, 512 to 8,192 tokens), 40x (Mixtral, 512 to 20,480)",
            "planned "
            + ", ".join(f"{reach.times:.1f}x{_passes(reach)}" for reach in reaches)
            + "; run "
            + ", ".join(f"{found / base:.1f}x ({base} to {found:,} tokens)" for found in runs),
            longer,
            ""
            if longer == "holds"
            else f"Holds from 16x on, partly from 2x on, by what was run: its peak above the imports must be within "
            f"{SAME} of the full model's, {full / MIB:.0f} MiB. {reaches[0].freed_bytes / MIB:.0f} MiB of experts are "
            f"left out; where that is little, what PyTorch itself takes for a long prompt counts as much.",
        ),
        Claim(
            f"at the base prompt {share} of the experts take less memory",
            "42 % less (OpenMoE), 39 % less (Mixtral)",
            f"{less:.0%} less ({ours / MIB:.1f} and {full / MIB:.1f} MiB above the imports)",
            smaller,
            ""
            if smaller == "holds"
            else f"Holds from 39 % on, partly from 20 % on. {of_weights:.0%} of the weights are experts, of which all "
            f"but {share} are "
            f"left out; the rest is dense weights, cache, and what PyTorch takes to run at all.",
        ),
    )

    def draw() -> Any:
        figure, axes = drawing.panels(2, width=4.4, height=3.4)
        left, right = axes[0]
        names = ["all experts", f"{share},\none pass", f"{share}, passes\nof {2 * base}"]
        series: dict[str, list[float | None]] = {
            "planned": [None, *(float(reach.found) for reach in reaches)],
            "run in that memory": [float(base), *map(float, runs)],
        }
        drawing.bars(left, names, series, "longest prompt, tokens")
        left.set_xticks(range(3), names, rotation=0)
        for name, times in PAPER.items():
            drawing.paper_line(left, times * base, f"paper: {times:g}x ({name})")
        left.set_ylim(top=1.3 * max(*PAPER.values(), *(reach.times for reach in reaches)) * base)
        drawing.legend(left)
        curves = {
            f"{share}, {'one pass' if chunk is None else f'passes of {chunk}'}": sorted(
                (float(row[1]), row[4]) for row in rows if row[0] == share and (row[2] == chunk or row[1] == base)
            )
            for chunk in (None, 2 * base)
        }
        curves["all experts"] = [(float(base), full / MIB)]
        drawing.lines(right, curves, "prompt, tokens", "peak memory above imports, MiB")
        right.axhline(full / MIB, color="black", linewidth=0.8, linestyle=":")
        right.set_ylim(bottom=0)
        right.margins(x=0.06)
        drawing.legend(right)
        return figure

    caption = (
        f"Left: the longest prompts in the full model's memory, by the planner's arithmetic and as run. Right: peaks "
        f"of prompts run, {NEW} tokens of answer each; dotted: the full model's at {base} tokens."
    )
    note = (
        f"Base: a prompt of {base} tokens with every expert resident (the paper's is 512{_few(of.max_context)}). "
        f"Peaks are of processes of their own, above what they held after their imports."
    )
    columns = ("experts", "prompt tokens", "passes of", "times", "peak MiB, measured", "of the full model's peak")
    table = Table("prompts", "Longest prompts", columns, tuple(rows))
    return Finding(claims, (table,), (Picture("prompts", caption, draw),), (note,))


def _longest_run(bench: Workbench, reach: Reach, limit: float) -> int:
    return largest_run(bench, reach.found, reach.base, limit, lambda tokens: peak(bench, OURS, 1, tokens, reach.chunk))


def _few(positions: int | None) -> str:
    """Why the base is shorter than the paper's."""
    return "" if positions is None or positions >= 32 * USUAL_PROMPT else f"; this model has {positions:,} positions"


def _passes(found: Reach) -> str:
    return "" if found.chunk is None else f" in passes of {found.chunk}"


def mib(value: float) -> float:
    """For a table."""
    return round(value / MIB, 2)


EXPERIMENT = Experiment(
    name="fig17",
    title="Figure 17: the longest prompt",
    question="How much longer a prompt fits in the memory that all experts need?",
    method=(
        f"The planner finds the longest prompt with {KEPT} in the memory of the full model at a base prompt, in one "
        "pass and in short ones. Then it is run, and shorter ones until the measured peak fits."
    ),
    expected="16 times as long on OpenMoE, 40 times on Mixtral; 42 and 39 % less memory at 512 tokens.",
    kind="speed",
    needs=(all_resident,),
    minutes=(1, 4),
    run=run,
)
