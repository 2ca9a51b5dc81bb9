"""What O_DIRECT needs to know of a file system, and the memory it reads into."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.checkpoint import direct
from emoe.checkpoint.segments import ALIGNMENT
from emoe.errors import ReadError


@given(st.integers(1, 12), st.integers(1, 600).map(lambda blocks: blocks * ALIGNMENT))
def test_buffers_are_separate_aligned_and_of_the_size_asked_for(count: int, nbytes: int) -> None:
    buffers = direct.buffers(count, nbytes)
    starts = [buffer.ctypes.data for buffer in buffers]
    assert [buffer.size for buffer in buffers] == [nbytes] * count
    assert starts[0] % direct.HUGE_BYTES == 0
    assert all(later - earlier == nbytes for earlier, later in itertools.pairwise(starts))
    for number, buffer in enumerate(buffers):
        buffer[[0, -1]] = number
    assert [(buffer[0], buffer[-1]) for buffer in buffers] == [(number, number) for number in range(count)]


@pytest.mark.parametrize("error", [OSError(errno.ENOMEM, "Cannot allocate memory"), MemoryError()])
def test_memory_that_is_refused_is_named(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> mmap.mmap:
        raise error

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(ReadError, match=r"4,194,304 bytes to read through.*smaller budget"):
        direct.buffers(2, ALIGNMENT)


def test_one_file_stands_for_a_file_system(tmp_path: Path) -> None:
    files = [tmp_path / "missing", tmp_path / "a", tmp_path / "b"]
    for file in files[1:]:
        file.write_bytes(b"x")
    assert direct.one_each(files) == [tmp_path / "a"]
    assert direct.one_each(files[:1]) == []


@pytest.mark.parametrize(
    ("error", "refused"), [(errno.EINVAL, True), (errno.EOPNOTSUPP, True), (errno.EIO, False), (errno.EMFILE, False)]
)
def test_only_a_refusal_of_direct_reads_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, refused: bool
) -> None:
    def fail(*_: object) -> int:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "open", fail)
    assert direct.refusal(tmp_path) == (os.strerror(error) if refused else None)


def test_blocks_are_as_small_as_every_file_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fine, coarse = tmp_path / "fine", tmp_path / "coarse"
    for file in (fine, coarse):
        file.write_bytes(bytes(2 * ALIGNMENT))
    asked: list[tuple[int, int]] = []

    def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        (buffer,) = buffers
        asked.append((len(buffer), offset))
        if len(buffer) < ALIGNMENT and os.readlink(f"/proc/self/fd/{descriptor}") == str(coarse):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return len(buffer)

    monkeypatch.setattr(os, "preadv", read)
    monkeypatch.setattr(os, "O_DIRECT", 0)
    before = len(os.listdir("/proc/self/fd"))
    assert direct.block_nbytes([fine]) == direct.SMALL_BLOCK
    assert direct.block_nbytes([fine, coarse]) == ALIGNMENT
    assert direct.block_nbytes([]) == direct.SMALL_BLOCK
    assert set(asked) == {(direct.SMALL_BLOCK, direct.SMALL_BLOCK)}  # a place that only such blocks reach
    assert len(os.listdir("/proc/self/fd")) == before
    assert direct.refusal(coarse) is None
