"""What this machine can do at best: bytes per second from memory and disk, floating-point operations per second.

Measured once (`measure`, under half a minute) and kept in the user's cache, with what it was measured on; refused for
any other machine. Rates are what a plain loop reaches, so they bound what decoding can reach: nothing reads weights
faster than a sum over a large array does.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from emoe.checkpoint.fingerprint import layout_fingerprint
from emoe.checkpoint.headers import read_headers
from emoe.config import user_cache
from emoe.errors import UsageError

FORMAT = "emoe-machine/1"

Link = Literal["direct", "cached", "pinned", "pageable"]
"""How a missed expert comes: from disk past the page cache or through it; from host memory to a GPU."""

Say = Callable[[str], None]
Rates = dict[int, float]
"""Number of threads -> rate."""


PROMPT_TOKENS = 512
"""The prompt whose rates `EngineRates` holds."""


@dataclass(frozen=True, slots=True)
class EngineRates:
    """Of one number of threads, in bfloat16 on the CPU.

    dense_bytes_per_s, expert_bytes_per_s: weights read for one token; dense_flops, expert_flops: operations per second
    for a prompt of PROMPT_TOKENS; layer_s: a decoder layer of one token whatever its size (hooks, routes, slots,
    attention's own calls); token_s: what `generate` adds to a token.
    """

    dense_bytes_per_s: float
    expert_bytes_per_s: float
    dense_flops: float
    expert_flops: float
    layer_s: float
    token_s: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EngineRates:
        """The opposite of `as_dict`.

        Raises:
            UsageError: it is no such thing.
        """
        try:
            return cls(**{name: float(values[name]) for name in cls.__slots__})
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"damaged rates of the engine ({error}): measure anew with `--fresh`.") from error


@dataclass(frozen=True, slots=True)
class ModelRates:
    """Of one checkpoint's own experts and one number of threads, on the CPU; None where files cannot be read directly.

    one_bytes_per_s, stream_bytes_per_s: reading experts into slots, one after another or several at once; expert_flops:
    operations per second of a prompt of PROMPT_TOKENS.
    """

    one_bytes_per_s: float | None
    stream_bytes_per_s: float | None
    expert_flops: float

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelRates:
        """The opposite of `dataclasses.asdict`.

        Raises:
            UsageError: it is no such thing.
        """
        try:
            rates = [None if values[name] is None else float(values[name]) for name in cls.__slots__]
            if rates[2] is None:
                raise TypeError("expert_flops is null")
            return cls(rates[0], rates[1], rates[2])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"damaged rates of a model ({error}): measure anew with `--fresh`.") from error


@dataclass(frozen=True, slots=True)
class Machine:
    """Measured rates; None or an absent key where something was not measured.

    Attributes:
        fingerprint: what it was measured on (`fingerprint`).
        device: where experts run: "cpu" or "cuda".
        memory_bytes_per_s: reading a large array, by threads.
        disk_direct_bytes_per_s: reading the checkpoint's files with O_DIRECT; the best way found, `disk_direct_way`.
        disk_cached_bytes_per_s: reading what the page cache holds, one thread.
        h2d_pinned_bytes_per_s, h2d_pageable_bytes_per_s: host memory to the GPU.
        flops: dtype -> threads -> operations per second of a matrix product.
        device_bytes_per_s, device_flops: the same two of the GPU's own memory.
        notes: what could not be measured, and why.
        engine: threads -> what emoe's own kernels and layers take (`with_engine`); empty where not measured.
        models: `layout_of` a checkpoint -> threads -> what its own experts take (`with_model`).
    """

    fingerprint: dict[str, str]
    device: str = "cpu"
    memory_bytes_per_s: Rates = field(default_factory=dict)
    disk_direct_bytes_per_s: float | None = None
    disk_cached_bytes_per_s: float | None = None
    disk_direct_way: dict[str, int] | None = None
    h2d_pinned_bytes_per_s: float | None = None
    h2d_pageable_bytes_per_s: float | None = None
    flops: dict[str, Rates] = field(default_factory=dict)
    device_bytes_per_s: float | None = None
    device_flops: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    engine: dict[int, EngineRates] = field(default_factory=dict)
    models: dict[str, dict[int, ModelRates]] = field(default_factory=dict)

    def memory_rate(self, threads: int) -> float:
        """Bytes per second at which weights are read where experts run, by so many threads.

        Raises:
            UsageError: it was not measured.
        """
        if self.device != "cpu" and self.device_bytes_per_s is not None:
            return self.device_bytes_per_s
        return _at(self.memory_bytes_per_s, threads, "memory bandwidth")

    def compute_rate(self, dtype: str, threads: int) -> float:
        """Operations per second in `dtype` where experts run; that of float32 for a dtype without a rate of its own.

        Raises:
            UsageError: it was not measured.
        """
        if self.device != "cpu" and self.device_flops:
            rate = self.device_flops.get(dtype, self.device_flops.get("float32"))
            if rate is not None:
                return rate
        return _at(self.flops.get(dtype) or self.flops.get("float32", {}), threads, f"matrix rate of {dtype}")

    def link_rate(self, link: Link) -> float:
        """Bytes per second over the way of missed experts.

        Raises:
            UsageError: it was not measured.
        """
        rate = {
            "direct": self.disk_direct_bytes_per_s,
            "cached": self.disk_cached_bytes_per_s,
            "pinned": self.h2d_pinned_bytes_per_s,
            "pageable": self.h2d_pageable_bytes_per_s,
        }[link]
        if rate is None:
            raise UsageError(
                f"the rate of {link!r} loads was not measured on this machine ({'; '.join(self.notes) or 'no files'}). "
                "Run `emoe roofline MODEL --fresh` with a local checkpoint."
            )
        return rate

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it back."""
        return {"format": FORMAT} | asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Machine:
        """The opposite of `as_dict`, also after JSON made text of the numbers of threads.

        Raises:
            UsageError: it is no such thing.
        """
        if values.get("format") != FORMAT:
            raise UsageError(f"no measurements of a machine in the format {FORMAT}: measure anew with `--fresh`.")
        try:
            known = {name: values[name] for name in cls.__slots__ if name not in ("engine", "models")}
            known["memory_bytes_per_s"] = _rates(known["memory_bytes_per_s"])
            known["flops"] = {dtype: _rates(rates) for dtype, rates in known["flops"].items()}
            known["notes"] = tuple(known["notes"])
            engine = values.get("engine") or {}
            known["engine"] = {int(threads): EngineRates.from_dict(rates) for threads, rates in engine.items()}
            known["models"] = {
                model: {int(threads): ModelRates.from_dict(rates) for threads, rates in by_threads.items()}
                for model, by_threads in (values.get("models") or {}).items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"damaged measurements of a machine ({type(error).__name__}: {error}): measure anew with `--fresh`."
            ) from error
        return cls(**known)


def _at(rates: Rates, threads: int, what: str) -> float:
    """The best rate of up to that many threads (fewer may be faster: a neighbour on a core), or of the fewest."""
    if not rates:
        raise UsageError(f"the {what} was not measured: run `emoe roofline MODEL --fresh`.")
    return max((rate for count, rate in rates.items() if count <= threads), default=rates[min(rates)])


def _rates(values: Mapping[Any, Any]) -> Rates:
    return {int(threads): float(rate) for threads, rate in values.items()}


def fingerprint(files: Iterable[Path] = (), device: str = "cpu") -> dict[str, str]:
    """What the rates depend on: processor, cores, torch, the file system of the files, the GPU."""
    found = {"cpu": processor(), "cores": str(cores()), "torch": _torch_version()}
    first = next(iter(files), None)
    found["files"] = "none" if first is None else file_system(Path(first))
    if device != "cpu":
        import torch

        found["device"] = torch.cuda.get_device_name(device)
    return found


def processor() -> str:
    """The processor's name, or the architecture's where the system tells no name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def cores() -> int:
    """The cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _torch_version() -> str:
    """Without importing torch, which takes a second."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return "none"


def file_system(file: Path) -> str:
    """Type and source of the file system that `file` is on ("ext4 /dev/vda1"), or its device number."""
    number = os.stat(file).st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return device
    for line in lines:
        fields = line.split()
        if len(fields) > 6 and fields[2] == device:
            after = fields.index("-") if "-" in fields else -1
            if 0 < after < len(fields) - 2:
                return f"{fields[after + 1]} {fields[after + 2]}"
    return device


def kept_path(of: Mapping[str, str]) -> Path:
    """The file that keeps the measurements of a machine with this fingerprint."""
    digest = hashlib.sha256(json.dumps(dict(of), sort_keys=True).encode()).hexdigest()[:12]
    return user_cache() / f"machine-{digest}.json"


def keep(machine: Machine) -> Path:
    """Write the measurements to the user's cache and return the file.

    Raises:
        UsageError: it cannot be written.
    """
    file = kept_path(machine.fingerprint)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(machine.as_dict(), indent=1))
        beside.replace(file)
    except OSError as error:
        raise UsageError(
            f"{file} cannot be written ({error.strerror}): set EMOE_CACHE to a folder that can."
        ) from error
    return file


def read(file: Path, wanted: Mapping[str, str]) -> Machine:
    """The measurements in `file`.

    Raises:
        UsageError: it is unreadable, damaged, or of another machine than `wanted`.
    """
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{file} cannot be read ({error}): measure anew with `emoe roofline MODEL --fresh`."
        ) from error
    machine = Machine.from_dict(values if isinstance(values, dict) else {})
    if machine.fingerprint != dict(wanted):
        differing = {
            name: f"{machine.fingerprint.get(name)} there, {value} here"
            for name, value in wanted.items()
            if machine.fingerprint.get(name) != value
        }
        raise UsageError(
            f"{file} was measured on another machine ({'; '.join(f'{k}: {v}' for k, v in differing.items())}). "
            "Measure this one with `emoe roofline MODEL --fresh`."
        )
    return machine


def known(files: Iterable[Path] = (), device: str = "cpu") -> Machine | None:
    """This machine's kept measurements, None where it was not measured. Does not import torch for device "cpu".

    Raises:
        UsageError: what is kept is damaged, or of another machine.
    """
    wanted = fingerprint(files, device)
    file = kept_path(wanted)
    return read(file, wanted) if file.exists() else None


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
    rates.check_device(device)
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


def layout_of(folder: Path) -> str:
    """The key of `Machine.models`: checkpoints of one architecture take alike."""
    return layout_fingerprint(read_headers(folder))


def with_model(machine: Machine, folder: Path, threads: int, say: Say = lambda _: None) -> Machine:
    """The machine with what the experts of the checkpoint in `folder` take on it, with so many threads; a few seconds.

    Raises:
        UsageError: the machine is a GPU's: those are not predicted.
        CheckpointError, UnsupportedModelError, ReadError: the checkpoint cannot be indexed or read.
    """
    from emoe.profiling.model_rates import measure_model

    if machine.device != "cpu":
        raise UsageError(f"a model's experts are timed on the CPU only, not on {machine.device!r}.")
    say(f"{folder.name}'s own experts, {threads} thread{'s' * (threads > 1)}")
    mark = layout_of(folder)
    of_model = {**machine.models.get(mark, {}), threads: measure_model(folder, threads)}
    return replace(machine, models={**machine.models, mark: of_model})


def thread_counts(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... and `most`."""
    counts = [1 << i for i in range(most.bit_length()) if 1 << i <= most]
    return tuple(dict.fromkeys((*counts, most)))
