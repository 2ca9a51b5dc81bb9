"""Figure 19: what wrong task labels cost."""

from __future__ import annotations

from typing import Any

from emoe.bench.reproduce import drawing
from emoe.bench.reproduce.experiment import KEPT, Experiment
from emoe.bench.reproduce.findings import Claim, Finding, Picture, Table
from emoe.bench.reproduce.latency import at_most
from emoe.bench.reproduce.load import live_runs, simulated, usual_rate
from emoe.bench.reproduce.room import share_resident
from emoe.bench.reproduce.ways import about_stores, middle
from emoe.bench.reproduce.workbench import Workbench
from emoe.scheduling.arrivals import poisson_arrivals

SYSTEMS = ("emoe", "affinity")
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
LIVE_SHARES = (0.0, 0.2, 0.6, 1.0)
LOAD = 1.5
"""Times the load of Figure 12 at which fifo meets most targets: schedulers have something to choose."""
PAPER_COST = 1.10

Latencies = dict[tuple[str, float], list[dict[str, float]]]
"""Outcomes by (system, share), one for each seed."""


def run(bench: Workbench) -> Finding:
    """The same requests with more and more labels wrong."""
    sim = simulated(bench)
    rate = LOAD * usual_rate(bench, sim)
    count = bench.pick(150, 400)
    keys: list[dict[str, Any]] = [
        {"system": system, "share": share, "seed": seed, "count": count}
        for share in SHARES
        for system in SYSTEMS
        for seed in range(bench.pick(4, 10))
    ]

    def one(system: str, share: float, seed: int, count: int) -> dict[str, float]:
        found: dict[str, float] = sim.run(system, poisson_arrivals(rate, count, seed), seed, share).as_dict()
        return found

    kinds: dict[str, Latencies] = {"simulated": {}}
    for key, value in zip(keys, bench.cells("fig19 simulated", keys, one), strict=True):
        kinds["simulated"].setdefault((key["system"], key["share"]), []).append(value)
    if not bench.settings.quick:
        kinds["live"] = _live(bench, rate)
    kind = next(reversed(kinds))
    judged = kinds[kind]
    few = {system: middle(over(judged, system, 0.2)) for system in SYSTEMS}
    flat = {system: middle(over(judged, system, 1.0)) / few[system] for system in SYSTEMS}
    cheap, plateau = at_most(few["emoe"], PAPER_COST, 1.2), at_most(flat["emoe"], 1.1, 1.25)
    also = "" if kind == "simulated" else f"; simulated {_percent(middle(over(kinds['simulated'], 'emoe', 0.2)))}"
    claims = (
        Claim(
            "20 % wrong labels cost little latency",
            "under 10 % more",
            f"emoe {_percent(few['emoe'])}, affinity {_percent(few['affinity'])} ({kind}{also})",
            cheap,
            "" if cheap == "holds" else "Holds up to 10 %, partly up to 20 %. " + WHY,
        ),
        Claim(
            "more wrong labels cost little more: a plateau",
            "a plateau after 20 %",
            f"all labels wrong over 20 %: emoe {_percent(flat['emoe'])}, affinity {_percent(flat['affinity'])} "
            f"({kind})",
            plateau,
            "" if plateau == "holds" else "Holds up to 10 % between 20 % and all, partly up to 25 %. " + WHY,
        ),
    )
    rows = tuple(
        (
            name,
            system,
            share,
            round(middle([each["latency_s"] for each in found[system, share]]), 4),
            *(round(value, 3) for value in (middle(ratios), min(ratios), max(ratios))),
            round(middle([each["met_share"] for each in found[system, share]]), 3),
        )
        for name, found in kinds.items()
        for system, share in found
        for ratios in (over(found, system, share),)
    )
    columns = (
        "kind",
        "scheduler",
        "wrong labels",
        "mean latency s",
        "times none wrong",
        "least",
        "most",
        "targets met",
    )

    def draw() -> Any:
        figure, axes = drawing.panels(len(kinds), width=4.8)
        for ax, (name, found) in zip(axes[0], kinds.items(), strict=True):
            shares = sorted({share for _, share in found})
            curves = {s: [(100 * share, middle(over(found, s, share))) for share in shares] for s in SYSTEMS}
            limits = {s: [(min(v), max(v)) for v in (over(found, s, share) for share in shares)] for s in SYSTEMS}
            drawing.lines(ax, curves, "wrong labels, %", "mean latency / with right labels", name, spread=limits)
            drawing.paper_points(ax, [(20.0, PAPER_COST)], f"paper: under {PAPER_COST:g} here, then a plateau")
            ax.set_ylim(bottom=0)
            drawing.legend(ax)
        return figure

    caption = (
        f"Mean latency over that of the same requests with right labels, at {rate:.2f} requests/s: medians of the "
        f"seeds, shaded from the least to the greatest."
    )
    table = Table("labels", "Latency by the share of wrong labels", columns, rows)
    return Finding(claims, (table,), (Picture("labels", caption, draw),), (about_stores(bench),))


WHY = (
    "A label says which experts a request will use and how long its answer will be; schedulers that use it more lose "
    "more when it is wrong."
)


def over(found: Latencies, system: str, share: float) -> list[float]:
    """Mean latency over that of the same requests with right labels, one for each seed."""
    pairs = zip(found[system, share], found[system, 0.0], strict=True)
    return [one["latency_s"] / right["latency_s"] for one, right in pairs]


def _live(bench: Workbench, rate: float) -> Latencies:
    def one(seed: int) -> list[list[dict[str, float]]]:
        return live_runs(bench, SYSTEMS, [(rate, share) for share in LIVE_SHARES], seed)

    by: Latencies = {}
    for shares in bench.cells("fig19 live", [{"seed": seed} for seed in (1, 2)], one):
        for share, outcomes in zip(LIVE_SHARES, shares, strict=True):
            for system, outcome in zip(SYSTEMS, outcomes, strict=True):
                by.setdefault((system, share), []).append(outcome)
    return by


def _percent(times: float) -> str:
    return f"{times - 1:+.0%}"


EXPERIMENT = Experiment(
    name="fig19",
    title="Figure 19: wrong task labels",
    question="How much latency do wrong task labels cost?",
    method=(
        "The same requests are served with 0 to 100 % of their labels exchanged for another task's, by Algorithm 1 "
        f"and by affinity, with {KEPT}, store slowed; simulated, and in the full pass by `emoe serve` too."
    ),
    expected="20 % wrong labels cost under 10 % latency; then a plateau.",
    kind="speed",
    minutes=(0.5, 10),
    run=run,
    needs=(share_resident,),
)
