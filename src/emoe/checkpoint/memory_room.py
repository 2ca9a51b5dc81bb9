"""How much memory is free for the page cache, and so which way to read experts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from emoe.config import format_bytes
from emoe.errors import UsageError

if TYPE_CHECKING:
    from emoe.checkpoint.index import ExpertIndex

ReaderKind = Literal["cached", "direct", "advised"]
READER_KINDS: tuple[ReaderKind, ...] = get_args(ReaderKind)

# The page cache also holds the checkpoint's dense tensors while they load, and whatever else the machine
# reads.
MARGIN_SHARE = 0.1
MARGIN_BYTES = 128 << 20

# cgroup v1 writes "no limit" as a number near 2^63.
_UNLIMITED = 1 << 60
_OWN = ("RssAnon", "RssFile")


@dataclass(frozen=True, slots=True)
class MemoryRoom:
    """Bytes that could be taken without pushing out anything in use, and what sets that bound."""

    available_bytes: int
    bound: str


def memory_room(
    proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup"), *, with_own: bool = False
) -> MemoryRoom:
    """The room this process has: the least of MemAvailable and of what each memory cgroup above it leaves.

    A cgroup leaves its limit less its usage, plus the inactive file pages in that usage: those go first when
    memory is asked for. `with_own` adds what this process holds already: for a plan of the whole process, Python and
    torch included.
    """
    anonymous, mapped = _own(proc / "self" / "status") if with_own else (0, 0)
    machine = _meminfo(proc / "meminfo")
    # Pages of mapped files, which libraries are, count as available to the machine, but as used in a cgroup.
    rooms = [MemoryRoom(machine.available_bytes + anonymous, machine.bound)]
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        lines = []  # a kernel without cgroups: MemAvailable alone counts
    for line in lines:
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if number == "0" and not controllers:
            for root in (cgroups, cgroups / "unified"):
                rooms += _walk(root, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            rooms += _walk(cgroups / "memory", path, *names)
    rooms[1:] = [MemoryRoom(room.available_bytes + anonymous + mapped, room.bound) for room in rooms[1:]]
    return min(rooms, key=lambda room: room.available_bytes)


def _own(file: Path) -> tuple[int, int]:
    """Bytes of this process's anonymous memory and of its mapped files; 0 where the kernel does not say."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0, 0
    found = {
        name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines) if name in _OWN
    }
    return found.get("RssAnon", 0), found.get("RssFile", 0)


def _meminfo(file: Path) -> MemoryRoom:
    """What the kernel says is available. Without the file (not Linux) nothing is taken to be."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return MemoryRoom(0, f"{file} cannot be read")
    for line in lines:
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return MemoryRoom(int(value.split()[0]) * 1024, "MemAvailable")
    return MemoryRoom(0, f"{file} has no MemAvailable")


def _walk(root: Path, path: str, limit_name: str, usage_name: str, reclaimable: str) -> list[MemoryRoom]:
    """The room in the cgroup `path` under `root` and in each of its parents that has a limit."""
    # Inside a container the path may be the host's and not exist under the mount; the mount's root is then
    # ours.
    relative = Path(path.lstrip("/"))
    rooms = []
    for directory in (root / relative, *(root / parent for parent in relative.parents)):
        limit, usage = _number(directory / limit_name), _number(directory / usage_name)
        if limit is None or usage is None or limit >= _UNLIMITED:
            continue
        free = limit - usage + _stat(directory / "memory.stat", reclaimable)
        rooms.append(MemoryRoom(max(free, 0), f"the {format_bytes(limit)} limit of cgroup {directory}"))
    return rooms


def _number(file: Path) -> int | None:
    """The number in a file; None where there is no such file or no number ("max")."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _stat(file: Path, name: str) -> int:
    """One line of a memory.stat file, 0 where it is absent: then less counts as free."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        key, _, value = line.partition(" ")
        if key == name and value.isdigit():
            return int(value)
    return 0


def choose_reader(
    index: ExpertIndex,
    resident_bytes: int,
    requested: str = "auto",
    *,
    room: MemoryRoom | None = None,
    reserved_bytes: int = 0,
) -> tuple[ReaderKind, str]:
    """How to read experts, and why in one sentence for the user.

    `resident_bytes` of experts (in the run dtype) will be in slots; the others are what streams.
    `reserved_bytes` is memory that will be taken and is not yet (slots, dense weights, KV cache). `room`
    defaults to `memory_room()`, measured now.

    Raises:
        UsageError: `requested` is no kind of reader.
    """
    if requested != "auto":
        for kind in READER_KINDS:
            if requested == kind:
                return kind, f"reads are {kind}, as asked"
        raise UsageError(f"{requested!r} is no way to read; use one of 'auto', {str(READER_KINDS)[1:-1]}")
    room = memory_room() if room is None else room
    total = index.total_expert_nbytes
    streamed_share = 1 - min(resident_bytes / total, 1) if total else 0.0
    streamed = round(index.total_stored_nbytes * streamed_share)
    free = max(room.available_bytes - reserved_bytes, 0)
    return _choose(streamed, free, room.bound)


def _choose(streamed_bytes: int, free_bytes: int, bound: str) -> tuple[ReaderKind, str]:
    """The choice from its three numbers."""
    needed = round(streamed_bytes * (1 + MARGIN_SHARE)) + MARGIN_BYTES
    if streamed_bytes == 0:
        return "cached", "reads go through the page cache: every expert is resident, so each is read once"
    if needed <= free_bytes:
        return "cached", (
            f"reads go through the page cache: the {format_bytes(streamed_bytes)} of experts that are not "
            f"resident fit into the {format_bytes(free_bytes)} free ({bound})"
        )
    return "direct", (
        f"reads bypass the page cache (O_DIRECT): the {format_bytes(streamed_bytes)} of experts that are not "
        f"resident, with a margin, do not fit into the {format_bytes(free_bytes)} free ({bound})"
    )
