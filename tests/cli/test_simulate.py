"""`emoe simulate`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emoe.cli import main
from emoe.prediction.protocol import RoutingShape
from emoe.simulation.generate import random_trace

NAMES = (
    "policy",
    "capacity",
    "lookups",
    "misses",
    "loads",
    "hit_rate",
    "belady_ratio",
    "bytes_loaded",
    "wasted_prefetch_bytes",
)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    return str(random_trace(RoutingShape(2, 8, 2), 700, seed=3).write(tmp_path / "run.npz"))


@pytest.fixture
def counts(tmp_path: Path) -> str:
    rows = np.random.default_rng(0).multinomial(30, [0.4, 0.3, 0.2, 0.1], (8, 2))
    np.savez(tmp_path / "counts.npz", counts=rows, n_tokens=rows[:, 0].sum(axis=1), subject=np.arange(8) % 2,
             subjects=np.array(["a", "b"]))  # fmt: skip
    return str(tmp_path)


def rows_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert main(["simulate", *argv, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_json_is_a_list_of_policies_and_capacities(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [trace, "--policy", "lru,belady", "--capacity", "25%,50%", "--expert-bytes", "1MB"]
    rows = rows_of(argv, capsys)
    assert [(row["policy"], row["capacity"]) for row in rows] == [
        ("lru", 0.25),
        ("lru", 0.5),
        ("belady", 0.25),
        ("belady", 0.5),
    ]
    for row in rows:
        assert list(row)[: len(NAMES)] == list(NAMES)
        assert row["lookups"] == 700 * 4
        assert row["bytes_loaded"] == row["loads"] * 10**6
        assert row["hit_rate"] == pytest.approx(1 - row["misses"] / row["lookups"])
        assert row["belady_ratio"] >= 1.0
    text = (Path(__file__).parents[2] / "docs/cli.md").read_text()
    timed = rows_of([*argv, "--bandwidth", "1GB/s", "--compute-time", "0.001"], capsys)
    assert not [name for name in timed[0] if f"`{name}`" not in text]


def test_the_table_and_its_notes(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", trace, "--policy", "lru", "--split", "0,1", "--capacity", "50%"]) == 0
    done = capsys.readouterr()
    assert done.out.splitlines()[0].split() == [
        "policy", "capacity", "lookups", "misses", "loads", "hit", "rate", "x", "Belady", "+-", "loaded", "wasted",
    ]  # fmt: skip
    assert done.out.splitlines()[1].split()[:2] == ["lru", "50%"]
    assert "700 tokens of 4 prompts, 2 layers x 8, top-2, no task labels" in done.err
    assert "see --expert-bytes" in done.err


def test_without_bytes_the_size_of_loads_is_null(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    [row] = rows_of([trace, "--policy", "lru", "--capacity", "50%"], capsys)
    assert row["bytes_loaded"] is None and row["wasted_prefetch_bytes"] is None
    assert row["loads"] > 0


def test_a_random_trace_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--random", "2x8x2:400", "--policy", "lru,least-stale", "--capacity", "50%"]
    rows = rows_of([*argv, "--seed", "7"], capsys)
    assert rows == rows_of([*argv, "--seed", "7"], capsys)
    assert rows != rows_of([*argv, "--seed", "8"], capsys)


def test_a_predictor_learns_from_a_history(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [trace, "--policy", "static", "--capacity", "50%", "--replan-prompts", "2"]
    [alone] = rows_of(argv, capsys)
    [learned] = rows_of([*argv, "--history", trace], capsys)
    [ordered] = rows_of([*argv, "--history", trace, "--no-prefetch"], capsys)
    assert learned["prefetches"] > alone["prefetches"] > 0
    assert ordered["prefetches"] == 0
    assert learned["loads"] == learned["misses"] + learned["prefetches"]


def test_counts_are_for_predictors(counts: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [counts, "--policy", "static,task-popularity", "--capacity", "50%", "--split", "0"]
    rows = rows_of(argv, capsys)
    assert [row["policy"] for row in rows] == ["static", "task-popularity"]
    assert all(row["hit_rate"] <= row["best_set_hit_rate"] for row in rows)
    assert main(["simulate", *argv]) == 0
    done = capsys.readouterr()
    assert "best set" in done.out and "--no-subtract-prefix keeps it" in done.err
    whole = rows_of([*argv, "--no-subtract-prefix", "--no-tasks"], capsys)
    assert whole[0]["lookups"] > rows[0]["lookups"]
    assert main(["simulate", counts, "--policy", "lru"]) == 2
    assert "only predictors can be judged" in capsys.readouterr().err
    assert main(["simulate", counts, "--interleave", "2"]) == 2
    assert "--interleave means nothing for counts" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_plot_is_drawn(suffix: str, trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"curves{suffix}"
    assert main(["simulate", trace, "--policy", "lru,belady", "--plot", str(file)]) == 0
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG") if suffix == ".png" else b"<svg" in data
    assert "drawn to" in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(
    trace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["simulate", trace, "--plot", str(tmp_path / "x.png")]) == 2
    assert "pip install 'emoe[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give a TRACE or --random"),
        (["x.npz", "--random", "2x8x2:9"], "one of the two"),
        (["--random", "2x8x2"], "LAYERSxEXPERTSxK:TOKENS"),
        (["--random", "2x8x2:9", "--policy", "fifo"], "no policy is called 'fifo': choose one of"),
        (["--random", "2x8x2:9", "--bandwidth", "1GB/s"], "--expert-bytes"),
        (["--random", "2x8x2:9", "--split", "0"], "cannot be split"),
        (["--random", "2x8x2:9", "--split", "0", "--history", "x"], "give one of them"),
        (["--random", "2x8x2:9", "--plot", "x.pdf"], ".png or .svg"),
        (["--random", "2x8x2:9", "--plot", "nowhere/x.png"], "can be written"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--capacity", "8GiB"], "capacities are shares"),
        (["--capacity", "120%"], "100%"),
        (["--bandwidth", "1GB"], "size per second"),
        (["--bandwidth", "0GB/s"], "above 0"),
        (["--compute-time", "-1"], "seconds of at least 0"),
        (["--split", "a"], "whole numbers"),
        (["--policy", ","], "at least one policy"),
    ],
)
def test_malformed_options_exit_with_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["simulate", "--random", "2x8x2:9", *argv])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_a_missing_trace_exits_with_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "nowhere.npz"]) == 3
    assert "there is no trace at nowhere.npz" in capsys.readouterr().err


def test_no_torch_is_imported() -> None:
    code = (
        "import sys; from emoe.cli import main\n"
        "main(['simulate', '--random', '2x4x1:50', '--policy', 'lru,static'])\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_lossy_binding_says_so(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["simulate", trace, "--policy", "static", "--capacity", "50%", "--replan-prompts", "1"]
    assert main([*argv, "--binding", "resident"]) == 0
    done = capsys.readouterr()
    assert "LOSSY: in binding 'resident' misses are rerouted" in done.err
    assert "rerouted" in done.out.splitlines()[0]
    assert main([*argv, "--binding", "balanced"]) == 2
    assert "give --profile" in capsys.readouterr().err
