"""What the kernel says about this process: memory at its peak and now, bytes read from storage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_SELF = Path("/proc/self")


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes: now, and at the peak since the last `reset_peak`."""

    now_bytes: int
    peak_bytes: int


def memory() -> Memory:
    """This process's memory, from /proc/self/status (Linux)."""
    found = {}
    for line in (_SELF / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM"):
            found[name] = int(value.split()[0]) * 1024
    return Memory(found["VmRSS"], found["VmHWM"])


def reset_peak() -> None:
    """Start the peak anew from what is resident now."""
    (_SELF / "clear_refs").write_text("5")


def storage_bytes_read() -> int:
    """Bytes that this process has made the kernel fetch from storage, by reads and by page faults."""
    for line in (_SELF / "io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    return 0
