"""Memory, page cache and cgroups, as the kernel reports them."""

from __future__ import annotations

import mmap
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from emoe.bench.cgroup import CgroupError, MemoryCgroup, memory_cgroup
from emoe.bench.page_cache import cached_bytes, drop
from emoe.bench.process import memory, reset_peak, storage_bytes_read

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@LINUX
def test_the_peak_is_that_since_it_was_reset() -> None:
    reset_peak()
    before = memory()
    # Straight from the system: an allocator may have as much left from before, which the process holds already.
    with mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        for page in range(0, len(block), 4096):
            block[page] = 1
    after = memory()
    assert after.peak_bytes - before.now_bytes > 60 * 2**20
    reset_peak()
    assert memory().peak_bytes < after.peak_bytes - 30 * 2**20
    assert storage_bytes_read() >= 0


@LINUX
def test_files_leave_the_page_cache(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(bytes(2**20 + 5))
    (tmp_path / "empty").touch()
    if cached_bytes([file]) < 2**20:
        pytest.skip("this file system keeps nothing in the page cache")
    stayed = drop([file, tmp_path / "empty"])
    assert stayed == cached_bytes([file])
    if stayed:
        pytest.skip("this file system lives in memory")
    file.read_bytes()
    assert cached_bytes([file]) >= 2**20


@LINUX
def test_a_process_over_the_limit_of_its_cgroup_is_killed_and_the_cgroup_goes() -> None:
    try:
        with memory_cgroup(48 * 2**20) as cgroup:
            grow = "x = bytearray(200 * 2**20); x[::4096] = b'x' * len(x[::4096])"
            command = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(cgroup.entry), sys.executable, "-c", grow]
            done = subprocess.run(command, check=False)
            assert done.returncode == -9
            assert cgroup.kills == 1
            peak = cgroup.peak_bytes
            assert peak is None or peak <= 48 * 2**20
            folder = cgroup.folder
    except CgroupError as error:
        pytest.skip(str(error))
    assert not folder.exists()


def tree(tmp_path: Path, version: int) -> tuple[Path, Path]:
    """A cgroup mount and the /proc/self/cgroup of a process in /mine."""
    proc = tmp_path / "cgroup"
    if version == 1:
        proc.write_text("5:memory:/mine\n1:cpu:/\n0::/\n")
        (tmp_path / "fs" / "memory" / "mine").mkdir(parents=True)
    else:
        proc.write_text("0::/mine\n")
        (tmp_path / "fs" / "mine").mkdir(parents=True)
    return tmp_path / "fs", proc


def enter(root: Path, proc: Path) -> AbstractContextManager[MemoryCgroup]:
    return memory_cgroup(1024, root, proc)


@pytest.mark.parametrize("version", [1, 2])
def test_where_no_memory_controller_is_handed_down_the_remedy_is_named(tmp_path: Path, version: int) -> None:
    root, proc = tree(tmp_path, version)
    with pytest.raises(CgroupError, match=r"systemd-run --user --scope -p MemoryMax=1024"), enter(root, proc):
        pass
    assert not [path for path in root.rglob("emoe-bench-*")]


def test_without_cgroups_the_option_is_named(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("1:cpu:/\n")
    none, absent = enter(tmp_path, tmp_path / "cgroup"), enter(tmp_path, tmp_path / "absent")
    with pytest.raises(CgroupError, match="no memory cgroups; leave out --memory-limit"), none:
        pass
    with pytest.raises(CgroupError, match="there are no cgroups here"), absent:
        pass
