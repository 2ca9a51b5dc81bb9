"""A machine's measurements between runs: in the user's cache, and refused for any other machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from emoe.checkpoint.fingerprint import layout_fingerprint
from emoe.checkpoint.headers import read_headers
from emoe.config import user_cache
from emoe.errors import UsageError
from emoe.profiling.machine import Machine


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


def layout_of(folder: Path) -> str:
    """The key of `Machine.models`: checkpoints of one architecture take alike."""
    return layout_fingerprint(read_headers(folder))
