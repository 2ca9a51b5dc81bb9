"""Writing whole checkpoints to measure on: complete under their names, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from emoe.checkpoint.writing import Progress, TensorToWrite, write_sharded
from emoe.config import format_bytes
from emoe.errors import CheckpointError, UsageError

__all__ = ["Progress", "TensorToWrite", "write_checkpoint", "write_json", "write_sharded"]


def write_checkpoint(
    folder: Path,
    what: str,
    tensors: Sequence[TensorToWrite],
    others: Callable[[Path], object],
    shard_bytes: int,
    progress: Progress | None = None,
) -> Path:
    """Write a checkpoint to `folder`, which appears under its name only when it is complete, and return it.

    Args:
        folder: where to; it must not exist, or be empty.
        what: what errors call it.
        tensors: in the order of the files.
        others: writes all other files, config.json among them, into the folder it is given; called last.
        shard_bytes: see `write_sharded`.
        progress: called with (bytes done, bytes in all).

    Raises:
        UsageError: `folder` holds something.
        CheckpointError: the disk has not that much room.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not {what}; choose another folder")
    total = sum(tensor.nbytes for tensor in tensors)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < total * 1.02:
        raise CheckpointError(
            f"{what} takes {format_bytes(total)}, and {folder.parent} has {format_bytes(free)} free; choose another "
            "folder, a smaller shape or fewer layers"
        )
    work = folder.with_name(f"{folder.name}.part{os.getpid()}")
    work.mkdir()
    try:
        write_sharded(tensors, work, shard_bytes, progress)
        others(work)
        if folder.exists():
            folder.rmdir()
        work.rename(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return folder


def write_json(values: object, path: Path) -> None:
    """One JSON value as a file for people to read."""
    path.write_text(json.dumps(values, indent=2) + "\n")
