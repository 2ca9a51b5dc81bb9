"""A tiny model with a tokenizer and prompts of two tasks, and a workbench over them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emoe.bench.reproduce.asked import Settings
from emoe.bench.reproduce.workbench import Workbench
from tests.families import make_checkpoint, write_tokenizer

Open = Callable[..., Workbench]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three MoE layers of 8 experts with random weights."""
    folder = make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("tiny"), seed=3)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six prompts of each of two tasks, in turn."""
    things = ("cats", "dogs", "two cats", "one dogs", "four cats and dogs", "the story")
    rows = [
        row
        for thing in things
        for row in (
            {"task": "maths", "prompt": f"add the sum of {thing}", "reference": "four"},
            {"task": "chat", "prompt": f"please tell me a story about {thing} now"},
        )
    ]
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def open_bench(tiny: Path, prompt_file: Path, tmp_path: Path) -> Open:
    """A workbench in tmp_path/out, opened as a command would; `said` collects what it says."""

    def make(said: list[str] | None = None, **changes: Any) -> Workbench:
        settings: dict[str, Any] = {"model": str(tiny), "prompts": prompt_file, "new_tokens": 3, **changes}
        return Workbench(Settings(tmp_path / "out", **settings), lambda *_: None, (said or []).append)

    return make
