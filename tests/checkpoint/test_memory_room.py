"""Free memory from /proc and cgroup files, and the choice of reader: no machine is asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.checkpoint.memory_room import MemoryRoom, choose_reader, memory_room
from emoe.errors import UsageError

GIB = 1 << 30


def machine(
    tmp_path: Path, available: int, cgroup: str = "", files: Mapping[str, object] = MappingProxyType({})
) -> tuple[Path, Path]:
    """A /proc and a /sys/fs/cgroup of the given content."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    cgroups.mkdir()
    (proc / "meminfo").write_text(f"MemTotal:       99999999 kB\nMemAvailable:   {available // 1024} kB\n")
    (proc / "self" / "cgroup").write_text(cgroup)
    for name, content in files.items():
        (cgroups / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroups / name).write_text(f"{content}\n")
    return proc, cgroups


def test_without_cgroups_memavailable_counts(tmp_path: Path) -> None:
    assert memory_room(*machine(tmp_path, 5 * GIB)) == MemoryRoom(5 * GIB, "MemAvailable")


def test_a_cgroup_without_a_limit_does_not_bind(tmp_path: Path) -> None:
    files = {"user/memory.max": "max", "user/memory.current": 100}
    assert memory_room(*machine(tmp_path, 5 * GIB, "0::/user\n", files)).bound == "MemAvailable"


def test_a_cgroup_v2_leaves_its_limit_less_usage_plus_inactive_file(tmp_path: Path) -> None:
    files = {
        "user/job/memory.max": 4 * GIB,
        "user/job/memory.current": 3 * GIB,
        "user/job/memory.stat": f"anon {GIB}\ninactive_anon 7\ninactive_file {GIB // 2}\nactive_file 5",
    }
    proc, cgroups = machine(tmp_path, 50 * GIB, "0::/user/job\n", files)
    assert memory_room(proc, cgroups) == MemoryRoom(
        GIB + GIB // 2, f"the 4.00 GiB limit of cgroup {cgroups / 'user' / 'job'}"
    )


def test_a_parent_that_is_tighter_binds(tmp_path: Path) -> None:
    files = {
        "user/job/memory.max": 4 * GIB,
        "user/job/memory.current": 0,
        "user/memory.max": 2 * GIB,
        "user/memory.current": GIB,
    }
    room = memory_room(*machine(tmp_path, 50 * GIB, "0::/user/job\n", files))
    assert room.available_bytes == GIB
    assert room.bound.endswith("cgroup/user")


def test_a_container_sees_its_cgroup_at_the_root(tmp_path: Path) -> None:
    """The path in /proc/self/cgroup is the host's and does not exist under the mount."""
    files = {"memory.max": 3 * GIB, "memory.current": GIB}
    assert memory_room(*machine(tmp_path, 50 * GIB, "0::/docker/4f2a\n", files)).available_bytes == 2 * GIB


def test_a_cgroup_v1(tmp_path: Path) -> None:
    files = {
        "memory/job/memory.limit_in_bytes": 6 * GIB,
        "memory/job/memory.usage_in_bytes": 5 * GIB,
        "memory/job/memory.stat": f"inactive_file 3\ntotal_inactive_file {2 * GIB}",
        "memory/memory.limit_in_bytes": 9223372036854771712,
        "memory/memory.usage_in_bytes": 20 * GIB,
    }
    lines = "11:cpu,cpuacct:/a\n7:memory:/job\n1:name=systemd:/x:y\n"
    assert memory_room(*machine(tmp_path, 50 * GIB, lines, files)).available_bytes == 3 * GIB


def test_a_hybrid_machine_keeps_version_2_under_unified(tmp_path: Path) -> None:
    files = {"unified/a/memory.max": GIB, "unified/a/memory.current": 0}
    assert memory_room(*machine(tmp_path, 50 * GIB, "0::/a\n", files)).available_bytes == GIB


def test_a_cgroup_over_its_limit_has_no_room(tmp_path: Path) -> None:
    files = {"memory.max": 1000, "memory.current": 2000}
    assert memory_room(*machine(tmp_path, GIB, "0::/\n", files)).available_bytes == 0


def test_where_nothing_can_be_read_nothing_is_free(tmp_path: Path) -> None:
    room = memory_room(tmp_path / "proc", tmp_path / "cgroup")
    assert room.available_bytes == 0
    assert "meminfo cannot be read" in room.bound


@pytest.mark.parametrize("content", ["MemTotal: 5 kB\n", "", "MemFree: 7 kB\n"])
def test_a_kernel_that_does_not_say_leaves_nothing(tmp_path: Path, content: str) -> None:
    proc, cgroups = machine(tmp_path, GIB)
    (proc / "meminfo").write_text(content)
    assert memory_room(proc, cgroups) == MemoryRoom(0, f"{proc / 'meminfo'} has no MemAvailable")


