"""What Figures 1, 2, 12, 16 to 19 measure with: real models in each way, and verdicts on numbers that are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe import nano
from emoe.bench.reproduce import latency, load, peaks, ways
from emoe.bench.reproduce.asked import Settings
from emoe.bench.reproduce.experiments import fig1, fig2, fig12, fig16, fig17, fig18, fig19
from emoe.bench.reproduce.findings import Finding, write_finding
from emoe.bench.reproduce.ways import ALL, BARE, DEMAND, MATCHING, NEXT_GATE, OURS, STORES, Request, Store
from emoe.bench.reproduce.workbench import Workbench
from emoe.bench.serve.comparing import Outcome
from emoe.errors import BudgetError
from emoe.planner import facts_of
from emoe.scheduling.arrivals import Arrival
from emoe.simulation.serving_traffic import Prompt
from emoe.tasks.profile import Profile

SPEED = {ALL: 1.0, OURS: 1.05, DEMAND: 2.5, NEXT_GATE: 2.8, MATCHING: 1.4, BARE: 6.0}
"""Seconds of a batch of one, in the stubs below."""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    """emoe-nano, quick, with the profile that it ships with instead of one made anew."""
    made = Workbench(Settings(tmp_path, quick=True), lambda what, done, total: None, lambda text: None)
    monkeypatch.setattr(Workbench, "trained", lambda self, *names: Profile.read(nano.profile_path()))
    monkeypatch.setattr(Workbench, "profile", Profile.read(nano.profile_path()))
    monkeypatch.setattr(ways, "_slowed", lambda bench: SLOWED)
    return made


SLOWED = {"bytes_per_s": 2e8, "expert_nbytes": 245760.0, "load_s": 1.2e-3, "layer_s": 1.8e-4}


def fed(bench: Workbench, way: str, store: Store) -> Request:
    """The second of two batches of one."""
    with ways.opened(bench, way, store) as running:
        ways.feed(running, ways.sequences(bench, 1, 40), 24)
        return Request.of(ways.feed(running, ways.sequences(bench, 1, 40, 1), 24), 40)


def test_each_way_loads_what_its_name_says(bench: Workbench) -> None:
    found = {way: fed(bench, way, "slowed") for way in (ALL, BARE, DEMAND, OURS)}
    assert found[ALL].loads == found[ALL].wait_s == found[OURS].wait_s == 0
    assert found[BARE].loads > found[DEMAND].loads > 0
    # One load at a time is slowed to the store's speed: what was waited for is at least most of that.
    assert found[BARE].wait_s > 0.3 * found[BARE].bytes_read / SLOWED["bytes_per_s"]
    assert found[BARE].bytes_read == pytest.approx(found[BARE].loads * SLOWED["expert_nbytes"])


def test_prefetchers_run_with_exact_routes(bench: Workbench) -> None:
    for way in (NEXT_GATE, MATCHING):
        seconds = ways.batches(bench, way, "as it is", batch=2, prompt=8, new=2, repeats=2, round=0)
        assert len(seconds) == 2 and min(seconds) > 0


def test_sequences_differ_by_row_and_turn_and_repeat(bench: Workbench) -> None:
    rows = ways.sequences(bench, 3, 20) + ways.sequences(bench, 3, 20, 1)
    assert len({tuple(row) for row in rows}) == 6 and {len(row) for row in rows} == {20}
    assert ways.sequences(bench, 3, 20, 1) == rows[3:]


@given(st.integers(1, 60), st.integers(1, 2000), st.integers(0, 2500), st.booleans())
def test_the_largest_that_runs_is_found(least: int, more: int, fits: int, quick: bool) -> None:
    planned, asked = least + more, []

    def measure(size: int) -> float:
        asked.append(size)
        return float(size)

    stub = cast(Workbench, SimpleNamespace(pick=lambda few, many: few if quick else many))
    found = peaks.largest_run(stub, planned, least, float(fits), measure)
    assert least <= found <= planned
    assert found <= fits or found == least
    if fits >= planned:
        assert found == planned and asked == [planned]
    elif found > least:
        assert fits < 2 * found + 2  # at most halved too often by one


def test_a_worker_replays_given_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from emoe.bench import forced, worker

    seen: list[Any] = []

    def replay(running: Any, ids: Any, prompt: int, base: int, chunk: Any) -> Any:
        seen.append((ids, prompt, chunk))
        return SimpleNamespace(as_dict=dict)

    monkeypatch.setattr(forced, "replay", replay)
    worker.Worker().replay({"ids": [[1, 2, 3]], "prompt_tokens": 2, "chunk": None})
    assert seen == [([[1, 2, 3]], 2, None)]


# -- verdicts on known numbers ----------------------------------------------------------------------------------


def stub(quick: bool = True, **more: Any) -> Any:
    """A workbench whose cells are computed at once."""

    def cells(of: str, keys: Sequence[Mapping[str, Any]], compute: Callable[..., Any]) -> list[Any]:
        return [compute(**key) for key in keys]

    settings = SimpleNamespace(quick=quick, arrivals=None, model=None)
    values = {"pick": lambda few, many: few if quick else many, "cells": cells, "settings": settings}
    values |= {"share": "60%", "name": "stub", "planned": lambda experts=None: SimpleNamespace(fit="all")}
    values |= {"frozen": False}
    return SimpleNamespace(**values | more)


def verdicts(found: Finding, tmp_path: Path) -> list[str]:
    """Of the claims; the finding is written too, pictures and all."""
    write_finding(tmp_path / "finding", "x", found, {})
    return [claim.verdict for claim in found.claims]


def rounds(names: Sequence[str], slow: Mapping[str, float]) -> ways.Rounds:
    """Three rounds of two requests; all computing but what is above a second, where the store is slowed."""
    return {
        (way, store): [
            [Request(s, 0.1, max(0.0, s - 1), 1e6, 4, 60) for s in (value, value)]
            for value in [slow[way] if store == "slowed" else 1.0] * 3
        ]
        for way in names
        for store in STORES
    }


@pytest.mark.parametrize("figure", [fig1, fig2])
def test_requests_are_judged_by_their_ratios(figure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure, "requests", lambda bench, names: rounds(names, SPEED))
    monkeypatch.setattr(figure, "about_stores", lambda bench: "")
    counts = SimpleNamespace(counts=nano_counts)
    found = figure.run(stub(recorded=lambda side: (counts, [])))
    assert verdicts(found, tmp_path) == ["holds"] * 3
    monkeypatch.setattr(figure, "requests", lambda bench, names: rounds(names, dict.fromkeys(SPEED, 1.0)))
    assert "does not hold" in [claim.verdict for claim in figure.run(stub(recorded=lambda side: (counts, []))).claims]


def test_without_room_for_every_expert_the_rest_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what compares with all of them says why not; experiments that are about that refuse beforehand."""

    def planned(experts: str | None = None) -> Any:
        fits = "some" if experts == "60%" else "none"
        return SimpleNamespace(fit=fits, total_bytes=2 << 30, memory_bytes=1 << 30, memory_source="allowed")

    counts = SimpleNamespace(counts=nano_counts)
    tight = stub(recorded=lambda side: (counts, []), planned=planned)
    for figure, verdict in ((fig1, "not measured holds holds"), (fig2, "holds holds not measured")):
        monkeypatch.setattr(figure, "requests", lambda bench, names: rounds(names, SPEED))
        monkeypatch.setattr(figure, "about_stores", lambda bench: "")
        found = figure.run(tight)
        assert " ".join(verdicts(found, tmp_path)) == verdict
        assert any("stub with every expert resident takes 2.00 GiB" in note for note in found.notes), found.notes
    monkeypatch.setattr(fig16, "batches", lambda bench, way, batch, repeats, **key: [SPEED[way] * batch] * repeats)
    monkeypatch.setattr(fig16, "about_stores", lambda bench: "")
    assert verdicts(fig16.run(tight), tmp_path) == ["not measured", "holds", "holds"]
    for figure in (fig12, fig17, fig18):
        with pytest.raises(BudgetError, match="every expert resident takes"):
            figure.EXPERIMENT.check(tight)
    nothing = stub(planned=lambda experts=None: planned("x"))
    with pytest.raises(BudgetError, match="or a smaller --share"):
        fig2.EXPERIMENT.check(nothing)


