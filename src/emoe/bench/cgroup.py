"""A memory cgroup for one process: made below this process's own, so that no limit above is escaped, and removed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from emoe.config import format_bytes
from emoe.errors import EmoeError

ROOT = Path("/sys/fs/cgroup")
REMOVAL_S = 10.0
_NUMBERS = count(1)


class CgroupError(EmoeError):
    """A memory cgroup cannot be made here; the text says why and what else gives the same limit."""


@dataclass(frozen=True, slots=True)
class MemoryCgroup:
    """A cgroup with a memory limit. `version` is 1 or 2."""

    folder: Path
    version: int
    limit_bytes: int

    @property
    def entry(self) -> Path:
        """Writing a process id here moves that process in."""
        return self.folder / "cgroup.procs"

    @property
    def peak_bytes(self) -> int | None:
        """The most that was charged to it, page cache included; None where the kernel does not say."""
        file = self.folder / ("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak")
        try:
            return int(file.read_text())
        except OSError:
            return None

    @property
    def kills(self) -> int:
        """Processes the kernel killed in it because the limit left no other way."""
        file = self.folder / ("memory.oom_control" if self.version == 1 else "memory.events")
        for line in file.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
        return 0


@contextmanager
def memory_cgroup(
    limit_bytes: int, root: Path = ROOT, proc: Path = Path("/proc/self/cgroup")
) -> Iterator[MemoryCgroup]:
    """Make a memory cgroup of `limit_bytes` and remove it at the end, when its processes have gone.

    Raises:
        CgroupError: the kernel has no memory controller, or this user may not make one.
    """
    parent, version = _own(root, proc)
    folder = parent / f"emoe-bench-{os.getpid()}-{next(_NUMBERS)}"
    limit = folder / ("memory.limit_in_bytes" if version == 1 else "memory.max")
    swap = folder / ("memory.memsw.limit_in_bytes" if version == 1 else "memory.swap.max")
    try:
        folder.mkdir()
    except OSError as error:
        raise _refusal(parent, limit_bytes, str(error)) from error
    try:
        try:
            if not limit.exists():
                raise _refusal(parent, limit_bytes, "the memory controller is not handed down to it")
            limit.write_text(str(limit_bytes))
            if swap.exists():  # with swap a process over the limit would be slow instead of over
                swap.write_text(str(limit_bytes) if version == 1 else "0")
        except OSError as error:
            raise _refusal(parent, limit_bytes, str(error)) from error
        yield MemoryCgroup(folder, version, limit_bytes)
    finally:
        _remove(folder)


def _own(root: Path, proc: Path) -> tuple[Path, int]:
    """The folder of this process's own memory cgroup, and the version."""
    try:
        lines = proc.read_text().splitlines()
    except OSError as error:
        raise CgroupError(f"there are no cgroups here ({error}); leave out --memory-limit") from error
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _inside(root / "memory", path), 1
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            return _inside(root, path), 2
    raise CgroupError("this kernel has no memory cgroups; leave out --memory-limit")


def _inside(mount: Path, path: str) -> Path:
    """The cgroup `path` under `mount`: in a container the path may be the host's, and the mount's root then ours."""
    folder = mount / path.lstrip("/")
    return folder if folder.is_dir() else mount


def _refusal(parent: Path, limit_bytes: int, why: str) -> CgroupError:
    return CgroupError(
        f"no memory cgroup of {format_bytes(limit_bytes)} can be made in {parent}: {why}. Run as root, or start the "
        f"whole benchmark in one: systemd-run --user --scope -p MemoryMax={limit_bytes} -p MemorySwapMax=0 emoe bench "
        "decode ..., without --memory-limit"
    )


def _remove(folder: Path) -> None:
    """Remove the cgroup; a process that has just been killed leaves it a moment later."""
    end = time.monotonic() + REMOVAL_S
    while True:
        try:
            folder.rmdir()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise CgroupError(f"the cgroup {folder} could not be removed ({error}); use rmdir") from error
        time.sleep(0.05)
