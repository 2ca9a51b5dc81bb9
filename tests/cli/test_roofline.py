"""`emoe roofline`: the machine is measured once, limits are printed for every budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emoe.cli import main, roofline
from emoe.planner import facts_of
from emoe.prediction.protocol import RoutingShape
from emoe.profiling import engine_rates, model_rates
from emoe.profiling.kept import fingerprint
from emoe.profiling.machine import EngineRates, Machine, ModelRates
from emoe.simulation.generate import random_trace
from tests.conftest import Checkpoints


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine whose rates are known; who measured, and how often."""
    calls: list[str] = []

    def quick(files: list[Path], device: str = "cpu", **_: Any) -> Machine:
        calls.append(device)
        return Machine(
            fingerprint(files),
            memory_bytes_per_s={1: 1e9},
            disk_direct_bytes_per_s=1e8,
            flops={"float32": {1: 1e12}},
        )

    monkeypatch.setenv("EMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(roofline, "measure", quick)
    monkeypatch.setattr(engine_rates, "measure_engine", lambda _: EngineRates(1e9, 1e9, 1e11, 1e11, 1e-4, 1e-4))
    monkeypatch.setattr(model_rates, "measure_model", lambda *_: ModelRates(2e8, 3e8, 1e11))
    return calls


def asked(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    assert main(["roofline", *args, "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def test_limits_of_each_budget(
    measured: list[str], checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = str(checkpoints("mixtral"))
    uniform = asked(capsys, folder, "--budgets", "50,100", "-t", "1")
    half, whole = uniform["limits"]
    assert half["belady_miss_rate"] == 0.5
    assert whole["token"]["link_s"] == 0
    assert half["token"]["seconds"] == max(half["token"][name] for name in ("memory_s", "link_s", "compute_s"))
    assert "every expert as likely" in uniform["routes"]

    layers = len(facts_of(folder)[1].expert_layers)
    trace = random_trace(RoutingShape(layers, 8, 2), 300).write(tmp_path / "trace.npz")
    routed = asked(capsys, folder, "--budgets", "50", "--trace", str(trace), "--trace-tokens", "200")
    (row,) = routed["limits"]
    assert 0 < row["belady_miss_rate"] < row["policy_miss_rate"] < 1
    assert "200 tokens of 1 prompts" in routed["routes"]
    assert measured == ["cpu"]  # once, then kept
    asked(capsys, folder, "--fresh")
    assert len(measured) == 2


def test_shares_of_the_limit_that_a_benchmark_reached(
    measured: list[str], checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = str(checkpoints("mixtral"))
    (limit,) = asked(capsys, folder, "--budgets", "50")["limits"]
    contender = {
        "name": "emoe exact 50%",
        "engine": "emoe",
        "mode": "exact",
        "expert_memory": "50%",
        "decode_tokens_per_s": {"median": 0.5 / limit["token"]["seconds"]},
        "first_token_s": {"median": 4 * limit["prompt"]["seconds"]},
    }
    file = tmp_path / "decode.json"
    file.write_text(json.dumps({"contenders": [contender, contender | {"engine": "transformers"}]}))
    (reached,) = asked(capsys, folder, "--budgets", "50", "--measured", str(file))["measured"]
    assert reached["of_belady"] == pytest.approx(0.5)
    assert reached["of_prompt"] == pytest.approx(0.25)
    assert main(["roofline", folder, "--budgets", "50", "--measured", str(file)]) == 0
    text = capsys.readouterr().out
    assert "50%" in text
    assert "25%" in text
    assert "1.00 GB/s" in text


def test_what_cannot_be_meant_is_refused(
    measured: list[str], checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = str(checkpoints("mixtral"))
    with pytest.raises(SystemExit):
        main(["roofline", folder, "--budgets", "0"])
    (tmp_path / "no.json").write_text("{}")
    assert main(["roofline", folder, "--measured", str(tmp_path / "no.json")]) == 2
    assert "no JSON of `emoe bench decode`" in capsys.readouterr().err
    other = random_trace(RoutingShape(2, 4, 1), 50).write(tmp_path / "other.npz")
    assert main(["roofline", folder, "--trace", str(other)]) == 2
    assert "record one of this model" in capsys.readouterr().err
    assert main(["roofline", folder, "--link", "pinned"]) == 2
    assert "rate of 'pinned' loads was not measured" in capsys.readouterr().err
