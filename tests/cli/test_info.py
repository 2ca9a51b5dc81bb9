"""`emoe info`: a bug report's facts, and no secret."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import emoe
from emoe.cli import main


def test_it_says_what_runs_and_keeps_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abc")
    monkeypatch.setenv("EMOE_API_KEY", "sk-abc")
    monkeypatch.setenv("CUDA_DB_PASSWD", "abc")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:abc@mirror.example/models")
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path / "not" / "yet"))
    assert main(["info", "--json"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed)
    assert "abc" not in printed
    assert found["variables"]["HF_TOKEN"] == found["variables"]["EMOE_API_KEY"] == "(set)"
    assert found["variables"]["HF_ENDPOINT"] == "https://...@mirror.example/models"
    assert found["emoe"].startswith(emoe.__version__)
    assert found["packages"]["torch"] == torch.__version__
    assert found["cache"] == str(tmp_path / "not" / "yet")
    assert 0 < found["free_bytes"] <= found["memory_bytes"]
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(found) and all(line[10:12] == "  " for line in lines)


def test_it_tells_of_a_torch_and_of_kernels_that_do_not_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EMOE_KERNELS", "none")
    assert main(["info"]) == 0
    assert "EMOE_KERNELS is 'none'; it can be auto, native or torch" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["info"]) == 0
    assert "torch       cannot be imported: " in capsys.readouterr().out


def test_it_tells_of_a_cuda_that_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(number: int) -> str:
        raise RuntimeError("CUDA unknown error")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", fails)
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"] == ["CUDA fails: CUDA unknown error"]
