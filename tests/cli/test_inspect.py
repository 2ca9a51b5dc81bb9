"""`emoe inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emoe import nano
from emoe.cli import main
from tests.conftest import Checkpoints


def test_the_embedded_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect"]) == 0
    out = capsys.readouterr().out
    assert "tensors of its own for each expert, read straight into place" in out
    assert "with --expert-memory 40%" in out
    assert "reader " in out


def test_json_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--json", "--expert-memory", "3/layer"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["experts"] == sum(layer["experts"] for layer in facts["layers"])
    assert facts["slots"] == sum(layer["resident"] for layer in facts["layers"]) == 3 * len(facts["layers"])
    assert facts["expert_bytes"] == sum(n["experts"] * n["expert_nbytes"] for n in facts["layers"])


def test_byte_ranges_are_where_the_tensors_are(capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors import safe_open

    assert main(["inspect", "--layer", "1", "--expert", "2", "--json"]) == 0
    pieces = json.loads(capsys.readouterr().out)["pieces"]
    file = Path(nano.path()) / pieces[0]["file"]
    for piece in pieces:
        with file.open("rb") as stream, safe_open(file, "pt") as tensors:
            stream.seek(piece["offset"])
            import torch

            stored = tensors.get_tensor(piece["tensor"]).contiguous().view(torch.uint8).numpy().tobytes()
            assert stream.read(piece["nbytes"]) == stored


def test_a_whole_layer_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--layer", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["expert", "part"]
    assert lines[1].startswith("0.0")


def test_fused_and_rearranged_layouts_are_named(checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoints("qwen3_moe", fused=True))]) == 0
    assert "one tensor for all experts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--expert", "1"], "--expert needs --layer"),
        (["--layer", "77"], "layer 77 has no experts; these layers have: 0, 1"),
        (["--layer", "0", "--expert", "99"], "layer 0 has experts 0 to 15, not 99"),
    ],
)
def test_keys_that_do_not_exist(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *args]) == 2
    assert message in capsys.readouterr().err
