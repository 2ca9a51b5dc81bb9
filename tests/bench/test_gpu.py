"""`make bench-gpu` without a GPU: it says so, and its code runs on a virtual device."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from emoe.residency.devices import device_at


@pytest.fixture(scope="module")
def gpu() -> Any:
    """bench/gpu.py."""
    spec = importlib.util.spec_from_file_location("bench_gpu", Path(__file__).parents[2] / "bench" / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(gpu: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    monkeypatch.setattr("emoe.model.placement.device_at", device_at)  # put back afterwards
    code: int = gpu.main()
    return code


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(gpu, monkeypatch, "--out", str(tmp_path / "out.json")) == 2
    said = capsys.readouterr()
    assert "needs a CUDA device" in said.err and not said.out
    assert not (tmp_path / "out.json").exists()


def test_it_runs_on_a_virtual_device(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    small = ("--prompt-tokens", "24", "--new-tokens", "8", "--rounds", "1", "--budgets", "100", "15")
    assert run(gpu, monkeypatch, "--virtual", "--skip-tests", "--shapes", "tiny", "--out", str(out), *small) == 0
    said = capsys.readouterr().out
    assert "times mean nothing" in said and said == out.with_suffix(".md").read_text()
    found = json.loads(out.read_text())
    (check,) = found["checks"]
    assert check["equal"] and check["budget"] == 15 and check["worst_error"] < gpu.ERROR
    assert said.index("bit for bit") < said.index("| experts on the device |")
    assert [(row["budget"], row["host"], row["on_miss"]) for row in found["rows"]] == [
        (100, "auto", "load"),
        (15, "auto", "load"),
        (15, "0", "load"),
        (15, "auto", "hybrid"),
    ]
    assert not found["wrong"] and found["copies"][0]["pinned"] == pytest.approx(20.0)
    whole, host, staging, _ = found["rows"]
    assert whole["tokens"] == host["tokens"] == staging["tokens"]
    assert whole["copied_per_token"] == 0 < host["copied_per_token"]
    assert host["read_per_token"] == 0 < staging["read_per_token"]


def test_other_logits_than_the_resident_models_are_reported(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = iter(range(9))
    row: dict[str, Any] = {
        "tokens": [1],
        "logits": ["a"],
        "miss_rate": 0.0,
        "ttft_s": 1.0,
        "tokens_per_s": 1.0,
        "copied_per_token": 0.0,
    }
    row |= {"link_share": 0.0, "read_per_token": 0.0, "waits_per_token": 0.0, "device_bytes": 0}
    monkeypatch.setattr("bench.gpu_part.Measured.row", lambda *args: row | {"logits": ["ab"[next(turns) == 2]]})
    check = {"budget": 40, "equal": False, "other_positions": 3, "same_choice": 0.5}
    check |= {"median_error": math.nan, "worst_error": math.nan}
    monkeypatch.setattr("bench.gpu_part.Measured.check", lambda *args: check)
    out = str(tmp_path / "out.json")
    small = ("--virtual", "--skip-tests", "--shapes", "tiny", "--budgets", "100", "40", "--out", out)
    assert run(gpu, monkeypatch, *small) == 1
    said = capsys.readouterr().out
    assert "WRONG: tiny at 40 %, host 0: other logits" in said
    assert "in 3 positions not those: WRONG" in said and "WRONG: tiny: logits nan% off" in said


def test_a_part_that_fails_is_reported_and_the_next_still_runs(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In processes of their own: 1 % of the experts is below the floor, and one shape is not known."""
    out = tmp_path / "out.json"
    small = ("--prompt-tokens", "8", "--new-tokens", "2", "--rounds", "1", "--out", str(out))
    monkeypatch.setattr(gpu.Bench, "ways", lambda self: iter([(1, "auto", "load"), (40, "auto", "load")]))
    monkeypatch.setattr(gpu.Bench, "check", lambda *given: None)  # a process less
    shapes = ("--shapes", "unknown", "tiny")
    assert run(gpu, monkeypatch, "--virtual", "--processes", "--skip-tests", *shapes, *small) == 1
    found = json.loads(out.read_text())
    assert [row["budget"] for row in found["rows"]] == [40]
    parts = [each["part"] for each in found["failed"]]
    assert parts == ["writing unknown", "tiny at 1 %, host auto, load"]
    assert "below the floor" in found["failed"][1]["error"] and "below the floor" in capsys.readouterr().out
    assert len(found["copies"]) == 3


def test_a_part_that_hangs_is_ended(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "GRACE_S", 0.2)
    monkeypatch.setattr(gpu, "COPIES_S", 0.2)  # importing torch takes longer
    out = tmp_path / "out.json"
    small = ("--virtual", "--processes", "--skip-tests", "--shapes", "tiny", "--seconds", "-1", "--out", str(out))
    assert run(gpu, monkeypatch, *small) == 1
    assert "took too long" in json.loads(out.read_text())["failed"][0]["error"]
    assert "not run" in capsys.readouterr().out


def test_what_the_devices_tests_say_is_kept(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tests = tmp_path / "test_two.py"
    tests.write_text("def test_good():\n    pass\n\n\ndef test_bad():\n    assert 1 == 2\n")
    monkeypatch.setattr(gpu, "TESTS", (str(tests),))
    bench = gpu.Bench(argparse.Namespace(seconds=440, out=tmp_path / "out.json"), tmp_path)
    bench.test()
    assert bench.wrong == ["the tests that need a CUDA device failed"]
    assert "test_good PASSED" in (tmp_path / "out.tests.log").read_text()
    assert "test_bad FAILED" in capsys.readouterr().out
    assert "1 failed, 1 passed" in (tmp_path / "out.md").read_text()
