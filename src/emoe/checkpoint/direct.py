"""O_DIRECT: whether a file system has it, how finely it reads there, and memory that it fills fast."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from emoe.checkpoint.segments import ALIGNMENT, Bytes
from emoe.errors import ReadError

# Files and memory of O_DIRECT reads are divided into blocks of this size where the device allows it, else of ALIGNMENT.
SMALL_BLOCK = 512
# A disk read 3.4 GB/s into huge pages and 1.1 into pages of 4 KiB (requests of 2 MiB, 8 at once).
HUGE_BYTES = 2 << 20


def buffers(count: int, nbytes: int) -> list[Bytes]:
    """So many of `nbytes` each (whole blocks), side by side in huge pages where the system has them.

    Memory is taken as they are first used.

    Raises:
        ReadError: the system gives no more memory.
    """
    total = -(-count * nbytes // HUGE_BYTES) * HUGE_BYTES
    try:
        memory = mmap.mmap(-1, total + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, MemoryError) as error:
        raise ReadError(
            f"{total + HUGE_BYTES:,} bytes to read through (O_DIRECT) are refused: {error or 'out of memory'}. End "
            "other processes, raise the memory limit (`ulimit -v`), or give a smaller budget."
        ) from error
    with contextlib.suppress(OSError):  # a wish: a kernel without huge pages refuses, and reads all the same
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole: Bytes = np.frombuffer(memory, dtype=np.uint8)
    start = -whole.ctypes.data % HUGE_BYTES
    return [whole[at : at + nbytes] for at in range(start, start + count * nbytes, nbytes)]


def one_each(files: Iterable[Path]) -> list[Path]:
    """A file of each file system. What is missing is left out: it is reported where it is opened."""
    found: dict[int, Path] = {}
    for file in files:
        try:
            found.setdefault(file.stat().st_dev, file)
        except OSError:
            continue
    return list(found.values())


def refusal(file: Path) -> str | None:
    """Why the file system of `file` refuses O_DIRECT; None where it does not.

    Any other fault is reported where the file is opened or read.
    """
    try:
        _read_block(file, ALIGNMENT)
    except OSError as error:
        return error.strerror if error.errno in (errno.EINVAL, errno.EOPNOTSUPP) else None
    return None


def block_nbytes(files: Sequence[Path]) -> int:
    """What offsets, lengths and addresses of O_DIRECT reads must be multiples of, for all of these files."""
    return SMALL_BLOCK if all(_reads_blocks_of(file, SMALL_BLOCK) for file in files) else ALIGNMENT


def _reads_blocks_of(file: Path, block: int) -> bool:
    """Whether O_DIRECT reads blocks of this size, at such places of the file into such places of memory."""
    try:
        _read_block(file, block)
    except OSError:
        return False
    return True


def _read_block(file: Path, block: int) -> None:
    """Read the second block of a file into the second of some memory."""
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        os.preadv(descriptor, [memoryview(mmap.mmap(-1, 2 * block))[block:]], block)
    finally:
        os.close(descriptor)
