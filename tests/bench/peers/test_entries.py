"""What is measured, from the options; and what follows from the numbers."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emoe.bench.peers.commands import add_peers, peers_settings
from emoe.bench.peers.entries import Entry, PeersSettings, entries
from emoe.bench.peers.results import PeersReport, Row, report_text
from emoe.config import ExpertMemory
from emoe.errors import UsageError

HALF, ALL = ExpertMemory("share", 0.5), ExpertMemory("share", 1.0)


def settings_of(tmp_path: Path, *words: str) -> PeersSettings:
    parser = argparse.ArgumentParser()
    add_peers(parser)
    return peers_settings(parser.parse_args([str(tmp_path), "--cache", str(tmp_path / "cache"), *words]))


def entries_of(settings: PeersSettings, **changes: Any) -> list[Entry]:
    usual: dict[str, Any] = {
        "budgets": {dtype: (HALF,) for dtype in settings.expert_dtypes},
        "cpu_bytes": 1000,
        "llama_python": Path("/llama/python"),
        "ggufs": {dtype: Path(f"/x-{dtype}.gguf") for dtype in settings.expert_dtypes},
        "airllm": True,
        "accelerate": True,
        "llama_resident": dict.fromkeys(settings.expert_dtypes, False),
    }
    return entries(settings, **(usual | changes))


def test_every_peer_at_every_number_of_threads(tmp_path: Path) -> None:
    made = entries_of(settings_of(tmp_path))
    assert [entry.name for entry in made] == [
        "emoe exact 50% -t 1",
        "emoe resident 50% -t 1",
        "emoe exact 50% -t 2",
        "emoe resident 50% -t 2",
        "transformers grouped_mm -t 1",
        "transformers grouped_mm -t 2",
        "accelerate disk -t 1",
        "accelerate disk -t 2",
        "airllm -t 1",
        "airllm -t 2",
        "llama.cpp mmap -t 1",
        "llama.cpp mmap -t 2",
    ]
    assert not [entry for entry in made if entry.missing]
    assert all((entry.contender is None) != (entry.llama is None) for entry in made)
    assert made[-1].llama == {
        "gguf": "/x-native.gguf",
        "threads": 2,
        "load_mode": "mmap",
        "repack": False,
        "context": 544,
    }
    assert 'max_memory={"cpu": 1000}' in made[6].command


def test_what_is_not_installed_says_how(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "--threads", "1")
    made = {e.peer: e for e in entries_of(settings, llama_python=None, airllm=False, accelerate=False)}
    assert made["airllm"].missing == "not installed: pip install airllm"
    assert made["accelerate"].missing == "not installed: pip install accelerate"
    assert (
        made["llama.cpp"].missing == f"not installed: emoe bench peers --build-llama-cpp --cache {tmp_path / 'cache'}"
    )
    assert made["emoe"].missing is None
    no_file = entries_of(settings, ggufs={"native": "no GGUF: gguf is not installed"})
    assert no_file[-1].missing == "no GGUF: gguf is not installed"


def test_without_mmap_only_where_everything_fits_and_modes_only_where_not(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "--threads", "1", "--peers", "emoe,llama.cpp", "--memory-limit", "none")
    made = entries_of(settings, budgets={"native": (ALL,)}, llama_resident={"native": True})
    assert [entry.name for entry in made] == ["emoe exact 100% -t 1", "llama.cpp mmap -t 1", "llama.cpp no-mmap -t 1"]
    assert made[-1].llama is not None
    assert made[-1].llama["repack"] is True


def test_quantised_experts_stand_beside_quantised_experts(tmp_path: Path) -> None:
    made = entries_of(settings_of(tmp_path, "--threads", "1", "--modes", "exact", "--expert-dtypes", "int8,int4"))
    assert [(entry.name, entry.precision) for entry in made] == [
        ("emoe exact 50% int8 -t 1", "int8"),
        ("emoe exact 50% int4 -t 1", "int4"),
        ("llama.cpp mmap int8 -t 1", "int8"),
        ("llama.cpp mmap int4 -t 1", "int4"),
    ]
    assert made[1].options == {"expert_dtype": "int4"}


def test_the_limit_is_a_share_a_size_or_none(tmp_path: Path) -> None:
    assert settings_of(tmp_path).limit_bytes(1000) == 400
    assert settings_of(tmp_path, "--memory-limit", "2KiB").limit_bytes(1000) == 2048
    assert settings_of(tmp_path, "--memory-limit", "none").limit_bytes(1000) is None
    with pytest.raises(UsageError, match="lots"):
        settings_of(tmp_path, "--memory-limit", "lots").limit_bytes(1000)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--peers", "emoe,vllm"), "peers are among emoe, transformers, accelerate, airllm, llama.cpp, not 'vllm'"),
        (("--peers", ""), "not nothing"),
        (("--modes", "fast"), "no mode is called 'fast'"),
        (("--expert-dtypes", "fp8"), "expert dtypes are among native, int8, int4, not 'fp8'"),
        (("--threads", "one"), "threads must be numbers, as 1,2, not 'one'"),
        (("--threads", "0"), "threads must be numbers from 1"),
        (("--decode", "1"), "decode must be at least 2, not 1"),
        (("--rounds", "0"), "rounds must be at least 1, not 0"),
    ],
)
def test_mistakes_are_refused(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        settings_of(tmp_path, *words)


def test_a_folder_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no folder"):
        settings_of(tmp_path / "nowhere")
    parser = argparse.ArgumentParser()
    add_peers(parser)
    with pytest.raises(UsageError, match="name the checkpoint's folder"):
        peers_settings(parser.parse_args([]))


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


@pytest.fixture
def report(tmp_path: Path) -> PeersReport:
    settings = settings_of(tmp_path)
    rows = {entry.name: Row(entry) for entry in entries_of(settings)}
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
    return PeersReport(settings, 2**32, machine, model, list(rows.values()), {"torch": "2"})


def test_ratios_are_of_the_best_threads_of_each_side(report: PeersReport) -> None:
    found = {(ratio.emoe, ratio.measure): (round(ratio.times, 6), ratio.peer) for ratio in report.ratios()}
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
    assert {ratio.peer for ratio in report.ratios()} == {"accelerate disk -t 1"}


def test_the_text_says_what_was_measured_and_what_not(report: PeersReport) -> None:
    text = report_text(report)
    assert "planted: text is not real" in text
    assert "memory cgroup of 4.00 GiB (50% of the checkpoint, page cache included)" in text
    assert "the disk reads ahead 128.00 KiB" in text
    assert "emoe exact 50% -t 1: decode 4.00 times llama.cpp mmap -t 2" in text
    assert "not measured  transformers grouped_mm -t 1: was killed: it needs more" in text
    assert "emoe exact 50% -t 1: OMP_NUM_THREADS=1 emoe.load(" in text
    llama = next(line for line in text.splitlines() if line.startswith("llama.cpp mmap -t 1 "))
    assert " ".join(llama.split()) == "llama.cpp mmap -t 1 0.50 4 6.00 1.00 MiB 1.00 GiB 1.00 GiB 0.5000"


def test_json_has_every_row(report: PeersReport) -> None:
    values = report.as_dict()
    assert values["schema"] == "emoe-bench-peers/1"
    rows = {row["name"]: row for row in values["rows"]}
    assert len(rows) == 12
    assert rows["emoe exact 50% -t 1"]["decode_tokens_per_s"] == {"median": 5.0, "min": 4.0, "max": 6.0}
    assert rows["llama.cpp mmap -t 1"]["log_probability_difference"] == 0.5
    assert rows["transformers grouped_mm -t 1"]["error"].endswith("it needs more")
    assert rows["transformers grouped_mm -t 1"]["decode_tokens_per_s"] is None
    assert values["memory_limit_bytes"] == 2**32
