"""Figure 1: is loading the routed experts during inference viable?"""

from __future__ import annotations

from emoe.bench.reproduce.experiment import KEPT, Experiment
from emoe.bench.reproduce.findings import Claim, Finding
from emoe.bench.reproduce.latency import at_least, by_round, latency, means, requests_picture, requests_table
from emoe.bench.reproduce.ways import (
    ALL,
    BARE,
    DEMAND,
    OURS,
    Rounds,
    Store,
    about_stores,
    fitting,
    in_words,
    middle,
    requests,
)
from emoe.bench.reproduce.workbench import Workbench

WAYS = (ALL, BARE, DEMAND, OURS)
PAPER_TIMES = (3.2, 5.0)
PAPER_TRANSFER = (2.2, 3.6)
PAPER_TOUCHED = (0.67, 0.78)


def run(bench: Workbench) -> Finding:
    """Requests in each way that fits; experts touched are counted in the routes."""
    ways, missing = fitting(bench, WAYS)
    found = requests(bench, ways)
    touched = (bench.recorded("score")[0].counts() > 0).mean(axis=(1, 2))
    waits = middle(
        [
            a / b
            for a, b in zip(
                means(found, BARE, "slowed", "wait_s"), means(found, BARE, "slowed", "compute_s"), strict=True
            )
        ]
    )
    share = float(touched.mean())
    longer = at_least(waits, PAPER_TRANSFER[0], 1.0)
    wide = at_least(share, PAPER_TOUCHED[0], 0.5)
    length = middle(means(found, BARE, "slowed", "tokens"))
    claims = (
        _slower(found, in_words(bench.share), " ".join(missing)),
        Claim(
            "the transfer takes longer than computing",
            "2.2x (OpenMoE), 3.6x (Mixtral)",
            f"{waits:.1f}x (slowed store, nothing kept)",
            longer,
            "" if longer == "holds" else "Holds from 2.2x on, partly from 1x on.",
        ),
        Claim(
            "a request touches most experts",
            "67 % (OpenMoE), 78 % (Mixtral)",
            f"{share:.0%} on average ({touched.min():.0%} to {touched.max():.0%})",
            wide,
            ""
            if wide == "holds"
            else f"Holds from 67 % on, partly from 50 % on. A request has {length:.0f} tokens, prompt and answer.",
        ),
    )
    base, paper = (ALL, {BARE: PAPER_TIMES}) if ALL in ways else (BARE, {})
    picture = requests_picture(found, ways, base, paper, "paper (OpenMoE, Mixtral)")
    notes = (about_stores(bench), SPREAD, *missing)
    return Finding(claims, (requests_table(bench, found, ways),), (picture,), notes)


def _slower(found: Rounds, share: str, missing: str) -> Claim:
    """On demand beside all resident, where that fits."""
    text, paper = "loading experts on demand multiplies a request's latency", "3.2x (OpenMoE), 5x (Mixtral)"
    if (ALL, "slowed") not in found:
        return Claim(text, paper, "", "not measured", missing)

    def times(way: str, store: Store = "slowed") -> float:
        return latency(found, way, store) / latency(found, ALL, store)

    here = (
        f"{times(BARE):.1f}x with nothing kept (slowed store), {times(BARE, 'as it is'):.1f}x with the store as it is"
    )
    if (DEMAND, "slowed") in found:
        here += f"; {times(DEMAND):.1f}x with {share} kept (slowed store)"
    verdict, rounds = by_round(found, BARE, ALL, lambda value: at_least(value, PAPER_TIMES[0], 1.5))
    why = f"Holds from 3.2x on, partly from 1.5x on. {rounds}"
    return Claim(text, paper, here, verdict, "" if verdict == "holds" else why)


SPREAD = (
    "Latency is that of a round's mean request, so that plans count, and the median of three rounds. eMoE makes one "
    "plan in a round: every 8 requests in the quick pass, every 40 (the paper's p) in the full one."
)

EXPERIMENT = Experiment(
    name="fig1",
    title="Figure 1: loading experts during inference",
    question="Is loading the routed experts on demand, during inference, viable?",
    method=(
        "The same requests, one after another, with all experts resident, loaded on demand with nothing but one "
        f"layer's k kept, loaded on demand with {KEPT} kept, and with as many as eMoE; rounds alternate. The store is "
        "slowed so that a load costs what it does on Mixtral over PCIe; with the store as it is (the page cache) "
        "besides."
    ),
    expected=(
        "On demand costs 3.2 and 5 times the latency of all experts resident; the transfer alone takes 2.2 and 3.6 "
        "times the compute; a request touches 67 and 78 % of the experts."
    ),
    kind="speed",
    minutes=(1, 8),
    run=run,
)