def nano_counts() -> Any:
    """Two prompts that touch three quarters of the experts."""
    import numpy as np

    counts = np.ones((2, 2, 4), dtype=np.int64)
    counts[:, :, 0] = 0
    return counts


def test_latency_is_of_the_mean_request_of_the_middle_round() -> None:
    each = [[Request(s, 0, 0, 0, 0, 1) for s in row] for row in ((1.0, 3.0), (10.0, 0.0), (1.0, 1.0))]
    assert latency.latency({(ALL, "slowed"): each}, ALL, "slowed") == 2.0
    assert latency.at_least(2.2, 2.2, 1) == "holds" and latency.at_least(1.0, 2.2, 1) == "partly"
    assert latency.at_most(1.1, 1.1, 1.3) == "holds" and latency.at_most(1.31, 1.1, 1.3) == "does not hold"


@pytest.mark.parametrize(
    ("seconds", "verdict"),
    [((3.5, 3.6, 3.4), "holds"), ((3.5, 3.6, 2.0), "holds"), ((3.5, 3.6, 1.2), "undecided"), ((1, 1, 4), "undecided")],
)
def test_rounds_that_contradict_each_other_decide_nothing(seconds: tuple[float, ...], verdict: str) -> None:
    found: ways.Rounds = {
        (BARE, "slowed"): [[Request(s, 0, 0, 0, 0, 1)] for s in seconds],
        (ALL, "slowed"): [[Request(1.0, 0, 0, 0, 0, 1)]] * 3,
    }
    assert latency.by_round(found, BARE, ALL, lambda value: latency.at_least(value, 3.2, 1.5))[0] == verdict


