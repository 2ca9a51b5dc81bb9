"""Runs that end early and go on: the file of measurements, and a comparison with engines that only pretend."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from emoe.bench.client import WorkerError
from emoe.bench.peers import comparing
from emoe.bench.peers.comparing import compare
from emoe.bench.peers.entries import PeersSettings
from emoe.bench.peers.journal import Journal
from emoe.bench.peers.report import report_text
from emoe.bench.plant.shapes import PUBLISHED
from emoe.bench.plant.write import plant
from emoe.config import ExpertMemory
from emoe.errors import UsageError
from emoe.profiling.machine import Machine
from tests.bench.plant.made_up import made_up_trace

PREFILL, DECODE = 6, 3
RATES = Machine({}, memory_bytes_per_s={1: 1e9}, disk_direct_bytes_per_s=1e8, flops={"bfloat16": {1: 1e10}})


class Pretender:
    """In place of a worker process: notes what it is asked, fails or interrupts where it is told to."""

    asked: list[tuple[str, str, dict[str, Any]]]
    happens: Callable[[str, str], None]

    def __init__(self, what: str, *_: object) -> None:
        self.what = what

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, operation: str, within_s: float | None = None, **values: Any) -> dict[str, Any]:
        Pretender.happens(self.what, operation)
        Pretender.asked.append((self.what, operation, values))
        if operation == "load":
            return {"load_s": 1.0, "load_peak_bytes": 5, "versions": {"torch": "2"}, "threads": 1}
        counted = {"hits": 10.0, "misses": 2.0, "bytes_read": 1e5} if self.what.startswith("emoe") else {}
        return {
            "first_token_s": float(len(Pretender.asked)),
            "step_s": [0.5] * len(values["forced"]),
            "log_probabilities": [-1.0] * len(values["forced"]),
            "prefill_storage_bytes": 10**6,
            "decode_storage_bytes": 10**6,
            "peak_bytes": 7,
            "prefill": counted,
            "decode": counted,
        }


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    plant(PUBLISHED["tiny-olmoe"], made_up_trace(40).write(folder / "made-up.npz"), 40, folder / "x")
    return folder / "x"


@pytest.fixture(autouse=True)
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def no_cgroup(limit_bytes: int) -> Iterator[Any]:
        yield SimpleNamespace(peak_bytes=limit_bytes // 2)

    Pretender.asked, Pretender.happens = [], lambda *_: None
    monkeypatch.setattr(comparing, "WorkerClient", Pretender)
    monkeypatch.setattr(comparing, "memory_cgroup", no_cgroup)
    monkeypatch.setattr(comparing, "machine_of", lambda *_: RATES)


def settings_of(folder: Path, tmp_path: Path, **changes: Any) -> PeersSettings:
    usual = PeersSettings(
        folder=folder,
        cache=tmp_path,
        memory_limits=("20%", "40%"),
        prefill=PREFILL,
        decode=DECODE,
        rounds=2,
        threads=(1,),
        peers=("emoe", "transformers"),
        modes=("exact",),
        budgets=(ExpertMemory("share", 0.5),),
    )
    return replace(usual, **changes)


def started() -> list[str]:
    return [what for what, operation, _ in Pretender.asked if operation == "load"]


def test_every_row_is_measured_under_every_limit_in_turn(planted: Path, tmp_path: Path) -> None:
    report = compare(settings_of(planted, tmp_path))
    emoe, plain = "emoe exact 50% -t 1", "transformers grouped_mm -t 1"
    assert started() == [emoe, plain, plain, emoe] * 2
    assert [(row.limit.text, row.name, sorted(row.samples)) for row in report.rows] == [
        ("20%", emoe, [0, 1]),
        ("20%", plain, [0, 1]),
        ("40%", emoe, [0, 1]),
        ("40%", plain, [0, 1]),
    ]
    assert all(row.limits.keys() == {"decode", "prefill"} for row in report.rows)
    limits = [limit.nbytes for limit in report.memory_limits]
    assert [row.cgroup_peak_bytes for row in report.rows[::2]] == [(nbytes or 0) // 2 for nbytes in limits]
    assert report_text(report).count("page cache included)") == 2


def test_the_measured_prompt_follows_the_warm_ups_in_the_trace(planted: Path, tmp_path: Path) -> None:
    report = compare(settings_of(planted, tmp_path, peers=("emoe",), memory_limits=("none",), rounds=2))
    fed = [values for _, operation, values in Pretender.asked if operation == "feed"]
    length = PREFILL + DECODE
    assert [one["prompt"][0] for one in fed] == [0, length, 2 * length, 3 * length]
    assert [len(one["forced"]) for one in fed] == [2, DECODE, 2, DECODE]
    sample = report.rows[0].samples[0]
    assert (sample["first_prompt_s"], sample["first_token_s"]) == (2.0, 3.0)
    Pretender.asked.clear()
    first = compare(settings_of(planted, tmp_path, peers=("emoe",), memory_limits=("none",), warmups=0))
    assert [operation for _, operation, _ in Pretender.asked] == ["load", "feed"] * 2
    assert "first_prompt_s" not in first.rows[0].samples[0]


def test_an_interrupted_run_reports_and_goes_on(planted: Path, tmp_path: Path) -> None:
    settings = settings_of(planted, tmp_path, out=tmp_path / "kept.jsonl")

    def interrupt(*_: str) -> None:
        if len(started()) == 5:
            raise KeyboardInterrupt

    Pretender.happens = interrupt
    partial = compare(settings)
    assert partial.interrupted
    assert [sorted(row.samples) for row in partial.rows] == [[0, 1], [0, 1], [], []]
    assert "run the same command to go on" in report_text(partial)
    Pretender.happens = lambda *_: None
    Pretender.asked.clear()
    said: list[str] = []
    whole = compare(settings, said.append)
    assert len(started()) == 4
    assert "4 measurements are in" in said[0]
    assert not whole.interrupted
    assert [sorted(row.samples) for row in whole.rows] == [[0, 1]] * 4
    assert [row.samples for row in whole.rows[:2]] == [row.samples for row in partial.rows[:2]]
    Pretender.asked.clear()
    again = compare(replace(settings, memory_limits=("20%", "40%", "60%"), rounds=1))
    assert len(started()) == 2  # only the new limit's
    assert [row.samples for row in again.rows[:4]] == [row.samples for row in whole.rows]


def test_nothing_is_learnt_where_nothing_is_left_to_measure(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    @contextmanager
    def noted(_: Path, history: str | None, *__: object) -> Iterator[None]:
        asked.append(history)
        yield

    monkeypatch.setattr(comparing, "learned", noted)
    settings = settings_of(planted, tmp_path, out=tmp_path / "kept.jsonl", rounds=1, history="routes.npz")
    compare(settings)
    compare(settings)
    assert asked == ["routes.npz", None]


def test_what_failed_is_kept_too(planted: Path, tmp_path: Path) -> None:
    settings = settings_of(planted, tmp_path, out=tmp_path / "kept.jsonl", memory_limits=("40%",))

    def fail(what: str, operation: str) -> None:
        if what.startswith("transformers") and operation == "feed":
            raise WorkerError(f"{what} was killed")

    Pretender.happens = fail
    failed = compare(settings)
    Pretender.happens = lambda *_: None
    Pretender.asked.clear()
    recalled = compare(settings)
    assert not Pretender.asked
    assert [row.error for row in recalled.rows] == [row.error for row in failed.rows] == [None, "was killed"]
    assert len(recalled.rows[1].loads) == 1


def test_other_conditions_are_refused(planted: Path, tmp_path: Path) -> None:
    settings = settings_of(planted, tmp_path, out=tmp_path / "kept.jsonl", memory_limits=("40%",))
    compare(settings)
    with pytest.raises(UsageError, match=r"other conditions \(warmups: 1 there, 0 now\); give the same ones"):
        compare(replace(settings, warmups=0))
    Journal(tmp_path / "a", {"x": 1, "old": 2})
    with pytest.raises(UsageError, match=r"\(new: None there, 3 now; old: 2 there, None now\)"):
        Journal(tmp_path / "a", {"x": 1, "new": 3})


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "below" / "kept.jsonl"
    journal = Journal(file, {"prefill": 5, "cores": (0, 1)})
    journal.add({"memory_limit": "40%", "name": "a", "round": 0})
    with file.open("a") as out:
        out.write('{"memory_limit": "40%", "na')
    again = Journal(file, {"prefill": 5, "cores": (0, 1)})
    assert [line["round"] for line in again.of("40%", "a")] == [0]
    assert not list(again.of("20%", "a"))
    again.add({"memory_limit": "40%", "name": "a", "round": 1})
    assert [json.loads(line).get("round") for line in file.read_text().splitlines()] == [None, 0, 1]


@pytest.mark.parametrize("content", ["a note to myself", "a note\n", '{"schema": "other/1"}\n', "[1]\n"])
def test_other_files_are_left_alone(content: str, tmp_path: Path) -> None:
    file = tmp_path / "notes"
    file.write_text(content)
    with pytest.raises(UsageError, match="is no file of `emoe bench peers --out`"):
        Journal(file, {})
    assert file.read_text() == content


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be written .*choose another file with --out"):
        Journal(tmp_path, {})
