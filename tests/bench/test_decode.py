"""The whole benchmark, on a checkpoint of less than a MiB and real processes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from emoe.bench import decode
from emoe.bench.client import WorkerClient, WorkerError
from emoe.bench.prompts import prompt_ids
from emoe.bench.random_weights import TOPICS, make_checkpoint
from emoe.bench.results import DecodeReport
from emoe.bench.settings import DecodeSettings, parse_budget
from emoe.errors import BudgetError, UsageError

pytestmark = pytest.mark.slow
RUN = {"prompt_tokens": 24, "new_tokens": 6, "threads": 1, "warmups": 0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("tiny", tmp_path_factory.mktemp("shapes") / "tiny")


@pytest.fixture(scope="module")
def report(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> DecodeReport:
    offload = tmp_path_factory.mktemp("offload")
    settings = DecodeSettings(
        model=str(tiny),
        budgets=(parse_budget("100"), parse_budget("30")),
        baselines=("grouped_mm", "no_such_implementation", "accelerate-disk:30"),
        rounds=2,
        offload_folder=str(offload),
        **RUN,  # type: ignore[arg-type]
    )
    made = decode.run(settings)
    assert not list(offload.iterdir())  # what accelerate wrote is gone
    return made


def test_every_contender_is_measured_in_every_round(report: DecodeReport) -> None:
    assert report.alternating
    assert [(o.name, sorted(o.samples)) for o in report.outcomes if o.error is None] == [
        ("emoe exact 100%", [0, 1]),
        ("emoe exact 30%", [0, 1]),
        ("emoe resident 30%", [0, 1]),
        ("transformers grouped_mm", [0, 1]),
        ("accelerate disk 30%", [0, 1]),
    ]
    for outcome in report.outcomes:
        for sample in outcome.samples.values():
            assert len(sample["tokens"]) == 6
            assert len(sample["step_s"]) == 5
            assert sample["first_token_s"] > 0
            assert sum(sample["step_s"]) == pytest.approx(sample["decode_s"], rel=0.01)


def test_a_contender_that_cannot_run_does_not_stop_the_others(report: DecodeReport) -> None:
    [failed] = report.failed
    assert failed.name == "transformers no_such_implementation"
    assert "no_such_implementation" in (failed.error or "")


def test_exact_repeats_the_full_model_and_counts_what_it_read(report: DecodeReport) -> None:
    assert report.inexact == []
    found = {c["name"]: c for c in json.loads(json.dumps(report.as_dict()))["contenders"]}
    assert found["emoe exact 100%"]["decode_hit_rate"] == 1.0
    exact = found["emoe exact 30%"]
    assert 0 < exact["decode_hit_rate"] < 1
    assert exact["decode_bytes_read_per_token"] > 0
    assert found["emoe resident 30%"]["decode_bytes_read_per_token"] == 0
    assert found["transformers grouped_mm"]["decode_hit_rate"] is None
    assert found["accelerate disk 30%"]["loads"][0]["notes"][0].startswith("accelerate put ")


def test_memory_is_counted_above_the_imports(report: DecodeReport) -> None:
    """A model of 0.7 MiB: importing and first use take a hundred times that, and must not be counted."""
    for outcome in report.outcomes:
        if outcome.error is None:
            assert outcome.peak_bytes is not None
            assert outcome.peak_bytes < 24 * 2**20
            assert outcome.loads[0]["base_bytes"] > 100 * 2**20


def test_one_at_a_time_each_contender_is_started_for_half_the_rounds(tiny: Path) -> None:
    settings = DecodeSettings(
        model=str(tiny),
        budgets=(parse_budget("30"),),
        modes=("exact",),
        baselines=(),
        rounds=2,
        cold=True,
        **RUN,  # type: ignore[arg-type]
    )
    said: list[str] = []
    report = decode.run(settings, said.append)
    assert not report.alternating
    assert len(report.outcomes[0].loads) == 2
    assert sorted(report.outcomes[0].samples) == [0, 1]
    assert [line for line in said if line.startswith("round 2/2  emoe exact 30%: ")]


def test_mistakes_are_refused_before_any_process_starts(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_process(*_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(decode, "WorkerClient", no_process)
    with pytest.raises(UsageError, match="40000 prompt tokens and 32 new ones are more than the 32768 positions"):
        decode.run(DecodeSettings(model=str(tiny), prompt_tokens=40000))
    with pytest.raises(BudgetError, match="floor"):
        decode.run(DecodeSettings(model=str(tiny), budgets=(parse_budget("1"),)))


def test_a_worker_that_dies_is_reported_with_its_end() -> None:
    with WorkerClient("emoe exact 40%") as client:
        os.kill(client._process.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"emoe exact 40% was killed, probably because memory ran out"):
            client.ask("load")


def test_a_worker_that_cannot_answer_says_why() -> None:
    with WorkerClient("x") as client, pytest.raises(WorkerError, match="x failed: KeyError: 'threads'"):
        client.ask("load")


def test_prompts_are_of_one_topic_and_repeatable(tiny: Path) -> None:
    first = prompt_ids(tiny, 3, 50)
    assert first == prompt_ids(tiny, 3, 50)
    assert len(first) == 50
    assert {token % TOPICS for token in first} == {3}
    assert prompt_ids(tiny, 3 + TOPICS, 50) != first
    assert prompt_ids(tiny, 3, 50, seed=1) != first


def test_a_model_with_a_tokenizer_reads_text() -> None:
    from emoe import nano

    ids = [prompt_ids(nano.path(), number, 40) for number in range(4)]
    assert all(len(prompt) == 40 for prompt in ids)
    assert len({tuple(prompt) for prompt in ids}) == 4
