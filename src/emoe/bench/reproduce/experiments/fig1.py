"""Figure 1: is loading the routed experts during inference viable?"""

from __future__ import annotations

from emoe.bench.reproduce.experiment import Experiment
from emoe.bench.reproduce.findings import Claim, Finding
from emoe.bench.reproduce.latency import at_least, latency, means, requests_picture, requests_table
from emoe.bench.reproduce.ways import ALL, BARE, DEMAND, OURS, about_stores, middle, requests
from emoe.bench.reproduce.workbench import Workbench

WAYS = (ALL, BARE, DEMAND, OURS)
PAPER_TIMES = (3.2, 5.0)
PAPER_TRANSFER = (2.2, 3.6)
PAPER_TOUCHED = (0.67, 0.78)


def run(bench: Workbench) -> Finding:
    """Requests in each way; experts touched are counted in the routes."""
    found = requests(bench, WAYS)
    touched = (bench.recorded("score")[0].counts() > 0).mean(axis=(1, 2))
    times = {way: latency(found, way, "slowed") / latency(found, ALL, "slowed") for way in WAYS}
    free = latency(found, BARE, "as it is") / latency(found, ALL, "as it is")
    waits = middle(
        [
            a / b
            for a, b in zip(
                means(found, BARE, "slowed", "wait_s"), means(found, BARE, "slowed", "compute_s"), strict=True
            )
        ]
    )
    share = float(touched.mean())
    slower = at_least(times[BARE], PAPER_TIMES[0], 1.5)
    longer = at_least(waits, PAPER_TRANSFER[0], 1.0)
    wide = at_least(share, PAPER_TOUCHED[0], 0.5)
    length = middle(means(found, ALL, "slowed", "tokens"))
    claims = (
        Claim(
            "loading experts on demand multiplies a request's latency",
            "3.2x (OpenMoE), 5x (Mixtral)",
            f"{times[BARE]:.1f}x with nothing kept, {times[DEMAND]:.1f}x with 60 % kept (slowed store); "
            f"{free:.1f}x from the page cache",
            slower,
            "" if slower == "holds" else "Holds from 3.2x on, partly from 1.5x on.",
        ),
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
    picture = requests_picture(found, WAYS, ALL, {BARE: PAPER_TIMES}, "paper (OpenMoE, Mixtral)")
    notes = (about_stores(bench), SPREAD)
    return Finding(claims, (requests_table(found, WAYS),), (picture,), notes)


SPREAD = (
    "Latency is that of a round's mean request, so that plans count, and the median of three rounds. eMoE makes one "
    "plan in a round: every 8 requests in the quick pass, every 40 (the paper's p) in the full one."
)

EXPERIMENT = Experiment(
    name="fig1",
    title="Figure 1: loading experts during inference",
    question="Is loading the routed experts on demand, during inference, viable?",
    method=(
        "The same requests, one after another, with all experts resident, loaded on demand (nothing but one layer's k "
        "kept, and 60 % kept), and with 60 % of them as eMoE; rounds alternate. The store is slowed so that a load "
        "costs what it does on Mixtral over PCIe; with the store as it is (the page cache) besides."
    ),
    expected=(
        "On demand costs 3.2 and 5 times the latency of all experts resident; the transfer alone takes 2.2 and 3.6 "
        "times the compute; a request touches 67 and 78 % of the experts."
    ),
    kind="speed",
    minutes=(1, 8),
    run=run,
)
