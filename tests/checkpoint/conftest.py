"""Copies of checkpoints to damage, and an index."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from emoe.checkpoint.index import ExpertIndex, build_index, skeleton
from tests.conftest import Checkpoints


@pytest.fixture
def mixtral(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    """A sharded copy of a small Mixtral that a test may damage."""
    return Path(shutil.copytree(checkpoints("mixtral", max_shard_size="40KB"), tmp_path / "mixtral"))


@pytest.fixture(scope="session")
def qwen(checkpoints: Checkpoints) -> ExpertIndex:
    """Shards of 30 kB: an expert's tensors are not all in one file."""
    path = checkpoints("qwen3_moe", max_shard_size="30KB")
    return build_index(path, skeleton(path)[1])
