"""`emoe bench serve` against the real server: both sides must tell the same story."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from emoe.bench.serve.report import report_text
from emoe.bench.serve.results import LoadReport
from emoe.bench.serve.run import run
from emoe.bench.serve.settings import LoadSettings
from emoe.bench.serve.targets import Targets
from tests.server.conftest import Running


def load(settings: LoadSettings) -> LoadReport:
    return asyncio.run(run(settings, lambda text: None))


def test_client_and_server_agree(server: Running) -> None:
    targets = {"*": Targets(30.0, 10.0), "qa": Targets(1e-6, 10.0)}
    report = load(LoadSettings(url=f"{server.url}/v1", rate=20, requests=24, max_tokens=6, targets=targets))
    assert report.server.ours
    assert report.server.model == "emoe-nano"
    assert report.summary().successful == 24
    for record in report.records:
        told = record.told
        assert told is not None
        assert told["task"] == record.task == record.label
        assert told["task_source"] == "label"
        target = report.book.of(record.task)
        assert told["slo_ttft_ms"] == pytest.approx((target.ttft_s or 0) * 1e3)
        # The client's clock starts earlier and stops later.
        assert record.ttft_s is not None
        assert record.e2e_s is not None
        assert told["ttft_ms"] / 1e3 <= record.ttft_s
        assert told["e2e_ms"] / 1e3 <= record.e2e_s
        assert told["slo_met"] is record.met is (record.task != "qa")
        assert record.counted
        assert 1 <= record.output_tokens <= 6
    assert report.of_task("qa").met == 0 < report.of_task("qa").requests
    assert f"{'emoe-nano'}" in str(report.as_dict()["server"])
    assert "errors:" not in report_text(report)


def test_wrong_labels_reach_the_server(server: Running) -> None:
    settings = LoadSettings(
        url=server.url, rate=50, requests=10, max_tokens=2, calibration=0, wrong_labels=1.0, task_mix="qa,maths"
    )
    for record in load(settings).records:
        assert record.told is not None
        assert {record.task, record.told["task"]} == {"qa", "maths"}
    unlabelled = load(LoadSettings(url=server.url, rate=50, requests=4, max_tokens=2, calibration=0, labels=False))
    for record in unlabelled.records:
        assert record.told is not None
        assert record.told["task_source"] != "label"


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_lengths_of_an_arrivals_file(server: Running, tmp_path: Path, endpoint: str) -> None:
    """Prompts of about the lengths asked for, answers of exactly those."""
    file = tmp_path / "arrivals.csv"
    lengths = ((64, 3), (200, 5), (400, 2), (3000, 4))
    rows = "".join(f"2023-11-16 18:15:4{i}.5,{context},{answer}\n" for i, (context, answer) in enumerate(lengths))
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    report = load(
        LoadSettings(
            url=server.url,
            arrivals=file,
            time_scale=0.1,
            ignore_eos=True,
            calibration=1,
            task_mix="summarise,qa",
            endpoint=endpoint,  # type: ignore[arg-type]
        )
    )
    assert [record.output_tokens for record in report.records] == [answer for _, answer in lengths]
    for record, (context, _) in zip(report.records[:3], lengths[:3], strict=True):
        assert record.input_tokens == pytest.approx(context, rel=0.35)
    assert (report.records[3].input_tokens or 0) <= 1020
    assert {record.finish for record in report.records} == {"length"}
