"""O_DIRECT: the right bytes wherever they lie and go, in chunks, straight into place where that is possible."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emoe.checkpoint import direct, readers
from emoe.checkpoint.headers import FileStamp
from emoe.checkpoint.memory_room import ReaderKind
from emoe.checkpoint.pieces import Piece
from emoe.checkpoint.readers import Reader
from emoe.checkpoint.segments import Bytes
from emoe.errors import ReadError
from tests.checkpoint.reading import preadv

SIZE = 300_000


@dataclass(frozen=True)
class Content:
    file: Path
    content: bytes = field(repr=False)

    @property
    def files(self) -> dict[Path, FileStamp]:
        status = self.file.stat()
        return {self.file: FileStamp(status.st_size, status.st_mtime_ns)}

    def pieces(self, *ranges: tuple[int, int]) -> list[Piece]:
        """A piece for each (offset, bytes), each a part of its own."""
        return [
            Piece(f"{i}", f"t{i}", self.file, offset, n, "U8", 0, (1,), (n,), (slice(0, n),), True)
            for i, (offset, n) in enumerate(ranges)
        ]


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Content:
    file = tmp_path_factory.mktemp("direct") / "bytes.bin"
    text = random.Random(0).randbytes(SIZE)
    file.write_bytes(text)
    return Content(file, text)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(readers, "MOST_CHUNK_BYTES", 8192)


def memory(nbytes: int, phase: int) -> torch.Tensor:
    """`nbytes` that start `phase` bytes after a page."""
    page = np.frombuffer(mmap.mmap(-1, nbytes + phase + 1), dtype=np.uint8)
    return torch.from_numpy(page[phase : phase + nbytes])


offsets = st.integers(0, SIZE - 1) | st.integers(0, SIZE // 512 - 1).map(lambda n: n * 512)
lengths = st.integers(1, 70_000) | st.integers(1, 130).map(lambda n: n * 512)
phases = st.sampled_from([0, 512, 1024, 64, 8, 1])


@pytest.mark.usefixtures("small_chunks")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(offsets, lengths, phases), min_size=1, max_size=4), st.booleans())
def test_any_range_comes_to_any_place(content: Content, wanted: list[tuple[int, int, int]], adjoin: bool) -> None:
    ranges: list[tuple[int, int]] = []
    at = 0
    for offset, length, _ in wanted:
        start = at if adjoin and ranges else offset
        at = min(start + length, SIZE)
        ranges.append((start, at - start))
    ranges = [each for each in ranges if each[1]]
    parts = {f"{i}": memory(length, wanted[i][2]) for i, (_, length) in enumerate(ranges)}
    with Reader("direct", content.files) as reader:
        assert reader.read_into(content.pieces(*ranges), parts) == sum(length for _, length in ranges)
    for i, (start, length) in enumerate(ranges):
        assert parts[f"{i}"].numpy().tobytes() == content.content[start : start + length]


def test_the_same_bytes_come_to_two_places(content: Content) -> None:
    parts = {"0": memory(5000, 0), "1": memory(5000, 8)}
    with Reader("direct", content.files) as reader:
        assert reader.read_into(content.pieces((700, 5000), (700, 5000)), parts) == 10_000
    for part in parts.values():
        assert part.numpy().tobytes() == content.content[700:5700]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", ["direct", "cached"])
def test_what_is_used_first_is_there_when_it_is_told(content: Content, kind: ReaderKind) -> None:
    ranges = ((512, 60_000), (60_512, 30_001), (200_000, 50_000))
    for first in (("1",), ("2", "0"), ("0", "1", "2")):
        parts = {f"{i}": memory(length, 0) for i, (_, length) in enumerate(ranges)}
        told: list[bool] = []

        def reached(parts: Any = parts, first: tuple[str, ...] = first, told: list[bool] = told) -> None:
            found = {name: parts[name].numpy().tobytes() for name in first}
            right = {f"{i}": content.content[s : s + n] for i, (s, n) in enumerate(ranges)}
            told.append(all(found[name] == right[name] for name in first))

        with Reader(kind, content.files) as reader:
            assert reader.read_into(content.pieces(*ranges), parts, 0, first, reached) == sum(n for _, n in ranges)
        assert told == [True]
        for i, (start, length) in enumerate(ranges):
            assert parts[f"{i}"].numpy().tobytes() == content.content[start : start + length]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("phase", "straight"), [(0, True), (512, True), (64, False)])
def test_what_is_aligned_is_read_into_place(content: Content, phase: int, straight: bool) -> None:
    part = memory(65536, phase)
    places: list[bool] = []
    sizes: list[int] = []

    def watched(descriptor: int, buffers: Sequence[Bytes], offset: int) -> int:
        places.extend(0 <= buffer.ctypes.data - part.data_ptr() < 65536 for buffer in buffers)
        sizes.extend(buffer.size for buffer in buffers)
        return preadv(descriptor, buffers, offset)

    with Reader("direct", content.files, pread=watched) as reader:
        if reader.kind != "direct" or reader._block != direct.SMALL_BLOCK:
            pytest.skip("this file system reads larger blocks")
        reader.read_into(content.pieces((4096, 65536)), {"0": part})
    assert part.numpy().tobytes() == content.content[4096 : 4096 + 65536]
    assert set(places) == {straight}
    assert len(sizes) == 8
    assert max(sizes) <= 8192 + 4096


@pytest.mark.usefixtures("small_chunks")
def test_a_device_of_larger_blocks_gets_larger_blocks(content: Content, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def picky(descriptor: int, buffers: Sequence[Bytes], offset: int) -> int:
        for buffer in buffers:
            view = np.frombuffer(buffer, dtype=np.uint8)
            if offset % 4096 or view.size % 4096 or view.ctypes.data % 4096:
                raise OSError(22, "Invalid argument")
        return real(descriptor, buffers, offset)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", picky)
    part = memory(50_000, 512)
    with Reader("direct", content.files) as reader:
        assert reader.kind == "direct"
        reader.read_into(content.pieces((512, 50_000)), {"0": part})
    assert part.numpy().tobytes() == content.content[512:50_512]


@pytest.mark.usefixtures("small_chunks")
def test_a_fault_in_one_chunk_fails_the_read_once_all_have_ended(content: Content) -> None:
    under_way: list[int] = []

    def broken(descriptor: int, buffers: Sequence[Bytes], offset: int) -> int:
        under_way.append(offset)
        try:
            if offset >= 3 * 8192:
                raise OSError(5, "flicker")
            return preadv(descriptor, buffers, offset)
        finally:
            under_way.remove(offset)

    with Reader("direct", content.files, pread=broken) as reader:
        with pytest.raises(ReadError, match=r"at byte 24,576 .*flicker"):
            reader.read_into(content.pieces((0, 200_000)), {"0": memory(200_000, 0)})
        assert under_way == []
