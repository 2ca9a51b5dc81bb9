"""Reading experts: positional reads of their pieces into a slot's memory.

Three ways. "cached" reads through the page cache, which then serves the next read at memory speed. "direct"
bypasses it (O_DIRECT), so that streamed experts neither push out dense weights nor lie in memory twice; an
expert is cut into chunks that several threads read at once, straight into the slot where file and memory are
aligned alike and by way of a small buffer elsewhere. "advised" reads through the cache and asks the kernel to
forget the pages at once; it stands in where the file system has no O_DIRECT. None of them maps files: a page
fault that fails inside a kernel cannot be reported, only die.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import cast

import numpy as np
import torch

from emoe.checkpoint import direct
from emoe.checkpoint.crew import Crew, counted
from emoe.checkpoint.headers import FileStamp
from emoe.checkpoint.memory_room import READER_KINDS, ReaderKind
from emoe.checkpoint.pieces import Piece
from emoe.checkpoint.segments import (
    ALIGNMENT,
    Bytes,
    Run,
    align_down,
    align_up,
    batches,
    buffers_of,
    drop_bytes,
    ended_early,
    finish,
    first_bytes,
    gather_nbytes,
    segments_of,
    tensors_of,
)
from emoe.checkpoint.throttle import Throttle
from emoe.errors import ReadError, UsageError

_log = logging.getLogger(__name__)

Preadv = Callable[[int, Sequence[Bytes], int], int]
"""`os.preadv`: (file descriptor, buffers, file offset) to bytes read. Tests inject faults here."""

# O_DIRECT reads are of at least so many bytes, where there are as many. 512 KiB, 1, 2, 4 MiB at a time gave 2.5, 2.8,
# 3.4, 3.4 GB/s of experts of 12 MiB; how many are under way decides little (4 or 8: the same).
CHUNK_BYTES = 1 << 20
# And of at most so many: of experts of 50 MB 2, 4, 8, 16 MiB at a time gave 2.75, 3.01, 2.97, 3.00 GB/s.
MOST_CHUNK_BYTES = 4 << 20
# An expert is read in at least so many, each of `CHUNK_BYTES` or more: of one of 3 MB, three keep the disk busy.
CHUNKS = 6
# What a reading thread holds for what cannot go straight into place: a chunk, and the rest of the blocks at its ends.
STAGING_BYTES = CHUNK_BYTES + 2 * ALIGNMENT
# O_DIRECT reads under way at once. One leaves half of a disk's bandwidth unused (bench/disk.py).
DIRECT_DEPTH = 8
# Linux's limit of buffers in one preadv.
_IOV_MAX = 1024


class Reader:
    """Reads pieces of the files it was opened on; any number of threads may share it.

    `kind` is how it reads, which is "advised" where "direct" was asked for and a file system refused;
    `notice` then says so (and a warning is logged), else it is empty.
    """

    def __init__(
        self,
        kind: ReaderKind,
        files: Mapping[Path, FileStamp],
        *,
        max_bytes_per_s: float | None = None,
        pread: Preadv | None = None,
    ) -> None:
        """Open `files` (an index's `files`) and check that they are still the ones that were indexed.

        `max_bytes_per_s` slows all reads together to a store of that bandwidth, for benchmarks.

        Raises:
            UsageError: no such kind, or a bandwidth that is not positive.
            ReadError: a file has gone, cannot be opened or has changed.
        """
        if kind not in READER_KINDS:
            raise UsageError(f"{kind!r} is no way to read; use one of {str(READER_KINDS)[1:-1]}")
        if max_bytes_per_s is not None and not max_bytes_per_s > 0:
            raise UsageError(f"max_bytes_per_s must be positive, not {max_bytes_per_s}")
        self.kind: ReaderKind = kind
        self.notice = ""
        self._pread: Preadv = cast("Preadv", os.preadv) if pread is None else pread
        self._throttle = None if max_bytes_per_s is None else Throttle(max_bytes_per_s)
        self._local = threading.local()
        self._crew = Crew(DIRECT_DEPTH, "emoe-read")
        self._block = ALIGNMENT
        self._spare: list[Bytes] = []
        # Taken by itself, not by way of the condition: an interrupt as that returns would leave it locked for good.
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._reading: set[int] = set()  # threads: one that was interrupted as it left is none the more
        self._closed = False
        self._files: dict[Path, int] = {}
        self._stamps = dict(files)
        try:
            self._open(files)
        except BaseException:
            self.close()
            raise

    def read_into(
        self,
        pieces: Sequence[Piece],
        parts: Mapping[str, torch.Tensor],
        priority: int = 0,
        first: Collection[str] = (),
        reached: Callable[[], None] | None = None,
    ) -> int:
        """Read `pieces` (of one expert) into `parts`, one contiguous CPU tensor per part of a slot.

        Returns the bytes of the checkpoint that were read. On an error the parts' content is undefined. Of several
        calls at once, those of a lower `priority` get the disk first (where reads are direct). The parts `first` are
        read before the others, and `reached` is called when they are there, from any thread, where all bytes go
        straight into place.

        Raises:
            ReadError: the read failed, the file ended early or has changed, or the reader is closed.
            UsageError: a part is missing, or is not what the pieces were made for.
        """
        with self._lock:
            if self._closed:
                raise ReadError("the reader of experts is closed; load the model again.")
            self._reading.add(threading.get_ident())
        try:
            nbytes = self._read_pieces(pieces, parts, priority, first, reached)
            for file in {piece.file for piece in pieces}:
                self._check_unchanged(file, self._files[file])
            return nbytes
        finally:
            with self._lock:
                self._reading.discard(threading.get_ident())
                self._idle.notify_all()

    def _read_pieces(
        self,
        pieces: Sequence[Piece],
        parts: Mapping[str, torch.Tensor],
        priority: int,
        first: Collection[str],
        reached: Callable[[], None] | None,
    ) -> int:
        if reached is None or not all(piece.direct for piece in pieces):
            each = batches(segments_of(pieces, parts), self._scratch)
            return sum(self._read_round(batch, [], parts, priority) for batch in each)
        # No memory is needed in between: all that is not first is read at once behind it.
        halves = ([piece for piece in pieces if (piece.part in first) is wanted] for wanted in (True, False))
        early, late = (
            [run for batch in batches(segments_of(half, parts), self._scratch) for run in batch] for half in halves
        )
        return self._read_round(early, late, parts, priority, reached)

    def _read_round(
        self,
        early: list[Run],
        late: list[Run],
        parts: Mapping[str, torch.Tensor],
        priority: int,
        reached: Callable[[], None] | None = None,
    ) -> int:
        """Read and finish what fits into memory at once, and return its bytes; `reached` when `early` is there."""
        nbytes = sum(segment.nbytes for run in (*early, *late) for segment in run)
        if self._throttle is not None:
            self._throttle.take(nbytes)
        if self.kind == "direct":
            most = min(MOST_CHUNK_BYTES, max(CHUNK_BYTES, nbytes // CHUNKS))
            begun, then = ([chunk for run in half for chunk in self._chunks(run, most)] for half in (early, late))
            self._crew.run([*(begun if reached is None else counted(begun, reached)), *then], priority)
        else:
            for run in early:
                self._read(run)
            if reached is not None:
                reached()
            for run in late:
                self._read(run)
        for run in (*early, *late):
            for segment in run:
                finish(segment, parts)
        return nbytes

    def close(self) -> None:
        """Wait for reads under way, then close the files. Later reads raise ReadError."""
        with self._lock:
            self._closed = True
            self._reading.discard(threading.get_ident())
            self._idle.wait_for(lambda: not self._reading)
            files, self._files = self._files, {}
        self._crew.close()
        for descriptor in files.values():
            os.close(descriptor)

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self, files: Mapping[Path, FileStamp]) -> None:
        """Open every file, in the way `kind` needs; `kind` may become "advised"."""
        places = direct.one_each(files) if self.kind == "direct" else []
        for file in places:
            refusal = direct.refusal(file)
            if refusal is not None:
                self.kind = "advised"
                self.notice = (
                    f"{file.parent} is on a file system without O_DIRECT ({refusal}); experts are read "
                    "through the page cache, and their pages given back after each read"
                )
                _log.warning("%s", self.notice)
                break
        if self.kind == "direct":
            self._block = direct.block_nbytes(places)
        flags = os.O_RDONLY | (os.O_DIRECT if self.kind == "direct" else 0)
        for file in files:
            try:
                descriptor = os.open(file, flags)
            except OSError as error:
                hint = "Raise `ulimit -n`." if error.errno == errno.EMFILE else "Check the file and its permissions."
                raise ReadError(f"{file} cannot be opened: {error.strerror}. {hint}") from error
            self._files[file] = descriptor
            self._check_unchanged(file, descriptor)
            if self.kind == "advised":
                # Read-ahead would bring in pages that nobody gives back.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def _check_unchanged(self, file: Path, descriptor: int) -> None:
        """Raise ReadError where a file is not what was indexed: bytes of another checkpoint would be wrong tokens."""
        stamp = self._stamps[file]
        try:
            status = os.fstat(descriptor)
        except OSError as error:  # of a file on a server that has lost it, or is gone itself
            raise ReadError(
                f"{file} cannot be looked at any more: {error.strerror or error} (errno {error.errno}). Check the file "
                "and the file system it is on, then load the model again."
            ) from error
        if (status.st_size, status.st_mtime_ns) != (stamp.nbytes, stamp.mtime_ns):
            raise ReadError(
                f"{file} has changed since it was indexed (then {stamp.nbytes:,} bytes, now {status.st_size:,}; "
                f"modified {'earlier' if status.st_mtime_ns < stamp.mtime_ns else 'later'}). Load the model again."
            )

    def _scratch(self, nbytes: int) -> Bytes:
        """This thread's memory for what cannot go straight to its part; valid until the next call."""
        memory: Bytes | None = getattr(self._local, "gather", None)
        if memory is None or memory.size < nbytes:
            memory = self._local.gather = np.empty(nbytes, dtype=np.uint8)
        return memory

    def _staging(self) -> Bytes:
        """This thread's aligned buffer for O_DIRECT."""
        buffer: Bytes | None = getattr(self._local, "staging", None)
        if buffer is None:
            with self._lock:
                # Enough for the four loader threads and those that help them (planner.plan.READ_BUFFER_BYTES).
                self._spare = self._spare or direct.buffers(DIRECT_DEPTH + 3, STAGING_BYTES)
                buffer = self._local.staging = self._spare.pop(0)
        return buffer

    def _descriptor(self, run: Run) -> int:
        descriptor = self._files.get(run[0].file)
        if descriptor is None:
            raise ReadError(
                f"{run[0].file} is not among the files this reader was opened on, so {tensors_of(run)} cannot be "
                "read; load the model again."
            )
        return descriptor

    def _read(self, run: Run) -> None:
        """Read adjoining segments of one file through the page cache."""
        descriptor = self._descriptor(run)
        self._read_buffered(run, descriptor)
        if self.kind == "advised":
            first, last = align_down(run[0].offset), align_up(run[-1].offset + run[-1].nbytes)
            os.posix_fadvise(descriptor, first, last - first, os.POSIX_FADV_DONTNEED)

    def _read_buffered(self, run: Run, descriptor: int) -> None:
        """Fill the run's memory."""
        offset, buffers = run[0].offset, buffers_of(run)
        while buffers:
            got = self._once(run, descriptor, buffers[:_IOV_MAX], offset)
            if got == 0:
                raise ended_early(run, descriptor, offset)
            offset += got
            drop_bytes(buffers, got)

    def _chunks(self, run: Run, most: int) -> Iterator[Callable[[], None]]:
        """The run's O_DIRECT reads, of `most` bytes or a little less; all but the first start at a block."""
        descriptor, buffers = self._descriptor(run), buffers_of(run)
        start, end = run[0].offset, run[-1].offset + run[-1].nbytes
        step = align_up(-(-(end - start) // -(-(end - start) // most)))
        while start < end:
            stop = min(align_down(start) + step, end)
            if end - stop < ALIGNMENT:  # no read of its own for a few bytes
                stop = end
            yield partial(self._read_direct, run, descriptor, start, stop, first_bytes(buffers, stop - start))
            drop_bytes(buffers, stop - start)
            start = stop

    def _read_direct(self, run: Run, descriptor: int, offset: int, end: int, buffers: list[Bytes]) -> None:
        """Fill `buffers` with the file's bytes from `offset` to `end`."""
        while offset < end:
            straight = self._straight(offset, buffers)
            if straight:
                got = self._once(run, descriptor, straight, offset)
                if got == 0:
                    raise ended_early(run, descriptor, offset)
                drop_bytes(buffers, got)
                offset += got
                continue
            staging = self._staging()
            # A short read may end at any block: begun at the last one, it brings at least one byte that is wanted.
            base = offset - offset % self._block
            length = min(align_up(end) - base, staging.size)
            got = self._once(run, descriptor, [staging[:length]], base)
            if base + got <= offset:
                raise ended_early(run, descriptor, offset)
            fresh = staging[offset - base : min(got, end - base)]
            taken = 0
            for part in first_bytes(buffers, fresh.size):
                # Releases the interpreter lock, unlike memoryview.
                np.copyto(part, fresh[taken : taken + part.size])
                taken += part.size
            drop_bytes(buffers, taken)
            offset += taken

    def _straight(self, offset: int, buffers: Sequence[Bytes]) -> list[Bytes]:
        """Those buffers, from the first on, that O_DIRECT can fill itself from `offset` on; the last may be cut."""
        found: list[Bytes] = []
        if offset % self._block:
            return found
        for buffer in buffers:
            size = buffer.size - buffer.size % self._block
            if not size or buffer.ctypes.data % self._block:
                break
            found.append(buffer if size == buffer.size else buffer[:size])
            if size < buffer.size:
                break
        return found

    def _once(self, run: Run, descriptor: int, buffers: Sequence[Bytes], offset: int) -> int:
        """One preadv, again where a signal interrupted it."""
        while True:
            try:
                return self._pread(descriptor, buffers, offset)
            except InterruptedError:
                continue
            except OSError as error:
                nbytes = sum(buffer.size for buffer in buffers)
                raise ReadError(
                    f"{run[0].file}: reading {nbytes:,} bytes at byte {offset:,} ({tensors_of(run)}) failed: "
                    f"{error.strerror or error} (errno {error.errno}). Check the disk, then load the model again."
                ) from error


def staging_nbytes(kind: ReaderKind, pieces: Sequence[Piece]) -> int:
    """Bytes that each reading thread needs beside the slots to read such an expert."""
    return gather_nbytes(pieces) + (STAGING_BYTES if kind == "direct" else 0)
