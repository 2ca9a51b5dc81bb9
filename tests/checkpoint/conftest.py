"""Checkpoints made once per session, and copies of them to damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from emoe.checkpoint.index import ExpertIndex, build_index, skeleton
from tests.families import make_checkpoint

Checkpoints = Callable[..., Path]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """`make_checkpoint(name, **settings)` in a directory of its own, the same one for the same arguments."""
    made: dict[str, Path] = {}

    def get(name: str, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Path:
        key = f"{name} {dtype} {sorted(settings.items())}"
        if key not in made:
            made[key] = make_checkpoint(name, tmp_path_factory.mktemp(name), dtype=dtype, **settings)
        return made[key]

    return get


@pytest.fixture
def mixtral(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    """A sharded copy of a small Mixtral that a test may damage."""
    return Path(shutil.copytree(checkpoints("mixtral", max_shard_size="40KB"), tmp_path / "mixtral"))


@pytest.fixture(scope="session")
def qwen(checkpoints: Checkpoints) -> ExpertIndex:
    """Shards of 30 kB: an expert's tensors are not all in one file."""
    path = checkpoints("qwen3_moe", max_shard_size="30KB")
    return build_index(path, skeleton(path)[1])
