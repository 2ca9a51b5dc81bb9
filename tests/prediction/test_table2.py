"""The command bench/table2.py."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoe.prediction.protocol import RoutingShape
from emoe.prediction.scoring import BOUND, SIMPLE
from tests.prediction.histories import routes_by_task, trace_of

TABLE: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "table2.py"))


def test_the_command_prints_a_row_for_each_predictor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, shape = np.random.default_rng(0), RoutingShape(2, 8, 2)
    tasks = [int(rng.integers(3)) for _ in range(40)]
    routes = [routes_by_task(rng, shape, 12, task) for task in tasks]
    file = trace_of(shape, routes, [str(task) for task in tasks]).write(tmp_path / "trace.npz")

    def figures(*options: str) -> dict[tuple[str, str], float]:
        monkeypatch.setattr(sys, "argv", ["table2.py", str(file), "--models", "", "--json", *options])
        TABLE["main"]()
        rows = json.loads(capsys.readouterr().out)
        return {(row["predictor"], row["when"]): row["figures"]["accuracy"] for row in rows}

    labelled, blind = figures("--seeds", "0,1", "--after", "4"), figures("--no-tasks", "--order", "trace")
    assert {name for name, _ in labelled} == {*SIMPLE, BOUND}
    assert labelled["task-popularity", "boundary"] > 0.9 > labelled["static", "boundary"]
    assert labelled["previous-prompt", "within"] > labelled["previous-prompt", "boundary"]
    assert blind["task-popularity", "boundary"] == blind["static", "boundary"]
    assert ("static", "within") not in blind
