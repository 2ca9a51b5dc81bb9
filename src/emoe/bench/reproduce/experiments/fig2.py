"""Figure 2: does prefetching make loading during inference viable?"""

from __future__ import annotations

from emoe.bench.reproduce.experiment import KEPT, Experiment
from emoe.bench.reproduce.experiments.fig1 import SPREAD
from emoe.bench.reproduce.findings import Claim, Finding
from emoe.bench.reproduce.latency import at_least, at_most, by_round, latency, means, requests_picture, requests_table
from emoe.bench.reproduce.room import share_resident
from emoe.bench.reproduce.ways import (
    ALL,
    DEMAND,
    MATCHING,
    NEXT_GATE,
    OURS,
    Rounds,
    about_stores,
    fitting,
    middle,
    requests,
)
from emoe.bench.reproduce.workbench import Workbench

WAYS = (ALL, OURS, DEMAND, NEXT_GATE, MATCHING)
PAPER = {NEXT_GATE: (2.5, 3.5), MATCHING: (1.25, 1.5)}


def run(bench: Workbench) -> Finding:
    """Requests in each way, over what they take with ours."""
    share_resident(bench)
    ways, missing = fitting(bench, WAYS)
    found = requests(bench, ways)
    demand = latency(found, DEMAND, "slowed") / latency(found, OURS, "slowed")
    claims = []
    for way, name in ((NEXT_GATE, "prefetching for the next layer"), (MATCHING, "prefetching by like prompts")):
        low, high = PAPER[way]
        slowed, free = (latency(found, way, store) / latency(found, OURS, store) for store in ("slowed", "as it is"))
        verdict, rounds = by_round(found, way, OURS, lambda value, low=low: at_least(value, low, 1.1))  # type: ignore[misc]
        why = (
            f"Holds from {low:g}x on, partly from 1.1x on. A prefetcher here steps aside while it makes things slower, "
            f"so it costs no more than loading on demand. {rounds}"
        )
        claims.append(
            Claim(
                f"{name} still costs latency beside eMoE",
                f"{low:g}x to {high:g}x",
                f"{slowed:.2f}x (slowed store; without prefetching {demand:.2f}x), {free:.2f}x with the store as it is",
                verdict,
                "" if verdict == "holds" else why,
            )
        )
    claims.append(_near(found, " ".join(missing)))
    picture = requests_picture(found, ways, OURS, PAPER, "paper")
    notes = (about_stores(bench), SPREAD, RIVALS, *missing)
    return Finding(tuple(claims), (requests_table(bench, found, ways),), (picture,), notes)


def _near(found: Rounds, missing: str) -> Claim:
    """Ours beside all resident, where that fits."""
    text, paper = "eMoE is about as fast as all experts resident", "about 1x"
    if (ALL, "slowed") not in found:
        return Claim(text, paper, "", "not measured", missing)
    ours = latency(found, OURS, "slowed") / latency(found, ALL, "slowed")
    waits = middle(
        [a / b for a, b in zip(means(found, OURS, "slowed", "wait_s"), means(found, OURS, "slowed"), strict=True)]
    )
    verdict, rounds = by_round(found, OURS, ALL, lambda value: at_most(value, 1.1, 1.3))
    why = (
        f"Holds up to 1.1x, partly up to 1.3x. {waits:.0%} of eMoE's time is waiting for loads; the rest of what it "
        f"takes more is making plans and choosing other experts. {rounds}"
    )
    return Claim(text, paper, f"{ours:.2f}x (slowed store)", verdict, "" if verdict == "holds" else why)


RIVALS = (
    "Next-gate prefetching asks the next layer's router with this layer's input, as Pre-gated MoE does without its "
    "retrained gates; MoE-Infinity-style looks for the earlier prompts that were routed most alike and loads what they "
    "used. Both are emoe's own, with the same memory, exact routes, and least-stale eviction."
)

EXPERIMENT = Experiment(
    name="fig2",
    title="Figure 2: prefetching",
    question="Does prefetching hide what loading on demand costs?",
    method=(
        f"The requests of Figure 1, with {KEPT} kept and prefetched by the next layer's gate or by like prompts "
        "(MoE-Infinity's way), beside loading on demand, eMoE (resident mode) and all experts resident."
    ),
    expected="Prefetching by the next gate takes 2.5 to 3.5 times eMoE's latency, MoE-Infinity 1.25 to 1.5 times.",
    kind="speed",
    needs=(share_resident,),
    minutes=(1, 8),
    run=run,
)
