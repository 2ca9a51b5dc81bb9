"""Making a cache of quantised experts: part by part, so that memory holds one part of one expert at a time.

The files grow in `NAME.partial`, which takes the cache's name when everything is on disk: half a cache never counts.
A layer's file that is complete stays when the work is stopped, and the next run goes on after it. Whoever works holds a
lock in that folder, which the system lets go when the process ends in any way; others wait for it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from emoe.checkpoint.codecs.cache import Card
from emoe.checkpoint.codecs.formats import ExpertCodec, coded_parts
from emoe.checkpoint.headers import INDEX_FILE
from emoe.checkpoint.index import ExpertIndex, LayerIndex
from emoe.checkpoint.memory_room import choose_reader
from emoe.checkpoint.parts import PartSpec
from emoe.checkpoint.readers import Reader
from emoe.checkpoint.writing import TensorToWrite, write_file
from emoe.config import format_bytes
from emoe.errors import CheckpointError

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all)."""

_HEADER_BYTES = 256
"""A tensor's share of its file's header and of the index, at most."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_JOB = "job.json"
_LOCK = ".lock"


def coded_nbytes(index: ExpertIndex, codec: ExpertCodec) -> int:
    """Bytes of all experts under `codec`."""
    return sum(
        layer.num_experts * sum(part.nbytes for part in coded_parts(codec, layer.parts, layer.transposed))
        for layer in index.layers
    )


def tensor_name(layer: LayerIndex, expert: int, part: str) -> str:
    """What a cache calls one part of one expert."""
    return f"{layer.module}.{expert}.{part}"


def build_cache(
    folder: Path, index: ExpertIndex, codec: ExpertCodec, fingerprint: str, progress: Progress | None = None
) -> None:
    """Make the cache `folder` of the experts of `index`, unless another process makes it meanwhile.

    `index` has the experts in the dtype that they are stored in, so that nothing is rounded twice.

    Raises:
        CheckpointError: the disk has not that much room, or a weight cannot be quantised.
        ReadError: the checkpoint cannot be read.
    """
    with _work_folder(folder) as work:
        if work is None:
            return
        card = Card(codec.name, fingerprint, len(index.keys()), coded_nbytes(index, codec))
        try:
            _resume(work, card)
            _check_room(work, index, codec, card)
            kind, _ = choose_reader(index, 0)
            with Reader(kind, index.files) as reader, _one_thread():
                weight_map = _write_layers(work, _Encoder(index, codec, reader), progress)
            listed = {"metadata": {"total_size": card.nbytes}, "weight_map": weight_map}
            (work / INDEX_FILE).write_text(json.dumps(listed, indent=0) + "\n", encoding="utf-8")
            (work / _JOB).unlink()
            card.write(work)
            os.rename(work, folder)
            (folder / _LOCK).unlink()
        except OSError as error:
            hint = "Make room, or give another folder as expert cache." if error.errno in _FULL else "Check the disk."
            raise CheckpointError(
                f"{codec.name} experts cannot be written to {work}: {error.strerror or error}. {hint} What is done is "
                "kept, and the next run goes on from there."
            ) from error


def _write_layers(work: Path, encoder: _Encoder, progress: Progress | None) -> dict[str, str]:
    """Write the files that are not there yet; return the file of every tensor."""
    weight_map: dict[str, str] = {}
    total = coded_nbytes(encoder.index, encoder.codec)
    done = 0
    for layer in encoder.index.layers:
        name = f"experts-{layer.layer:05d}.safetensors"
        tensors = encoder.tensors(layer)
        weight_map.update(dict.fromkeys((tensor.name for tensor in tensors), name))
        file, growing = work / name, work / f"{name}.growing"
        if not file.is_file():
            try:
                write_file(tensors, growing, done, total, progress)
                os.rename(growing, file)
            finally:
                growing.unlink(missing_ok=True)
        done += sum(tensor.nbytes for tensor in tensors)
        if progress is not None:
            progress(done, total)
    return weight_map


@dataclass(slots=True)
class _Encoder:
    """Reads experts part by part and encodes them; holds the part that was asked for last."""

    index: ExpertIndex
    codec: ExpertCodec
    reader: Reader
    _last: tuple[int, int, str] | None = None
    _made: tuple[torch.Tensor, ...] = ()
    _buffers: dict[PartSpec, torch.Tensor] = field(default_factory=dict)

    def tensors(self, layer: LayerIndex) -> list[TensorToWrite]:
        """A layer's tensors: expert by expert, so that one expert is one range of the file."""
        made = []
        for expert in range(layer.num_experts):
            for part in layer.parts:
                for number, spec in enumerate(coded_parts(self.codec, (part,), layer.transposed)):
                    name = tensor_name(layer, expert, spec.name)
                    blocks = partial(self._blocks, layer, expert, part, number)
                    made.append(TensorToWrite(name, spec.shape, getattr(torch, spec.dtype), blocks))
        return made

    def _blocks(self, layer: LayerIndex, expert: int, part: PartSpec, number: int) -> list[torch.Tensor]:
        key = (layer.layer, expert, part.name)
        if self._last != key:
            self._made, self._last = self._encode(layer, expert, part), key
        return [self._made[number]]

    def _encode(self, layer: LayerIndex, expert: int, part: PartSpec) -> tuple[torch.Tensor, ...]:
        if part not in self._buffers:
            self._buffers = {part: torch.empty(part.shape, dtype=getattr(torch, part.dtype))}
        values = self._buffers[part]
        pieces = [piece for piece in layer.pieces(expert) if piece.part == part.name]
        self.reader.read_into(pieces, {part.name: values})
        if values.ndim == 1:
            return (values,)
        # Turned round in one go: read across its rows, a part of 2880 x 5760 takes 0.31 s as int4, and 0.17 so.
        rows = values.t().contiguous() if layer.transposed else values
        try:
            return self.codec.encode(rows)
        except CheckpointError as error:
            raise CheckpointError(
                f"{self.index.path}: {part.name!r} of expert {expert} in layer {layer.layer} cannot be stored as "
                f"{self.codec.name}: {error}. Use native experts."
            ) from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch work on the calling thread alone.

    Encoding is dozens of short passes over blocks that lie in the cache, and torch shares some (abs, round) among its
    threads from 2,048 numbers on. Where another process holds one of two cores, each pass waits for a thread that is
    not running: 0.1 MiB of int4 a second, where one thread makes 4.4 (docs/log.md).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _work_folder(folder: Path) -> Iterator[Path | None]:
    """The folder to work in, for this process alone; None once `folder` is there because another has made it."""
    work = folder.with_name(f"{folder.name}.partial")
    told = False
    while not folder.is_dir():
        work.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(work / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # it has just been renamed: it is complete
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    _log.warning("another process is quantising these experts into %s: waiting for it", folder)
                told = True
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_file(lock, work / _LOCK):
                continue
            if folder.is_dir():  # made between the look and the lock
                shutil.rmtree(work)
                break
            yield work
            return
        finally:
            os.close(lock)
    yield None


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether the opened file is still the one at `path`."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return False
    opened = os.fstat(descriptor)
    return (found.st_dev, found.st_ino) == (opened.st_dev, opened.st_ino)


def _resume(work: Path, card: Card) -> None:
    """Drop what an earlier run left of another job, and note this one."""
    job = {"codec": card.codec, "fingerprint": card.fingerprint, "format": card.format}
    try:
        same = json.loads((work / _JOB).read_text(encoding="utf-8")) == job
    except (OSError, ValueError):
        same = False
    for file in work.iterdir():
        if file.name != _LOCK and not (same and file.suffix in (".safetensors", ".json")):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    if not same:
        (work / _JOB).write_text(json.dumps(job) + "\n", encoding="utf-8")


def _check_room(work: Path, index: ExpertIndex, codec: ExpertCodec, card: Card) -> None:
    """Raise CheckpointError where the disk cannot take what is still to be written."""
    parts = sum(layer.num_experts * len(coded_parts(codec, layer.parts, layer.transposed)) for layer in index.layers)
    there = sum(file.stat().st_size for file in work.glob("*.safetensors"))
    wanted = card.nbytes + parts * _HEADER_BYTES - there
    free = shutil.disk_usage(work).free
    if free < wanted:
        raise CheckpointError(
            f"{codec.name} experts of {index.path} take {format_bytes(card.nbytes)}, and {work.parent} has "
            f"{format_bytes(free)} free. Make room, or give another folder as expert cache."
        )
