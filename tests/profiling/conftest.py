"""A tiny model with a tokenizer, and prompts for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import emoe
from tests.families import make_checkpoint, write_tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three MoE layers of 8 experts, and a tokenizer of whole words without a chat template."""
    folder = make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("tiny"), seed=3)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows: list[dict[str, Any]] = []
    for i in range(4):
        thing = ("cats", "dogs", "two cats", "one dogs")[i]
        rows.append({"task": "maths", "prompt": f"add the sum of {thing}", "reference": "four"})
        rows.append({"task": "chat", "messages": [{"role": "user", "content": f"tell me a story about {thing}"}]})
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return file


@pytest.fixture
def loaded(checkpoint: Path) -> Iterator[Any]:
    """(model, tokenizer)."""
    model, tokenizer = emoe.load(checkpoint)
    yield model, tokenizer
    emoe.close(model)
