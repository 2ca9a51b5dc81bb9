"""What the engine refuses at its start is refused from the configuration, before a weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import emoe
from emoe.cli import main
from emoe.engine.engine import Engine
from emoe.engine.refusals import generation_settings, refuse_attention, refuse_generation
from emoe.errors import UnsupportedModelError, UsageError
from emoe.planner import facts_of
from emoe.planner.paged import why_not_paged
from tests.conftest import Checkpoints
from tests.engine.running import SMALL


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("deepseek_v3", "layer 0 keeps its keys and values compressed"),
        ("mimo_v2_flash", "keys and values of different sizes, 64 and 128 bytes a token"),
        ("jamba", "layer 0 keeps a state of"),
        ("lfm2_moe", "of the kind conv"),
        ("laguna", ""),
        ("exaone_moe", ""),
    ],
)
def test_the_configuration_says_what_the_engine_finds(checkpoints: Checkpoints, name: str, why: str) -> None:
    path = checkpoints(name)
    facts = facts_of(path)[1]
    made, _ = emoe.load(path)
    engine = Engine(made, None, SMALL)
    if why:
        with pytest.raises(UnsupportedModelError, match=f"m cannot be batched continuously: .*{why}.*emoe generate"):
            refuse_attention("m", facts)
        with pytest.raises(UnsupportedModelError, match="cannot be batched continuously"):
            engine.start()
    else:
        refuse_attention("m", facts)
        engine.start()
        engine.stop()
    emoe.close(made)


def test_sizes_that_the_configuration_contradicts(checkpoints: Checkpoints) -> None:
    """Every layer alike, but with other heads than pages are made for."""
    made = facts_of(checkpoints("mixtral"))[1]
    assert made.not_paged == ""
    wide = json.loads((checkpoints("mixtral") / "config.json").read_text()) | {"num_key_value_heads": 4}
    assert (
        why_not_paged(wide, made.cache_layers, 2)
        == "a layer keeps 64 bytes a token, and 4 heads of 8 keys and as many values are 128"
    )


def edited(path: Path, file: str, **changes: Any) -> Path:
    """A copy of a checkpoint with other settings in one of its files."""
    to = path.with_name(f"{path.name}-{file}-{'-'.join(changes)}")
    if not to.exists():
        shutil.copytree(path, to)
    there = json.loads((to / file).read_text()) if (to / file).exists() else {}
    (to / file).write_text(json.dumps(there | changes))
    return to


def test_generation_settings_are_those_of_transformers(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """The file, or without it what stands in the model's configuration."""
    path = edited(checkpoints("mixtral", torch.float32), "generation_config.json", min_new_tokens=3, num_beams=1)
    facts = facts_of(path)[1]
    with pytest.raises(UsageError, match=r"sets min_new_tokens=3, which continuous batching does not"):
        refuse_generation(generation_settings(None, facts).get)
    bare = edited(checkpoints("mixtral", torch.float32), "config.json", num_beams=4)
    (bare / "generation_config.json").unlink(missing_ok=True)
    facts = facts_of(bare)[1]
    with pytest.raises(UsageError, match="num_beams=4"):
        refuse_generation(generation_settings(None, facts).get)
    made, _ = emoe.load(bare)
    with pytest.raises(UsageError, match="num_beams=4"):
        Engine(made, None, SMALL)
    emoe.close(made)
    refuse_generation(generation_settings(None, facts_of(None)[1]).get)


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--dry-run", "--json"]])
def test_serve_refuses_before_it_loads(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(emoe, "load", load)
    code = main(["serve", str(checkpoints("qwen3_next")), *more])
    told = capsys.readouterr()
    assert code == UnsupportedModelError.exit_code
    assert "its layers are of the kind linear_attention" in told.err and not told.out
    beams = edited(checkpoints("mixtral"), "generation_config.json", num_beams=2)
    assert main(["serve", str(beams), *more]) == UsageError.exit_code
    assert "num_beams=2" in capsys.readouterr().err
