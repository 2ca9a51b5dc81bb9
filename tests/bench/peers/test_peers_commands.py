"""`emoe bench peers` from its options to its exit code, with comparisons that only pretend."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from emoe.bench.peers import commands, comparing, report
from emoe.bench.peers.commands import INTERRUPTED, add_peers
from emoe.bench.peers.entries import PeersSettings
from emoe.errors import UsageError


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_peers(parser)
    args = parser.parse_args(words)
    code: int = args.run(args)
    return code


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is compared, and what the next comparison gives."""
    seen: list[Any] = []
    outcome = SimpleNamespace(interrupted=False, failed=False, as_dict=lambda: {"rows": 7})

    def compare(settings: PeersSettings, say: Any) -> Any:
        seen.append(settings)
        say("measuring")
        return outcome

    monkeypatch.setattr(comparing, "compare", compare)
    monkeypatch.setattr(report, "report_text", lambda found: "a table" if found is outcome else "")
    seen.append(outcome)
    return seen


def test_the_exit_code_says_how_it_went(
    compared: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = compared[0]
    assert run(str(tmp_path), "--threads", "1,2", "--rounds", "3") == 0
    assert compared[1].folder == tmp_path and (compared[1].threads, compared[1].rounds) == ((1, 2), 3)
    assert capsys.readouterr().out == "a table\n"
    outcome.failed = True
    assert run(str(tmp_path), "--json") == 1
    assert json.loads(capsys.readouterr().out) == {"rows": 7}
    outcome.interrupted = True
    assert run(str(tmp_path)) == INTERRUPTED


def test_the_defaults_are_those_that_are_told(compared: list[Any], tmp_path: Path) -> None:
    run(str(tmp_path))
    usual = PeersSettings(folder=tmp_path, cache=compared[1].cache, memory_limits=("40%",))
    for name in ("prefill", "decode", "rounds", "threads", "peers", "modes", "timeout_s", "decode_s", "warmups"):
        assert getattr(compared[1], name) == getattr(usual, name), name


def test_building_needs_no_checkpoint_and_measuring_does(
    compared: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[Path] = []

    def build(cache: Path) -> Path:
        built.append(cache)
        return cache / "python"

    monkeypatch.setattr(commands, "build_llama", build)
    assert run("--build-llama-cpp", "--cache", str(tmp_path)) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'python'}\n" and f"building llama.cpp in {tmp_path}: " in printed.err
    assert built == [tmp_path] and len(compared) == 1
    assert run(str(tmp_path), "--build-llama-cpp", "--cache", str(tmp_path)) == 0
    assert len(built) == 2 and len(compared) == 2
    with pytest.raises(UsageError, match="name the checkpoint's folder"):
        run()
    with pytest.raises(UsageError, match="is no folder"):
        run(str(tmp_path / "none"))