def test_a_kernel_without_cgroups(tmp_path: Path) -> None:
    proc, cgroups = machine(tmp_path, GIB)
    (proc / "self" / "cgroup").unlink()
    assert memory_room(proc, cgroups) == MemoryRoom(GIB, "MemAvailable")


def test_this_machine_has_room() -> None:
    assert memory_room().available_bytes > 0
    assert choose_reader(index_of(1), 0, reserved_bytes=1 << 60)[0] == "direct"


def index_of(total: int, stored: int | None = None) -> Any:
    return SimpleNamespace(total_expert_nbytes=total, total_stored_nbytes=total if stored is None else stored)


def test_the_page_cache_is_taken_where_the_rest_fits() -> None:
    kind, reason = choose_reader(index_of(10 * GIB), 4 * GIB, room=MemoryRoom(8 * GIB, "MemAvailable"))
    assert kind == "cached"
    assert "the 6.00 GiB of experts that are not resident fit into the 8.00 GiB free (MemAvailable)" in reason


def test_the_page_cache_is_bypassed_where_it_does_not() -> None:
    kind, reason = choose_reader(index_of(10 * GIB), 4 * GIB, room=MemoryRoom(6 * GIB, "the limit of cgroup x"))
    assert kind == "direct"
    assert "O_DIRECT" in reason
    assert "do not fit into the 6.00 GiB free (the limit of cgroup x)" in reason


def test_the_page_cache_is_taken_only_with_a_margin() -> None:
    """A tenth of what streams, and 128 MiB for whatever else passes through it."""
    needed = 6 * GIB + round(0.6 * GIB) + (128 << 20)
    for free, expected in ((needed, "cached"), (needed - 1, "direct")):
        assert choose_reader(index_of(10 * GIB), 4 * GIB, room=MemoryRoom(free, "x"))[0] == expected


def test_no_experts_need_no_cache() -> None:
    assert choose_reader(index_of(0), 0, room=MemoryRoom(0, "x"))[0] == "cached"


def test_memory_that_will_be_taken_is_not_free() -> None:
    room = MemoryRoom(8 * GIB, "MemAvailable")
    assert choose_reader(index_of(10 * GIB), 4 * GIB, room=room, reserved_bytes=3 * GIB)[0] == "direct"


def test_what_streams_is_counted_as_stored() -> None:
    """float32 slots over a bfloat16 checkpoint: half of 20 GiB is resident, 5 GiB of files are not."""
    index = index_of(20 * GIB, stored=10 * GIB)
    assert choose_reader(index, 10 * GIB, room=MemoryRoom(6 * GIB, "x"))[0] == "cached"


def test_everything_resident_needs_no_cache() -> None:
    kind, reason = choose_reader(index_of(GIB), GIB, room=MemoryRoom(0, "x"))
    assert kind == "cached"
    assert "every expert is resident" in reason


@pytest.mark.parametrize("kind", ["cached", "direct", "advised"])
def test_a_request_is_obeyed(kind: str) -> None:
    assert choose_reader(index_of(GIB), 0, kind, room=MemoryRoom(0, "x")) == (kind, f"reads are {kind}, as asked")


def test_an_unknown_request_is_refused() -> None:
    with pytest.raises(UsageError, match="'mmap' is no way to read; use one of 'auto', 'cached', 'direct', 'advised'"):
        choose_reader(index_of(GIB), 0, "mmap")


@given(st.integers(1, 1 << 40), st.integers(0, 1 << 40), st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_more_room_or_more_residency_never_turns_the_cache_off(total: int, resident: int, free: int, more: int) -> None:
    index = index_of(total)
    if choose_reader(index, resident, room=MemoryRoom(free, "x"))[0] == "cached":
        assert choose_reader(index, resident, room=MemoryRoom(free + more, "x"))[0] == "cached"
        assert choose_reader(index, resident + more, room=MemoryRoom(free, "x"))[0] == "cached"


def test_a_plan_of_the_whole_process_counts_what_it_holds_already(tmp_path: Path) -> None:
    """Libraries are files: available to the machine whoever maps them, but used up in a cgroup."""
    files = {"job/memory.max": 8 * GIB, "job/memory.current": 7 * GIB, "job/memory.stat": "inactive_file 0"}
    for number, (bound, available) in enumerate(((files, 4 * GIB), ({}, 11 * GIB))):
        (tmp_path / str(number)).mkdir()
        proc, cgroups = machine(tmp_path / str(number), 10 * GIB, "0::/job\n", bound)
        status = f"Name:\tpython\nVmRSS:\t{3 << 20} kB\nRssAnon:\t{1 << 20} kB\nRssFile:\t{2 << 20} kB\n"
        (proc / "self" / "status").write_text(status)
        assert memory_room(proc, cgroups, with_own=True).available_bytes == available
        assert memory_room(proc, cgroups).available_bytes == (GIB if bound else 10 * GIB)
    assert memory_room(*machine(tmp_path, GIB), with_own=True).available_bytes == GIB  # a kernel that does not say
