"""What follows from a comparison's numbers, and the text and JSON of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emoe.bench.limits import Limit
from emoe.bench.peers.entries import Entry, MemoryLimit, PeersSettings
from emoe.bench.peers.report import report_text
from emoe.bench.peers.results import PeersReport, Row
from emoe.bench.settings import Contender
from emoe.profiling.roofline import Floor

HALF, NONE = MemoryLimit("50%", 2**32), MemoryLimit("none", None)


def sample(rate: float, first_s: float, log_probabilities: tuple[float, ...] = (-1.0, -2.0)) -> dict[str, Any]:
    return {
        "first_token_s": first_s,
        "step_s": [1 / rate] * 4,
        "log_probabilities": list(log_probabilities),
        "prefill_storage_bytes": 2**30,
        "decode_storage_bytes": 4 * 2**20,
        "peak_bytes": 2**30,
        "prefill": {},
        "decode": {},
    }


def row(peer: str, how: str, threads: int, limit: MemoryLimit = HALF) -> Row:
    contender = Contender("emoe", mode="exact") if peer == "emoe" else None
    entry = Entry(peer, how, "native", threads, f"run {peer}", contender, cores=(3, 5)[:threads])
    return Row(entry, limit)


@pytest.fixture
def report(tmp_path: Path) -> PeersReport:
    settings = PeersSettings(folder=tmp_path, cache=tmp_path, cores=(3, 5))
    made = [
        *(row("emoe", f"{mode} 50%", threads) for threads in (1, 2) for mode in ("exact", "resident")),
        row("transformers", "grouped_mm", 1),
        row("accelerate", "disk", 1),
        *(row("llama.cpp", "mmap", threads) for threads in (1, 2)),
    ]
    rows = {one.name: one for one in made}
    figures = {
        "emoe exact 50% -t 1": [sample(4, 3), sample(6, 5)],
        "emoe exact 50% -t 2": [sample(3, 2), sample(3, 2)],
        "emoe resident 50% -t 1": [sample(8, 4), sample(8, 4)],
        "llama.cpp mmap -t 1": [sample(0.5, 6, (-1.0, -2.5)), sample(0.5, 6)],
        "llama.cpp mmap -t 2": [sample(1.25, 8), sample(1.25, 8)],
        "accelerate disk -t 1": [sample(0.25, 40), sample(0.25, 40)],
    }
    for name, samples in figures.items():
        rows[name].samples = dict(enumerate(samples))
        rows[name].loads = [{"load_s": 1.0, "load_peak_bytes": 2**29, "versions": {"torch": "2"}}] * 2
    rows["transformers grouped_mm -t 1"].error = "was killed: it needs more"
    machine = {"cpu": "a CPU", "cpus": 2, "memory_bytes": 2**34, "read_ahead_bytes": 2**17}
    model = {
        "name": "planted",
        "model_type": "olmoe",
        "dtype": "bfloat16",
        "checkpoint_bytes": 2**33,
        "layers": 10,
        "experts_per_layer": 64,
        "top_k": 8,
        "label": "planted: text is not real",
    }
    return PeersReport(settings, (HALF,), machine, model, list(rows.values()), {"torch": "2"}, unlimited="no rates")


def test_ratios_are_of_the_best_threads_of_each_side(report: PeersReport) -> None:
    found = {
        (one["emoe"], one["measure"]): (round(one["times"], 6), one["peer"])
        for one in (ratio.as_dict() for ratio in report.ratios())
    }
    assert found == {
        ("emoe exact 50% -t 1", "decode"): (4.0, "llama.cpp mmap -t 2"),
        ("emoe exact 50% -t 2", "first token"): (3.0, "llama.cpp mmap -t 1"),
        ("emoe resident 50% -t 1", "decode"): (6.4, "llama.cpp mmap -t 2"),
        ("emoe resident 50% -t 1", "first token"): (1.5, "llama.cpp mmap -t 1"),
    }


def test_other_precisions_are_no_match(report: PeersReport) -> None:
    for row in report.rows:
        if row.entry.peer == "llama.cpp":
            row.entry = replace(row.entry, precision="int8")
    assert {ratio.as_dict()["peer"] for ratio in report.ratios()} == {"accelerate disk -t 1"}


def test_the_text_says_what_was_measured_and_what_not(report: PeersReport) -> None:
    text = report_text(report)
    assert "planted: text is not real" in text
    assert "memory cgroup of 4.00 GiB (50% of the checkpoint, page cache included)" in text
    assert "the disk reads ahead 128.00 KiB" in text
    assert "pinned, -t 1: core 3, -t 2: cores 3,5; whole processes" in text
    assert "no share of the limit: no rates" in text
    assert "LOSSY: mode resident\n" in text
    assert "not measured at 50%  transformers grouped_mm -t 1: was killed: it needs more" in text
    assert "emoe exact 50% -t 2: OMP_NUM_THREADS=2 taskset -c 3,5 run emoe" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "llama.cpp mmap -t 1 0.50 4 6.00 6.00 1.00 MiB 1.00 GiB 1.00 GiB 0.5000" in lines
    summary = "50% exact 50% 5.00 -t 1 4.00 llama.cpp mmap -t 2 1.25 2.00 -t 2 3.00 llama.cpp mmap -t 1 6.00"
    assert summary in lines


def test_each_limit_has_its_own_table_and_best_peer(report: PeersReport) -> None:
    faster, fastest = row("emoe", "exact 100%", 1, NONE), row("llama.cpp", "no-mmap", 1, NONE)
    faster.samples, fastest.samples = {0: sample(10, 2)}, {0: sample(20, 3) | {"first_prompt_s": 9.0}}
    alone = row("emoe", "exact 20%", 1, MemoryLimit("20%", 2**31))
    alone.samples = {0: sample(1, 1)}
    report.rows += [faster, fastest, alone]
    report.memory_limits = (HALF, NONE, alone.limit)
    lines = [" ".join(line.split()) for line in report_text(report).splitlines()]
    assert (
        "none exact 100% 10.00 -t 1 0.50 llama.cpp no-mmap -t 1 20.00 2.00 -t 1 1.50 llama.cpp no-mmap -t 1 3.00"
        in lines
    )
    assert "20% exact 20% 1.00 -t 1 none measured 1.00 -t 1 none measured" in lines
    table = lines[lines.index("no memory limit") :]
    assert [line.split(" -t ")[0] for line in table[3:5]] == ["emoe exact 100%", "llama.cpp no-mmap"]
    assert "9.00" in table[4]
    found = [one for one in report.as_dict()["ratios"] if one["memory_limit"] == "20%"]
    assert [one["times"] for one in found] == [None, None]


def test_shares_of_the_limit_say_what_bounds_them(report: PeersReport) -> None:
    report.unlimited = None
    report.rates = {"memory_bytes_per_s": {1: 2e10}, "disk_direct_bytes_per_s": 1.5e9}
    report.rows[0].limits = {"decode": Limit(Floor(0.2, 0.1, 0.2, 0.05, "link"), 0.8, "direct")}
    text = report_text(report)
    assert "this machine at best: memory 20.0 GB/s (-t 1), disk 1.50 GB/s" in text
    assert text.count("80% (link)") == 2  # in the table and in the summary
    assert report.as_dict()["rows"][0]["roofline"]["decode"]["share"] == 0.8


def test_an_interrupted_run_says_so(report: PeersReport) -> None:
    report.interrupted = True
    assert "INTERRUPTED: not every row has 2 rounds; --out FILE would keep it" in report_text(report)
    assert report.as_dict()["interrupted"] is True


def test_json_has_every_row(report: PeersReport) -> None:
    values = report.as_dict()
    assert values["schema"] == "emoe-bench-peers/2"
    rows = {row["name"]: row for row in values["rows"]}
    assert len(rows) == 8
    assert rows["emoe exact 50% -t 1"]["decode_tokens_per_s"] == {"median": 5.0, "min": 4.0, "max": 6.0}
    assert rows["llama.cpp mmap -t 1"]["log_probability_difference"] == 0.5
    assert rows["transformers grouped_mm -t 1"]["error"].endswith("it needs more")
    assert rows["transformers grouped_mm -t 1"]["decode_tokens_per_s"] is None
    assert values["memory_limits"] == [{"memory_limit": "50%", "bytes": 2**32}]
    assert rows["emoe exact 50% -t 2"]["cores"] == (3, 5)
