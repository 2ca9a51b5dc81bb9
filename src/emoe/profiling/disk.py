"""How fast a disk gives files: past the page cache (O_DIRECT) and out of it."""

from __future__ import annotations

import errno
import mmap
import os
import random
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emoe.checkpoint.segments import ALIGNMENT
from emoe.errors import ReadError
from emoe.kernels.pages import HUGE_BYTES, prefer_huge_pages

THREADS = (1, 2, 4, 8)
BLOCKS = (1 << 20, 4 << 20, 16 << 20)
ROUNDS = 3
"""Each way is tried so often, the ways in turn: a disk that is shared is fast and slow by the second."""

_UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP)


@dataclass(frozen=True, slots=True)
class DirectRate:
    """Median rate of one way to read with O_DIRECT."""

    bytes_per_s: float
    threads: int
    block_bytes: int


def best_direct(files: Sequence[Path], seconds: float, seed: int = 0) -> DirectRate | None:
    """The fastest way of THREADS x BLOCKS, by the median of ROUNDS; None where a file system has no O_DIRECT.

    Blocks are read one after another, from a place of each try's own, so that nothing below (a controller's memory, a
    host's page cache) has just read them.

    Raises:
        ReadError: a file cannot be opened or read.
    """
    ways = [(threads, block) for threads in THREADS for block in BLOCKS]
    each = seconds / (len(ways) * ROUNDS)
    found: dict[tuple[int, int], list[float]] = {way: [] for way in ways}
    opened = _open(files, os.O_RDONLY | os.O_DIRECT)
    if opened is None:
        return None
    try:
        draw = random.Random(seed)
        for _ in range(ROUNDS):
            for threads, block in ways:
                rate = _rate(opened, threads, block, each, draw)
                if rate is None:
                    return None
                found[threads, block].append(rate)
    finally:
        for descriptor, _ in opened:
            os.close(descriptor)
    medians = {way: statistics.median(rates) for way, rates in found.items()}
    threads, block = max(medians, key=lambda way: medians[way])
    return DirectRate(medians[threads, block], threads, block)


def direct_bytes_per_s(files: Sequence[Path], threads: int, block_bytes: int, seconds: float, seed: int = 0) -> float:
    """The rate of one way, once.

    Raises:
        ReadError: a file cannot be opened or read, or not with O_DIRECT.
    """
    opened = _open(files, os.O_RDONLY | os.O_DIRECT)
    try:
        rate = None if opened is None else _rate(opened, threads, block_bytes, seconds, random.Random(seed))
    finally:
        for descriptor, _ in opened or ():
            os.close(descriptor)
    if rate is None:
        raise ReadError(f"{files[0]} is on a file system without O_DIRECT: read it through the page cache.")
    return rate


def cached_bytes_per_s(files: Sequence[Path], seconds: float, most_bytes: int = 256 << 20) -> float:
    """The rate of reading again what the page cache holds: up to `most_bytes` of the largest file, by one thread.

    Raises:
        ReadError: the file cannot be opened or read.
    """
    largest = max(files, key=lambda file: file.stat().st_size)
    opened = _open([largest], os.O_RDONLY)
    block = 4 << 20
    buffer = memoryview(mmap.mmap(-1, block))
    rates: list[float] = []
    if opened is None:
        raise ReadError(f"{largest} cannot be opened. Check the file and its permissions.")
    (descriptor, size), *_ = opened
    try:
        end = min(size, most_bytes)
        stop = time.perf_counter() + seconds
        while len(rates) < 3 or time.perf_counter() < stop:
            start, done = time.perf_counter(), 0
            while done < end:
                done += max(1, os.preadv(descriptor, [buffer[: end - done]], done))
            rates.append(end / (time.perf_counter() - start))
    except OSError as error:
        raise ReadError(f"{largest} cannot be read: {error.strerror}. Check the disk.") from error
    finally:
        os.close(descriptor)
    return statistics.median(rates[1:])  # the first brought it into the cache


def _open(files: Sequence[Path], flags: int) -> list[tuple[int, int]] | None:
    """(descriptor, size) of each file; None where its file system refuses the flags."""
    opened: list[tuple[int, int]] = []
    for file in files:
        try:
            opened.append((os.open(file, flags), file.stat().st_size))
        except OSError as error:
            for descriptor, _ in opened:
                os.close(descriptor)
            if error.errno in _UNSUPPORTED:
                return None
            raise ReadError(
                f"{file} cannot be opened: {error.strerror}. Check the file and its permissions."
            ) from error
    return opened


def _rate(
    opened: Sequence[tuple[int, int]], threads: int, block: int, seconds: float, draw: random.Random
) -> float | None:
    """Bytes per second of `threads` that read blocks; None where O_DIRECT is refused at the first read."""
    lock = threading.Lock()
    places = _Places(opened, block, draw)
    done = [0]
    faults: list[OSError] = []
    start = time.perf_counter()
    stop = start + seconds

    def work() -> None:
        buffer = _like_a_slot(block)
        mine = 0
        try:
            while time.perf_counter() < stop or not mine:
                with lock:
                    descriptor, offset = next(places)
                mine += os.preadv(descriptor, [buffer], offset)
        except OSError as error:
            faults.append(error)
        with lock:
            done[0] += mine

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if faults:
        if faults[0].errno in _UNSUPPORTED:
            return None
        raise ReadError(f"the disk cannot be measured: {faults[0].strerror}. Check the checkpoint's files.")
    return done[0] / (time.perf_counter() - start)


def _like_a_slot(nbytes: int) -> memoryview:
    """Touched memory in huge pages, as slots have: into pages of 4 KiB a disk of 3.4 GB/s read 1.1."""
    memory = torch.empty(nbytes + 2 * HUGE_BYTES, dtype=torch.uint8)
    prefer_huge_pages(memory)
    start = -memory.data_ptr() % HUGE_BYTES
    slot: np.ndarray[Any, np.dtype[np.uint8]] = memory[start : start + nbytes].zero_().numpy()
    return slot.data


class _Places:
    """Blocks of all files one after another, again and again, from a place drawn at random; threads share it under a
    lock."""

    def __init__(self, opened: Sequence[tuple[int, int]], block: int, draw: random.Random) -> None:
        self._all = [
            (descriptor, offset)
            for descriptor, size in opened
            for offset in range(0, max(size - size % ALIGNMENT, 1), block)
        ]
        self._at = draw.randrange(len(self._all))

    def __next__(self) -> tuple[int, int]:
        self._at = (self._at + 1) % len(self._all)
        return self._all[self._at]
