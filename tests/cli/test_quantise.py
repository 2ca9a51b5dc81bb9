"""`emoe quantise`, and --expert-dtype of the other commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emoe.cli import main
from emoe.cli.layers import Layers
from emoe.cli.options import add_expert_dtype
from emoe.errors import UnsupportedModelError, UsageError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _own_user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command; its exit code, stdout and stderr."""

    def go(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return go


@pytest.fixture
def model(checkpoints: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint of its own."""
    return Path(shutil.copytree(checkpoints("qwen3_moe", moe_intermediate_size=64), tmp_path / "model"))


def test_it_is_made_once_with_progress_and_named_lossy(run: Run, model: Path, tmp_path: Path) -> None:
    code, out, _ = run("quantise", model, "--expert-dtype", "int4", "--out", tmp_path / "kept")
    assert code == 0
    assert "24 experts" in out
    assert "quantised" in out
    assert "LOSSY: with --expert-dtype int4" in out
    code, out, _ = run("quantise", model, "--expert-dtype", "int4", "--out", tmp_path / "kept", "--json")
    values = json.loads(out)
    assert (code, values["made"], values["experts"]) == (0, False, 24)
    assert Path(values["folder"]).parent == tmp_path / "kept"
    per_expert = 128 * 16 + 128 * 2 + 32 * 32 + 32 * 2 * 2
    assert values["bytes"] == 24 * per_expert


def test_mistakes(run: Run, checkpoints: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run("quantise", checkpoints("mixtral"), "--expert-dtype", "int4")
    assert code == UnsupportedModelError.exit_code
    assert "'down_proj' has 24 inputs" in err
    for words in (["quantise", "--expert-dtype", "native"], ["quantise"], ["generate", "--expert-dtype", "int5"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == UsageError.exit_code
        assert "--expert-dtype" in capsys.readouterr().err


def test_a_plan_counts_quantised_experts_and_says_both(run: Run, model: Path) -> None:
    plans: dict[str, dict[str, Any]] = {}
    for form in ("native", "int8", "int4"):
        _, out, _ = run("plan", model, "--expert-dtype", form, "--expert-memory", "50%", "--json")
        plans[form] = json.loads(out)
    native = plans["native"]
    assert native["lossy"] is False
    assert native["native_expert_bytes"] == native["expert_bytes"]
    for form, share in (("int8", 0.6), ("int4", 0.35)):
        plan = plans[form]
        assert (plan["expert_dtype"], plan["lossy"]) == (form, True)
        assert plan["native_expert_bytes"] == native["expert_bytes"]
        assert plan["expert_bytes"] < share * native["expert_bytes"]
        assert plan["budget_bytes"] == plan["expert_bytes"] // 2
        assert plan["dense_bytes"] == native["dense_bytes"]
    _, out, _ = run("plan", model, "--expert-dtype", "int4")
    assert "as int4: 28% of the" in out
    assert "LOSSY: experts are stored and computed as int4" in out


def test_answers_name_the_form_even_when_quiet(run: Run) -> None:
    code, _, err = run(
        "generate", "-p", "Hello.", "-n", 4, "--temp", 0, "-q", "--expert-dtype", "int8", "--expert-memory", "40%"
    )
    assert code == 0
    assert "LOSSY: experts are stored and computed as int8" in err
    assert "routes are exact" in err
    _, _, err = run(
        "generate", "-p", "Hello.", "-n", 4, "--expert-dtype", "int8", "--expert-memory", "40%", "--mode", "resident"
    )
    assert "as int8" in err
    assert "routes are exact" not in err
    assert "LOSSY: in mode 'resident'" in err
    _, out, _ = run("generate", "-p", "Hello.", "-n", 4, "--expert-dtype", "int8", "--json")
    stats = json.loads(out)["stats"]
    assert (stats["expert_dtype"], stats["lossy"], stats["reroutes"]) == ("int8", True, False)


def test_inspect_shows_what_is_there_and_makes_nothing(run: Run, model: Path) -> None:
    code, _, err = run("inspect", model, "--expert-dtype", "int8")
    assert code == UsageError.exit_code
    assert "emoe quantise" in err
    assert not (model / ".emoe").exists()
    run("quantise", model, "--expert-dtype", "int8")
    _, out, _ = run("inspect", model, "--expert-dtype", "int8", "--json")
    facts = json.loads(out)
    assert facts["expert_dtype"] == "int8"
    assert [part["dtype"] for part in facts["layers"][0]["parts"]] == ["int8", "float32"] * 2
    assert facts["layers"][0]["direct"] is True
    _, out, _ = run("inspect", model, "--expert-dtype", "int8", "--layer", 1, "--expert", 2, "--json")
    pieces = json.loads(out)["pieces"]
    assert [piece["part"] for piece in pieces] == ["gate_up_proj", "gate_up_proj_scale", "down_proj", "down_proj_scale"]
    ends = [piece["offset"] + piece["nbytes"] for piece in pieces]
    assert [piece["offset"] for piece in pieces[1:]] == ends[:-1]  # one range of one file


def test_the_form_can_stand_in_the_environment_and_in_a_file(tmp_path: Path) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    layers = Layers(parser)
    add_expert_dtype(layers.group("model"))
    file = tmp_path / "emoe.toml"
    file.write_text('expert-dtype = "int4"\nexpert-cache = "/kept"\n')
    found = layers.resolve(parser.parse_args(["--config", str(file)]), {"EMOE_EXPERT_DTYPE": "int8"})
    assert (found.expert_dtype, found.expert_cache) == ("int8", "/kept")
    with pytest.raises(UsageError, match="none of native, int8, int4"):
        layers.resolve(parser.parse_args([]), {"EMOE_EXPERT_DTYPE": "int5"})
