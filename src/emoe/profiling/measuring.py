"""Measuring a machine, emoe's own kernels on it, and one checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from emoe.errors import UsageError
from emoe.profiling.kept import cores, fingerprint, layout_of
from emoe.profiling.machine import Machine, Rates
from emoe.residency.gpus import gpu_number

Say = Callable[[str], None]


def measure(
    paths: Sequence[Path] | None = None,
    device: str = "cpu",
    threads: Sequence[int] | None = None,
    seconds: float = 20.0,
    say: Say = lambda _: None,
) -> Machine:
    """Measure this machine in about `seconds`. Nothing is kept: that does `keep`.

    Args:
        paths: files to read for the disk's rates (a checkpoint's own); None: the disk is left out.
        device: "cpu", or "cuda" for a GPU's rates too.
        threads: thread counts; None: 1, 2, 4 and so on up to the cores.
        seconds: for everything; the disk gets half of it.
        say: told what is being measured, one line each.

    Raises:
        UsageError: no such device, or a number that cannot be meant.
        ReadError: a file cannot be read.
    """
    from emoe.profiling import disk, rates

    if not seconds > 0:
        raise UsageError(f"seconds must be positive, not {seconds:g}")
    counts = tuple(threads) if threads else thread_counts(cores())
    if min(counts) < 1:
        raise UsageError(f"thread counts must be at least 1, not {min(counts)}")
    files = tuple(Path(path) for path in paths or ())
    gpu_number(device, "Use 'cpu', or 'cuda' on a machine with a GPU.")
    notes: list[str] = []
    each = seconds / 2 / (len(counts) * 3 + 1)
    memory = {}
    for count in counts:
        say(f"memory, {count} thread{'s' * (count > 1)}")
        memory[count] = rates.memory_bytes_per_s(count, each)
    flops: dict[str, Rates] = {}
    for dtype in rates.DTYPES:
        say(f"matrix products in {dtype}")
        found = {count: rates.flops(dtype, count, each / 2) for count in counts}
        flops[dtype] = {count: rate for count, rate in found.items() if rate is not None}
        if not flops[dtype]:
            del flops[dtype]
            notes.append(f"torch has no product of {dtype} matrices here")
    direct, way, cached = None, None, None
    if files:
        say("disk, past the page cache")
        best = disk.best_direct(files, seconds / 2)
        if best is None:
            notes.append("the file system has no O_DIRECT, so the disk's own rate was not measured")
        else:
            direct, way = best.bytes_per_s, {"threads": best.threads, "block_bytes": best.block_bytes}
        say("disk, through the page cache")
        cached = disk.cached_bytes_per_s(files, each)
    gpu = rates.gpu(device, each, say) if device != "cpu" else rates.NO_GPU
    return Machine(
        fingerprint=fingerprint(files, device),
        device=device,
        memory_bytes_per_s=memory,
        disk_direct_bytes_per_s=direct,
        disk_cached_bytes_per_s=cached,
        disk_direct_way=way,
        h2d_pinned_bytes_per_s=gpu.pinned_bytes_per_s,
        h2d_pageable_bytes_per_s=gpu.pageable_bytes_per_s,
        flops=flops,
        device_bytes_per_s=gpu.bytes_per_s,
        device_flops=gpu.flops,
        notes=tuple(notes),
    )


def with_engine(machine: Machine, threads: Sequence[int], say: Say = lambda _: None) -> Machine:
    """The machine with what emoe's own kernels and layers take on it, by threads; about 10 s for each number.

    Raises:
        UsageError: the machine is a GPU's: those are not predicted.
    """
    from emoe.profiling.engine_rates import measure_engine

    if machine.device != "cpu":
        raise UsageError(f"emoe's kernels are timed on the CPU only, not on {machine.device!r}.")
    found = dict(machine.engine)
    for count in threads:
        say(f"emoe's kernels, {count} thread{'s' * (count > 1)}")
        found[count] = measure_engine(count)
    return replace(machine, engine=found)


def with_model(machine: Machine, folder: Path, threads: int, say: Say = lambda _: None) -> Machine:
    """The machine with what the checkpoint in `folder` takes on it, with so many threads: its experts in a few seconds,
    then a token without them, for which the dense weights are loaded.

    Raises:
        UsageError: the machine is a GPU's: those are not predicted.
        CheckpointError, UnsupportedModelError, ReadError: the checkpoint cannot be indexed or read.
    """
    from emoe.profiling.model_rates import measure_model

    if machine.device != "cpu":
        raise UsageError(f"a model's experts are timed on the CPU only, not on {machine.device!r}.")
    say(f"{folder.name}'s own experts, {threads} thread{'s' * (threads > 1)}")
    mark = layout_of(folder)
    measured = measure_model(folder, threads)
    if measured.token is None:
        say(
            "a token without experts is not timed: memory has no room for the dense weights; its time is computed "
            "instead"
        )
    of_model = {**machine.models.get(mark, {}), threads: measured}
    return replace(machine, models={**machine.models, mark: of_model})


def thread_counts(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... and `most`."""
    counts = [1 << i for i in range(most.bit_length()) if 1 << i <= most]
    return tuple(dict.fromkeys((*counts, most)))
