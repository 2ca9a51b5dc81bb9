"""`emoe bench plant`: what it prints, and when it fails."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from emoe.bench.plant.card import CARD, read_card
from emoe.cli import main
from tests.bench.plant.made_up import made_up_trace

TOKENS = 40


def plant(folder: Path, *more: str) -> int:
    trace = made_up_trace(TOKENS).write(folder / "made-up.npz")
    words = f"bench plant --shape tiny-mixtral --trace {trace} --tokens {TOKENS} --out {folder / 'x'} --json"
    return main([*words.split(), *more])


def test_a_share_for_the_next_gate_is_planted_kept_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plant(tmp_path, "--next-gate", "75%") == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["wrong"] == 0
    assert found["next_gate"] == read_card(tmp_path / "x").next_gate == pytest.approx(0.75, abs=0.03)
    prefill, *_ = found["checked"]
    assert prefill["next_gate"] == pytest.approx(found["next_gate"], abs=0.01)
    assert f"asked a layer early, is right about {found['next_gate']:.1%} of a token's experts" in printed.err

    card = replace(read_card(tmp_path / "x"), next_gate=0.5)
    (tmp_path / "x" / CARD).write_text(json.dumps(card.as_dict()))
    assert main(["bench", "plant", "--out", str(tmp_path / "x"), "--check"]) == 1
    assert "(planted: 50.0%)" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["0%", "101%", "0.79", "often"])
def test_shares_that_are_none_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str) -> None:
    with pytest.raises(SystemExit):
        plant(tmp_path, "--next-gate", word)
    assert f"must be above 0% and at most 100%, e.g. 79%, not {word!r}" in capsys.readouterr().err


def test_a_share_without_anything_to_write_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "plant", "--out", str(tmp_path), "--check", "--next-gate", "79%"]) == 2
    assert "--next-gate plants, so it needs --shape" in capsys.readouterr().err
