"""`emoe plan`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from emoe.cli import main
from emoe.planner import facts_of
from emoe.prediction.protocol import RoutingShape
from emoe.profiling.kept import fingerprint, keep
from emoe.profiling.machine import EngineRates, Machine
from emoe.simulation.generate import random_trace
from tests.checkpoint.sparse import write_sparse_qwen3_moe
from tests.conftest import Checkpoints


def test_the_text_names_every_purpose_and_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--memory", "1GiB"]) == 0
    out = capsys.readouterr().out
    for word in ("emoe-nano", "dense weights", "key-value cache", "activations", "experts, resident", "in all"):
        assert word in out
    assert "Everything fits in 1.00 GiB" in out


def test_json_is_one_object_whose_parts_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--memory", "1GiB", "--context", "512", "--batch", "2", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["context"], made["batch"], made["fit"]) == (512, 2, "all")
    parts = ("dense", "cache", "activation", "buffer", "import", "runtime", "resident")
    assert made["total_bytes"] == sum(made[f"{part}_bytes"] for part in parts)
    assert made["total_bytes"] <= made["memory_bytes"] == 2**30


def test_what_does_not_fit_exits_with_5_after_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--memory", "100MiB"]) == 5
    assert "The smallest memory that works is" in capsys.readouterr().out


def test_part_of_the_experts_comes_with_the_command_to_run(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--json"])
    smallest = json.loads(capsys.readouterr().out)["smallest_bytes"]
    assert main(["plan", "--memory", str(smallest + 2**22)]) == 0
    out = capsys.readouterr().out
    assert "of the experts fit" in out
    size = out.split("--expert-memory ")[1].split()[0]
    assert main(["plan", "--memory", str(smallest + 2**22), "--expert-memory", size]) == 0
    assert "Fits in" in capsys.readouterr().out


def test_an_embedding_on_disk_is_said_with_its_bytes(
    checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(checkpoints("mixtral"))
    assert main(["plan", folder, "--expert-memory", "60%", "--embeddings", "auto"]) == 0
    assert "in memory, without 8.00 KiB of input embedding, read from disk row by row" in capsys.readouterr().out
    assert main(["plan", folder, "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["smallest_bytes"] + 50_000
    assert main(["plan", folder, "--memory", str(memory), "--embeddings", "auto"]) == 0
    assert " --embeddings disk -p ..." in capsys.readouterr().out
    assert main(["plan", "--embeddings", "disk"]) == 4  # emoe-nano's is tied
    assert "is tied to another weight" in capsys.readouterr().err


def test_the_machines_memory_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 0
    assert "free (" in capsys.readouterr().out


def test_a_checkpoint_of_100_gb_is_planned_without_torch(tmp_path: Path) -> None:
    """What takes the time is importing torch; docs/log.md has the seconds."""
    nbytes = write_sparse_qwen3_moe(tmp_path, layers=94, experts=128, hidden=2048, width=704, shards=20)
    assert nbytes > 100e9
    code = "import sys; from emoe.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", str(tmp_path), "--memory", "32GiB", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    made = json.loads(done.stdout)
    assert made["experts"] == 94 * 128
    assert made["source"] == "headers"


def test_the_speed_is_predicted_where_the_machine_was_measured(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path))
    folder = checkpoints("mixtral")
    assert main(["plan", str(folder), "--expert-memory", "50%"]) == 0
    assert "speed: not known here; `emoe roofline MODEL`" in capsys.readouterr().out
    made = Machine(
        fingerprint(sorted(folder.glob("*.safetensors"))),
        memory_bytes_per_s={1: 1e9},
        disk_direct_bytes_per_s=1e6,
        engine={1: EngineRates(1e9, 1e9, 1e11, 1e11, 1e-3, 1e-3)},
    )
    keep(made)
    assert main(["plan", str(folder), "--expert-memory", "50%"]) == 0
    assert "50% of experts missing and read from disk" in capsys.readouterr().out
    assert main(["plan", str(folder), "--expert-memory", "50%", "-t", "2"]) == 0
    assert "`emoe roofline MODEL -t 2` measures 2" in capsys.readouterr().out
    assert main(["plan", str(folder), "--expert-memory", "50%", "--json"]) == 0
    half = json.loads(capsys.readouterr().out)["speed"]
    assert main(["plan", str(folder), "--expert-memory", "100%", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)["speed"]
    assert half["token_s"] > 2 * whole["token_s"]
    assert whole["load_s"] == whole["prompt_load_s"] == 0
    layers = facts_of(folder)[1].expert_layers
    trace = random_trace(RoutingShape(len(layers), 8, 2), 200).write(tmp_path / "trace.npz")
    assert main(["plan", str(folder), "--expert-memory", "50%", "--json", "--trace", str(trace)]) == 0
    routed = json.loads(capsys.readouterr().out)["speed"]
    assert 0.3 < routed["miss_rate"] < 0.7
    assert routed["miss_rate"] != half["miss_rate"]


def test_a_devices_memory_and_the_processs_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "--device", "cuda", "--memory", "670MiB", "--process-memory", "500MiB", "--host-memory", "50%"]
    assert main(asked) == 0
    out = capsys.readouterr().out
    for word in ("cuda, in all", "the process, in all", "experts, on the host", "of 500.00 MiB allowed", "pinned"):
        assert word in out
    assert "--device cuda --host-memory 50%" in out
    assert main([*asked[:-3], "390MiB", "--host-memory", "50%"]) == 5
    assert "The process does not fit in 390.00 MiB" in capsys.readouterr().out
    assert main(["plan", "--device", "cuda", "--memory", "500MiB", "--process-memory", "500MiB"]) == 5
    assert "Does not fit in 500.00 MiB on the device" in capsys.readouterr().out
