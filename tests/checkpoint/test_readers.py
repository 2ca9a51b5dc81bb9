"""Readers: the right bytes in every way of reading."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from emoe.checkpoint import readers, segments
from emoe.checkpoint.index import ExpertIndex, Piece, build_index, skeleton
from emoe.checkpoint.memory_room import ReaderKind
from emoe.checkpoint.readers import Reader, staging_nbytes
from emoe.checkpoint.segments import Bytes
from tests.checkpoint.reading import KINDS, assert_parts_equal, counting, expected, keys_of, read
from tests.conftest import Checkpoints


@KINDS
@pytest.mark.parametrize("name", ["qwen3_moe", "inkling2_text", "gpt_oss", "aria_text"])
@pytest.mark.parametrize("run", [torch.bfloat16, torch.float32], ids=str)
def test_every_way_of_reading_gives_the_same(
    kind: ReaderKind, name: str, run: torch.dtype, checkpoints: Checkpoints
) -> None:
    path = checkpoints(name)
    index = build_index(path, skeleton(path, dtype=run)[1])
    with Reader("cached", index.files) as plain, Reader(kind, index.files) as reader:
        for layer, expert in keys_of(index):
            assert_parts_equal(read(reader, index, layer, expert), read(plain, index, layer, expert))


@KINDS
def test_reads_across_shards(kind: ReaderKind, qwen: ExpertIndex) -> None:
    assert len({piece.file for key in keys_of(qwen) for piece in qwen.pieces(*key)}) > 3
    with Reader(kind, qwen.files) as reader:
        assert_parts_equal(read(reader, qwen, 2, 5), expected(qwen, 2, 5))


@KINDS
def test_threads_share_a_reader(kind: ReaderKind, checkpoints: Checkpoints) -> None:
    """Strided pieces too: each thread has its own scratch memory."""
    path = checkpoints("inkling2_text")
    index = build_index(path, skeleton(path)[1])
    with Reader("cached", index.files) as plain:
        wanted = {key: read(plain, index, *key) for key in keys_of(index)}
    wrong: list[object] = []

    def work(reader: Reader) -> None:
        for _ in range(3):
            for key, parts in wanted.items():
                found = read(reader, index, *key)
                wrong.extend(name for name in parts if not torch.equal(found[name], parts[name]))

    with Reader(kind, index.files) as reader:
        threads = [threading.Thread(target=work, args=(reader,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_an_expert_that_lies_together_is_one_system_call(checkpoints: Checkpoints) -> None:
    path = checkpoints("qwen3_moe")
    index = build_index(path, skeleton(path)[1])
    ways: tuple[tuple[ReaderKind, int], ...] = (("cached", 3), ("direct", 1))
    for kind, buffers in ways:
        calls: list[int] = []
        with Reader(kind, index.files, pread=counting(calls)) as reader:
            read(reader, index, 1, 4)
        assert calls == [buffers]


def cached_pages(file: Path) -> int:
    """Pages of the file in the page cache, by mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    size = ctypes.c_size_t(file.stat().st_size)
    vector = (ctypes.c_ubyte * (-(-size.value // mmap.PAGESIZE)))()
    with file.open("rb") as stream:
        address = ctypes.c_void_p(libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, stream.fileno(), 0))
        try:
            assert libc.mincore(address, size, vector) == 0
        finally:
            libc.munmap(address, size)
    return sum(value & 1 for value in vector)


@pytest.mark.parametrize(("kind", "stays"), [("cached", True), ("direct", False), ("advised", False)])
def test_what_is_left_in_the_page_cache(kind: ReaderKind, stays: bool, mixtral: Path) -> None:
    index = build_index(mixtral, skeleton(mixtral)[1])
    file = index.pieces(1, 0)[0].file
    with file.open("r+b") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_pages(file):
        pytest.skip("this file system keeps its pages")
    with Reader(kind, index.files) as reader:
        for expert in range(8):
            read(reader, index, 1, expert)
    assert (cached_pages(file) > 0) == stays


def test_a_bandwidth_limit_holds_for_all_threads_together(qwen: ExpertIndex) -> None:
    nbytes = qwen.stored_nbytes(0, 0)
    with Reader("cached", qwen.files, max_bytes_per_s=nbytes * 100) as reader:
        started = time.monotonic()
        threads = [threading.Thread(target=read, args=(reader, qwen, 0, expert)) for expert in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed = time.monotonic() - started
    assert 0.078 <= elapsed < 1


def test_scratch_memory_is_bounded(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted pieces go through scratch memory run by run, not all at once."""
    path = checkpoints("qwen3_moe")
    index = build_index(path, skeleton(path, dtype=torch.float32)[1])
    monkeypatch.setattr(segments, "GATHER_BYTES", 4096)
    wanted: list[int] = []
    real = Reader._scratch

    def spy(self: Reader, nbytes: int) -> Bytes:
        wanted.append(nbytes)
        return real(self, nbytes)

    monkeypatch.setattr(Reader, "_scratch", spy)
    with Reader("cached", index.files) as reader:
        parts = read(reader, index, 0, 1)
    assert wanted == [4096, 4096, 4096]
    assert staging_nbytes("cached", index.pieces(0, 1)) == 4096
    assert staging_nbytes("direct", index.pieces(0, 1)) == 4096 + readers.STAGING_BYTES
    for name, part in expected(index, 0, 1).items():
        assert torch.equal(parts[name], part.float())


def test_direct_pieces_need_no_scratch(qwen: ExpertIndex) -> None:
    pieces: tuple[Piece, ...] = qwen.pieces(0, 1)
    assert staging_nbytes("cached", pieces) == 0
    assert staging_nbytes("direct", pieces) == readers.STAGING_BYTES
