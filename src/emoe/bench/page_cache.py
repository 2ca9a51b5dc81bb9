"""The page cache of given files: how much of them is in it, and dropping them from it. No privileges needed."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path


def drop(files: Iterable[Path]) -> int:
    """Drop `files` from the page cache and return the bytes that stayed (pages that some process has mapped)."""
    stayed = 0
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # dirty pages cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            stayed += _cached(descriptor)
        finally:
            os.close(descriptor)
    return stayed


def cached_bytes(files: Iterable[Path]) -> int:
    """Bytes of `files` that lie in the page cache."""
    total = 0
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            total += _cached(descriptor)
        finally:
            os.close(descriptor)
    return total


def read_ahead_bytes(file: Path) -> int | None:
    """How much the kernel reads around a page fault in `file`'s device; None where it does not say.

    Whoever maps a file larger than its memory reads that much for each page it misses.
    """
    device = os.stat(file).st_dev
    try:
        text = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").read_text()
    except OSError:
        return None
    return int(text) * 1024


def _cached(descriptor: int) -> int:
    """mincore(2) over the whole file: one byte for each page, its lowest bit set where the page is resident."""
    size = os.fstat(descriptor).st_size
    if size == 0:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    pages = -(-size // mmap.PAGESIZE)
    flags = (ctypes.c_ubyte * pages)()
    # ctypes needs a writable view to take an address, so the private mapping is one; it is never touched.
    with mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapping:
        view = ctypes.c_char.from_buffer(mapping)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(size), flags)
        del view
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(flag & 1 for flag in bytes(flags)) * mmap.PAGESIZE