def test_batches_are_judged_by_the_middle_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fig16, "batches", lambda bench, way, batch, repeats, **key: [SPEED[way] * batch] * repeats)
    monkeypatch.setattr(fig16, "about_stores", lambda bench: "")
    assert verdicts(fig16.run(stub()), tmp_path) == ["holds"] * 3


@pytest.mark.parametrize(("fits", "verdict"), [(True, "holds"), (False, "does not hold")])
def test_what_was_run_decides_how_far_memory_reaches(
    fits: bool, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = 100e6

    def peak(bench: Any, way: str, batch: int, prompt: int, chunk: int | None = None) -> float:
        return full if way == ALL else 0.6 * full if fits or (batch, prompt) in ((1, 32), (4, 32)) else 2 * full

    for figure in (fig17, fig18):
        monkeypatch.setattr(figure, "peak", peak)
        monkeypatch.setattr(figure, "facts", lambda bench: facts_of(None)[1])
    monkeypatch.setattr(fig18, "batches", lambda bench, way, batch, repeats, **key: [1.0] * repeats)
    monkeypatch.setattr(fig18, "about_stores", lambda bench: "")
    longest = fig17.run(stub())
    assert verdicts(longest, tmp_path / "17") == [verdict, "holds"]
    assert [row[1] for row in longest.tables[0].rows][:2] == [32, 32]
    assert verdicts(fig18.run(stub()), tmp_path / "18") == [verdict, verdict]


class Sim:
    """Latency grows with the rate; each scheduler and each wrong label has its factor."""

    def __init__(self, factors: Mapping[str, float], wrong: float) -> None:
        self.factors, self.wrong = factors, wrong

    def run(self, system: str, arrivals: Sequence[Arrival], seed: int, wrong: float = 0.0) -> Outcome:
        rate = (len(arrivals) - 1) / arrivals[-1].at_s
        return Outcome(1.0, 0.9, rate * self.factors[system] * (1 + self.wrong * min(wrong, 0.2)), 0.1)


def serving(monkeypatch: pytest.MonkeyPatch, figure: Any, sim: Sim) -> None:
    monkeypatch.setattr(figure, "simulated", lambda bench: sim)
    monkeypatch.setattr(figure, "usual_rate", lambda bench, sim: 0.5)
    monkeypatch.setattr(figure, "about_stores", lambda bench: "")


def test_latency_under_load_is_judged_on_the_same_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serving(monkeypatch, fig12, Sim({load.PLAIN: 1.0, "fifo": 1.2, "emoe": 1.15, "affinity": 0.9}, 0))
    monkeypatch.setattr(fig12, "engine_costs", lambda bench: {"step_s": 0.001})
    assert verdicts(fig12.run(stub()), tmp_path) == ["does not hold", "partly", "holds"]


def test_a_full_pass_is_judged_by_what_ran_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serving(monkeypatch, fig12, Sim(dict.fromkeys(load.SYSTEMS, 1.0), 0))
    monkeypatch.setattr(fig12, "engine_costs", lambda bench: {"step_s": 0.001})

    def live(bench: Any, systems: Sequence[str], loads: Sequence[Any], seed: int) -> list[list[dict[str, float]]]:
        seconds = {load.REROUTED: 0.5, "emoe": 0.8}
        return [[Outcome(1, 1, seconds.get(name, 1.0), 0.1).as_dict() for name in systems] for _ in loads]

    monkeypatch.setattr(fig12, "live_runs", live)
    assert verdicts(fig12.run(stub(quick=False)), tmp_path) == ["holds", "holds", "does not hold"]


@pytest.mark.parametrize(("cost", "verdict"), [(0.4, "holds"), (0.7, "partly"), (2.0, "does not hold")])
def test_wrong_labels_are_judged_by_latency(
    cost: float, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving(monkeypatch, fig19, Sim({"emoe": 1.0, "affinity": 1.0}, cost))
    assert verdicts(fig19.run(stub()), tmp_path) == [verdict, "holds"]


def test_a_files_arrivals_keep_their_bursts_at_another_rate_and_length() -> None:
    given = [Arrival(0.0, 1000, 100), Arrival(1.0, 3000, 300), Arrival(10.0, 2000, 200)]
    routes = SimpleNamespace(prompts={"qa": [Prompt(0, 50, 50, 10)]})
    sim = cast(load.Simulated, SimpleNamespace(routes=routes, lengths={"qa": SimpleNamespace(mean=20.0)}))
    found = load.scaled(given, 0.5, sim)
    assert found == [Arrival(0.0, 25, 10), Arrival(0.4, 75, 30), Arrival(4.0, 50, 20)]
