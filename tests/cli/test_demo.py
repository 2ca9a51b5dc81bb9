"""`emoe demo`."""

from __future__ import annotations

import json

import pytest

from emoe import nano
from emoe.cli import main

TASKS = {prompt["task"] for prompt in nano.prompts()}


def test_every_task_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "-n", "6", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {row["task"] for row in shown["prompts"]} == TASKS
    full, exact, resident = shown["summary"]
    assert full["identical"] == exact["identical"] == full["prompts"] == len(TASKS)
    assert exact["resident_bytes"] <= 0.4 * shown["plan"]["expert_bytes"] < full["resident_bytes"]
    assert resident["resident_bytes"] <= 0.4 * shown["plan"]["expert_bytes"]
    assert full["hit_rate"] == 1
    assert full["bytes_read"] == 0
    assert exact["rerouted_share"] == 0 < resident["rerouted_share"]


def test_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "-n", "3", "--expert-memory", "4/layer"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("emoe-nano (qwen3_moe")
    for task in TASKS:
        assert f"[{task}]" in printed.out
    assert "exact, 4/layer" in printed.out
    assert "same text" in printed.out
    assert "LOSSY" in printed.err
