"""The quality experiments on made-up measurements: in full, where ways are refused, where nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from emoe import nano
from emoe.bench.reproduce.accuracy import Accuracy, Judged, Similar
from emoe.bench.reproduce.asked import Settings
from emoe.bench.reproduce.experiment import experiment
from emoe.bench.reproduce.findings import Finding, write_finding
from emoe.bench.reproduce.judging import Request
from emoe.bench.reproduce.workbench import Workbench

JUDGED = ("fig10", "fig13", "fig14", "fig15", "table3", "sec57")
TASKS = ("classify", "compare", "converse", "qa", "summarise")


class Made:
    """Measurements that say only what was asked for. worth: of a request, 0 to 1, or None where it is refused."""

    def __init__(self, encoder: bool = True, refuse: Any = lambda request: False) -> None:
        self.encoder, self.refuse = encoder, refuse
        self.asked: list[Request] = []

    def worth(self, request: Request) -> float:
        """Better for `ours` than for others, for small p, for more experts."""
        _, way, memory = request
        if memory is None or way.mode != "resident":
            return 1.0
        share = int(memory.rstrip("%")) / 100 if isinstance(memory, str) else 0.3
        return (0.6 + 0.4 * share) * (1.0 if way.predictor == "task-popularity" else 0.85) - way.p / 1000

    def judged(self, bench: Workbench, requests: Sequence[Request]) -> list[Judged]:
        """Ten tokens of every task."""
        self.asked += requests
        return [
            Judged([], [], [], [], {}, "too small a share")
            if self.refuse(each)
            else Judged(
                list(TASKS),
                [10] * len(TASKS),
                [round(10 * self.worth(each))] * len(TASKS),
                [20.0 / self.worth(each)] * len(TASKS),
                {
                    "rerouted_share": 0.1,
                    "plans": 4,
                    "predictions": {"calls": 3, "seconds": 0.03, "memory_bytes": 10**8},
                    "prefetch": None,
                    "bytes_read": 10**6 * (4 if each[1].prefetch else 1),
                    "peak_resident_bytes": 10**7,
                    "total_expert_bytes": 10**7,
                    "seconds": 2.0 + each[1].p / 100,
                },
            )
            for each in requests
        ]

    def accuracies(self, bench: Workbench, requests: Sequence[Request]) -> list[Accuracy]:
        """With the similarity where there is an encoder."""
        return [
            Accuracy(
                one,
                Similar(list(TASKS), [100 * self.worth(each)] * len(TASKS))
                if self.encoder and one.refused is None
                else Similar([], None),
            )
            for one, each in zip(self.judged(bench, requests), requests, strict=True)
        ]


def _bench(folder: Path, quick: bool, model: str | None = None) -> Workbench:
    lines = [row for row in nano.prompts() if row["task"] in TASKS]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in lines * (1 if quick else 9)))
    return Workbench(
        Settings(folder / "out", model=model, quick=quick, prompts=prompts), lambda *_: None, lambda _: None
    )


def _run(name: str, bench: Workbench, made: Made, monkeypatch: pytest.MonkeyPatch) -> Finding:
    module = import_module(f"emoe.bench.reproduce.experiments.{name}")
    for measure in ("judged", "accuracies"):
        if hasattr(module, measure):
            monkeypatch.setattr(module, measure, getattr(made, measure))
    return experiment(name).run(bench)


@pytest.mark.parametrize("name", JUDGED)
def test_a_full_pass_says_something_of_every_claim(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made()
    found = _run(name, _bench(tmp_path, quick=False), made, monkeypatch)
    assert made.asked and all(claim.verdict != "not measured" and claim.here for claim in found.claims)
    kept = write_finding(tmp_path / name, name, found, {})
    assert all((tmp_path / name / f"{table.name}.csv").stat().st_size < 20_000 for table in kept.tables)
    assert all((tmp_path / name / f"{picture}.svg").is_file() for picture, _ in kept.pictures)


@pytest.mark.parametrize("name", JUDGED)
def test_what_is_refused_is_not_measured_and_said(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(encoder=False, refuse=lambda request: request[2] is not None or request[1].expert_dtype != "native")
    found = _run(name, _bench(tmp_path, quick=True, model=str(nano.path())), made, monkeypatch)
    assert {claim.verdict for claim in found.claims} == {"not measured"}
    assert any("too small a share" in note for note in found.notes)
    assert not any("emoe-nano" in claim.why for claim in found.claims)
    write_finding(tmp_path / name, name, found, {})


def test_the_paper_is_reached_where_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lossless(Made):
        def worth(self, request: Request) -> float:
            return 1.0 if request[1].predictor == "task-popularity" or request[1].mode == "exact" else 0.9

    for name in ("fig14", "fig15", "table3"):
        folder = tmp_path / name
        folder.mkdir()
        found = _run(name, _bench(folder, quick=False), Lossless(), monkeypatch)
        assert [claim.verdict for claim in found.claims] == ["holds"] * len(found.claims), name
