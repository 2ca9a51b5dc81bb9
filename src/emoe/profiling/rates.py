"""What memory, processor and GPU reach in a plain loop: the rates of `emoe.profiling.machine`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from emoe.checkpoint.memory_room import memory_room

DTYPES = ("float32", "bfloat16", "int8")
ARRAY_BYTES = 1 << 30
"""Much larger than any processor's caches; a sixteenth of what is free where that is less."""
LEAST_ARRAY_BYTES = 64 << 20
SIDE = 1024
"""Rows and columns of the matrices whose product is timed on a processor."""
GPU_SIDE = 8192
COPY_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Gpu:
    """Rates of a GPU and of the way to it; None where there is none."""

    pinned_bytes_per_s: float | None = None
    pageable_bytes_per_s: float | None = None
    bytes_per_s: float | None = None
    flops: dict[str, float] = field(default_factory=dict)


NO_GPU = Gpu()


def memory_bytes_per_s(threads: int, seconds: float) -> float:
    """Reading one large array, the better of two plain loops."""
    nbytes = min(ARRAY_BYTES, max(LEAST_ARRAY_BYTES, memory_room().available_bytes // 16))
    array = torch.ones(nbytes // 4, dtype=torch.float32)
    loops: tuple[Callable[[], object], ...] = (array.sum, lambda: torch.dot(array, array))
    with using_threads(threads):
        # A dot product of an array with itself reads it once.
        return max(nbytes / seconds_of(loop, seconds / len(loops)) for loop in loops)


def flops(dtype: str, threads: int, seconds: float) -> float | None:
    """Operations per second of a square matrix product; None where torch has none of that dtype."""
    with using_threads(threads):
        product = _product(dtype, SIDE, "cpu")
        return None if product is None else 2 * SIDE**3 / seconds_of(product, seconds)


def gpu(device: str, seconds: float, say: Callable[[str], None] = lambda _: None) -> Gpu:
    """A GPU's rates: copies to it, its own memory, its matrix products."""
    say("host to device")
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    pageable = torch.ones(COPY_BYTES, dtype=torch.uint8)
    try:
        pinned: torch.Tensor | None = pageable.pin_memory()
    except RuntimeError:
        pinned = None  # the system allows no more locked memory

    def synchronised(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            work()
            torch.cuda.synchronize(device)

        return run

    def copy_s(source: torch.Tensor) -> float:
        return seconds_of(synchronised(lambda: there.copy_(source, non_blocking=True)), seconds)

    fast = None if pinned is None else COPY_BYTES / copy_s(pinned)
    slow = COPY_BYTES / copy_s(pageable)
    say("the GPU's memory and matrix products")
    array = torch.ones(ARRAY_BYTES // 4, dtype=torch.float32, device=device)
    own = ARRAY_BYTES / seconds_of(synchronised(array.sum), seconds)
    rates = {}
    for dtype in DTYPES:
        product = _product(dtype, GPU_SIDE, device)
        if product is not None:
            rates[dtype] = 2 * GPU_SIDE**3 / seconds_of(synchronised(product), seconds)
    return Gpu(fast, slow, own, rates)


def _product(dtype: str, side: int, device: str) -> Callable[[], object] | None:
    """A matrix product to time, tried once."""
    if dtype == "int8":
        left = torch.ones(side, side, dtype=torch.int8, device=device)
        right = left.t().contiguous().t()
        run: Callable[[], object] = lambda: torch._int_mm(left, right)  # noqa: E731
    else:
        a = torch.ones(side, side, dtype=getattr(torch, dtype), device=device)
        out = torch.empty_like(a)
        run = lambda: torch.mm(a, a, out=out)  # noqa: E731
    try:
        run()
    except (RuntimeError, NotImplementedError):
        return None
    return run


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """So many threads of torch inside the block, as many as before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds_of(work: Callable[[], object], seconds: float) -> float:
    """Seconds of one call: of those made in `seconds`, at least three, the fastest tenth's slowest.

    A limit is sought, and neighbours only ever slow a call down; the very fastest may be a clock's error.
    """
    work()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < stop:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 10]
