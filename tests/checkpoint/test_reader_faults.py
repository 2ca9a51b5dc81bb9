"""Faults while reading: every one is a ReadError or UsageError that says what, where, how much and what to do."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emoe.checkpoint import segments
from emoe.checkpoint.headers import FileStamp
from emoe.checkpoint.index import ExpertIndex, build_index, skeleton
from emoe.checkpoint.memory_room import READER_KINDS, ReaderKind
from emoe.checkpoint.readers import Reader
from emoe.checkpoint.segments import Bytes
from emoe.errors import ReadError, UsageError
from tests.checkpoint.reading import KINDS, Parts, assert_parts_equal, expected, preadv, read
from tests.checkpoint.test_index import empty_parts


@KINDS
@given(limits=st.lists(st.integers(1, 9000), min_size=1, max_size=6))
def test_short_reads_are_continued(kind: ReaderKind, qwen: ExpertIndex, limits: list[int]) -> None:
    """A system call may give any part of what was asked; O_DIRECT at least a block, or the end of the file."""
    state = {"call": 0}

    def short(descriptor: int, buffers: Sequence[Bytes], offset: int) -> int:
        limit = limits[state["call"] % len(limits)]
        state["call"] += 1
        if kind == "direct":
            limit += segments.ALIGNMENT
        got = 0
        for buffer in buffers:
            part = os.pread(plain, min(buffer.size, limit - got), offset + got)
            buffer[: len(part)] = torch.frombuffer(bytearray(part), dtype=torch.uint8).numpy() if part else []
            got += len(part)
            if len(part) < buffer.size:
                break
        return got

    pieces = qwen.pieces(1, 0)
    plain = os.open(pieces[0].file, os.O_RDONLY)
    try:
        with Reader("cached", qwen.files) as reader:
            wanted = empty_parts(qwen.layer(1))
            mine = [piece for piece in pieces if piece.file == pieces[0].file]
            reader.read_into(mine, wanted)
        with Reader(kind, qwen.files, pread=short) as reader:
            found = empty_parts(qwen.layer(1))
            reader.read_into(mine, found)
    finally:
        os.close(plain)
    for name, part in found.items():
        assert torch.equal(part.view(torch.uint8), wanted[name].view(torch.uint8))


@KINDS
def test_an_interrupted_call_is_repeated(kind: ReaderKind, qwen: ExpertIndex) -> None:
    interrupted = iter([True, True, False] * 10)

    def signalled(descriptor: int, buffers: Sequence[Bytes], offset: int) -> int:
        if next(interrupted):
            raise InterruptedError(errno.EINTR, os.strerror(errno.EINTR))
        return preadv(descriptor, buffers, offset)

    with Reader(kind, qwen.files, pread=signalled) as reader:
        assert_parts_equal(read(reader, qwen, 0, 7), expected(qwen, 0, 7))


@KINDS
def test_a_read_error_names_file_bytes_offset_and_remedy(kind: ReaderKind, qwen: ExpertIndex) -> None:
    def broken(descriptor: int, buffers: Sequence[Bytes], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    piece = min(qwen.pieces(0, 0), key=lambda piece: (piece.file, piece.offset))
    with Reader(kind, qwen.files, pread=broken) as reader:
        with pytest.raises(ReadError) as caught:
            read(reader, qwen, 0, 0)
        message = str(caught.value)
        assert str(piece.file) in message
        assert f"tensor '{piece.entry_name}'" in message
        assert "Input/output error (errno 5)" in message
        assert "Check the disk" in message
        assert isinstance(caught.value.__cause__, OSError)
        if kind != "direct":
            assert f"at byte {piece.offset:,}" in message
        with pytest.raises(ReadError):
            read(reader, qwen, 1, 1)


def test_a_reader_survives_a_fault(qwen: ExpertIndex) -> None:
    faults = iter([True] + [False] * 100)

    def once(descriptor: int, buffers: Sequence[Bytes], offset: int) -> int:
        if next(faults):
            raise OSError(errno.EIO, "flicker")
        return preadv(descriptor, buffers, offset)

    with Reader("direct", qwen.files, pread=once) as reader:
        with pytest.raises(ReadError, match="flicker"):
            read(reader, qwen, 0, 0)
        assert_parts_equal(read(reader, qwen, 0, 0), expected(qwen, 0, 0))


@KINDS
def test_a_file_truncated_while_the_model_runs(kind: ReaderKind, mixtral: Path) -> None:
    index = build_index(mixtral, skeleton(mixtral)[1])
    piece = index.pieces(2, 7)[-1]
    with Reader(kind, index.files) as reader:
        kept = piece.offset + 100
        os.truncate(piece.file, kept)
        with pytest.raises(ReadError) as caught:
            read(reader, index, 2, 7)
    message = str(caught.value)
    assert f"{piece.file} ends early" in message
    assert piece.entry_name in message
    assert f"the file now has {kept:,}" in message
    assert "load the model again" in message


@KINDS
def test_a_file_overwritten_while_the_model_runs(kind: ReaderKind, mixtral: Path) -> None:
    """As large as before, and still the file that was opened: only its time tells."""
    index = build_index(mixtral, skeleton(mixtral)[1])
    file = index.pieces(2, 7)[-1].file
    with Reader(kind, index.files) as reader:
        read(reader, index, 2, 7)
        with file.open("r+b") as overwritten:
            overwritten.seek(file.stat().st_size // 2)
            overwritten.write(bytes(64))
        stat = file.stat()
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))  # no matter how coarse the clock is
        with pytest.raises(ReadError, match="has changed since it was indexed") as caught:
            read(reader, index, 2, 7)
    assert str(file) in str(caught.value)


def test_a_direct_read_of_one_block_is_continued(qwen: ExpertIndex) -> None:
    with Reader("direct", qwen.files) as reader:

        def short(descriptor: int, buffers: Sequence[Bytes], offset: int) -> int:
            return preadv(descriptor, [buffers[0][: reader._block]], offset)

        reader._pread = short
        assert_parts_equal(read(reader, qwen, 1, 1), expected(qwen, 1, 1))


def test_closing_waits_for_no_read_that_was_interrupted_as_it_ended(qwen: ExpertIndex) -> None:
    reader = Reader("cached", qwen.files)
    read(reader, qwen, 0, 0)
    reader._reading.add(threading.get_ident())  # what Ctrl-C leaves
    reader.close()


def test_an_interrupt_as_a_read_begins_leaves_no_lock_taken(qwen: ExpertIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader("cached", qwen.files)
    enter = threading.Condition.__enter__
    interrupted: list[bool] = []

    def taken(condition: threading.Condition) -> bool:
        found = enter(condition)
        if condition is reader._idle and not interrupted:
            interrupted.append(found)
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(threading.Condition, "__enter__", taken)
        read(reader, qwen, 0, 0)
    other = threading.Thread(target=read, args=(reader, qwen, 0, 1), daemon=True)
    other.start()
    other.join(5)
    assert not other.is_alive()
    reader.close()


def test_a_file_whose_server_has_lost_it(qwen: ExpertIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    with Reader("cached", qwen.files) as reader:

        def stale(descriptor: int) -> os.stat_result:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fstat", stale)
            with pytest.raises(ReadError, match=r"Stale file handle.*load the model again") as caught:
                read(reader, qwen, 0, 0)
    assert any(str(piece.file) in str(caught.value) for piece in qwen.pieces(0, 0))


def test_a_file_that_changed_since_it_was_indexed(mixtral: Path) -> None:
    index = build_index(mixtral, skeleton(mixtral)[1])
    file = index.pieces(0, 0)[0].file
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
    with pytest.raises(ReadError, match="has changed since it was indexed") as caught:
        Reader("cached", index.files)
    assert str(file) in str(caught.value)
    assert "modified later" in str(caught.value)


def test_a_file_that_has_gone(mixtral: Path) -> None:
    index = build_index(mixtral, skeleton(mixtral)[1])
    index.pieces(0, 0)[0].file.unlink()
    for kind in READER_KINDS:
        with pytest.raises(ReadError, match="cannot be opened: No such file or directory"):
            Reader(kind, index.files)


def test_too_many_open_files_names_the_remedy(qwen: ExpertIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ReadError, match=r"Too many open files. Raise `ulimit -n`"):
        Reader("cached", qwen.files)


def test_files_are_closed_after_a_failed_start(mixtral: Path) -> None:
    index = build_index(mixtral, skeleton(mixtral)[1])
    stamps = dict(index.files)
    stamps[list(stamps)[-1]] = FileStamp(1, 1)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ReadError, match="has changed"):
        Reader("cached", stamps)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_system_without_o_direct_is_read_with_advice_and_said_so(
    qwen: ExpertIndex, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.open

    def refuse_direct(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags)

    monkeypatch.setattr(os, "open", refuse_direct)
    with caplog.at_level(logging.WARNING), Reader("direct", qwen.files) as reader:
        assert reader.kind == "advised"
        assert "without O_DIRECT (Invalid argument)" in reader.notice
        assert str(qwen.path) in reader.notice
        assert caplog.messages == [reader.notice]
        assert_parts_equal(read(reader, qwen, 1, 2), expected(qwen, 1, 2))


def test_a_file_system_that_opens_but_does_not_read_directly(
    qwen: ExpertIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "preadv", refuse)
    reader = Reader("direct", qwen.files)
    assert reader.kind == "advised"
    reader.close()


def test_a_closed_reader_refuses(qwen: ExpertIndex) -> None:
    reader = Reader("cached", qwen.files)
    reader.close()
    reader.close()
    with pytest.raises(ReadError, match="reader of experts is closed"):
        read(reader, qwen, 0, 0)


def test_closing_waits_for_reads_under_way(qwen: ExpertIndex) -> None:
    started, go_on = threading.Event(), threading.Event()
    results: list[Parts] = []

    def slow(descriptor: int, buffers: Sequence[Bytes], offset: int) -> int:
        started.set()
        assert go_on.wait(10)
        return preadv(descriptor, buffers, offset)

    reader = Reader("cached", qwen.files, pread=slow)
    reading = threading.Thread(target=lambda: results.append(read(reader, qwen, 0, 3)))
    reading.start()
    assert started.wait(10)
    closing = threading.Thread(target=reader.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    go_on.set()
    closing.join(10)
    reading.join(10)
    assert not closing.is_alive()
    assert_parts_equal(results[0], expected(qwen, 0, 3))


@pytest.mark.parametrize("limit", [0, -1.0, float("nan")])
def test_a_bandwidth_that_makes_no_sense(qwen: ExpertIndex, limit: float) -> None:
    with pytest.raises(UsageError, match="max_bytes_per_s must be positive"):
        Reader("cached", qwen.files, max_bytes_per_s=limit)


def test_an_unknown_kind() -> None:
    with pytest.raises(UsageError, match="'mmap' is no way to read"):
        Reader("mmap", {})  # type: ignore[arg-type]


def test_a_file_the_reader_was_not_opened_on(qwen: ExpertIndex) -> None:
    with Reader("cached", {}) as reader, pytest.raises(ReadError, match="not among the files"):
        read(reader, qwen, 0, 0)


def spoil(parts: Parts, how: str) -> Parts:
    part = parts["down_proj"]
    changed: dict[str, Any] = {
        "missing": {},
        "strided": {"down_proj": torch.empty(24, 32, dtype=part.dtype).t()},
        "small": {"down_proj": torch.empty(16, 24, dtype=part.dtype)},
        "flat": {"down_proj": torch.empty(32 * 24, dtype=part.dtype)},
        "dtype": {"down_proj": part.to(torch.float16)},
        "meta": {"down_proj": part.to("meta")},
    }
    return {"gate_up_proj": parts["gate_up_proj"], **changed[how]}


@pytest.mark.parametrize("how", ["missing", "strided", "small", "flat", "dtype", "meta"])
def test_parts_that_do_not_fit_are_refused(how: str, qwen: ExpertIndex) -> None:
    with Reader("cached", qwen.files) as reader, pytest.raises(UsageError, match="part 'down_proj'"):
        reader.read_into(qwen.pieces(0, 0), spoil(empty_parts(qwen.layer(0)), how))
