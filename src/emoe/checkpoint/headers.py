"""What a safetensors checkpoint holds, from its headers alone: no weight is read here.

The format: 8 bytes, little endian, the header's length N; N bytes of JSON, for each tensor its dtype, shape
and byte range; then the data, without holes.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from emoe.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The limit of the safetensors library itself. 36,000 tensors need about 5 MB.
MAX_HEADER_BYTES = 100_000_000

REMEDY = "Download the checkpoint again."

# Bits per element, by the format's dtype names.
DTYPE_BITS: dict[str, int] = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8,
    "BOOL": 8, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor at rest: `nbytes` bytes at `offset` of `file` (counted from the file's start)."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_headers(directory: Path) -> dict[str, TensorEntry]:
    """Every tensor of the checkpoint in `directory`, by name, after checking the files against their headers.

    The files are those transformers would load: `model.safetensors`, else the shards that
    `model.safetensors.index.json` names.

    Raises:
        CheckpointError: a file is missing, truncated or malformed, or contradicts the index.
    """
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    with collector_paused():
        if single.is_file():
            return read_file_header(single)
        if index.is_file():
            return _read_shards(index)
    raise CheckpointError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}. {REMEDY}")


@contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection meanwhile.

    Indexing makes hundreds of thousands of objects that stay, and no cycles: the collector would walk them again
    and again, which doubled the time for 36,000 tensors (0.70 s of processor time with it, 0.33 s without).
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read_shards(index: Path) -> dict[str, TensorEntry]:
    """Every tensor of the shards that `index` lists."""
    weight_map = _weight_map(index)
    files = sorted(set(weight_map.values()))
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of the {len(files)} files that {index.name} names: "
            f"{_some(missing)}. Download the missing files."
        )
    entries: dict[str, TensorEntry] = {}
    for name in files:
        for tensor, entry in read_file_header(index.parent / name).items():
            if tensor in entries:
                raise CheckpointError(
                    f"tensor {tensor!r} is in two files, {entries[tensor].file} and {entry.file}. {REMEDY}"
                )
            entries[tensor] = entry
    absent = [name for name in weight_map if name not in entries]
    if absent:
        raise CheckpointError(
            f"{index} places {_some(absent)} in {weight_map[absent[0]]}, whose header does not list it "
            f"({len(absent)} such tensors). {REMEDY}"
        )
    return entries


def _weight_map(index: Path) -> dict[str, str]:
    """The index file's mapping from tensor name to file name, checked."""
    try:
        loaded = json.loads(index.read_bytes())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{index} cannot be read as JSON: {error}. {REMEDY}") from error
    weight_map = loaded.get("weight_map") if isinstance(loaded, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no 'weight_map' of tensors to files. {REMEDY}")
    for name in set(weight_map.values()):
        # A path that leaves the directory would let a downloaded index point reads at any file.
        inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        if not inside or not name.endswith(".safetensors"):
            tensor = next(tensor for tensor, file in weight_map.items() if file == name)
            raise CheckpointError(
                f"{index} places tensor {tensor!r} in {name!r}, which is not a safetensors file inside the "
                f"checkpoint's directory. {REMEDY}"
            )
    return weight_map


def read_file_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, by name.

    Raises:
        CheckpointError: the file is shorter than its header says, or the header is malformed.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) == 8 and length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{file} claims a header of {length:,} bytes, more than the {MAX_HEADER_BYTES:,} the "
                    f"format allows: it is not a safetensors file, or damaged. {REMEDY}"
                )
            if len(prefix) < 8 or length > size - 8:
                raise CheckpointError(
                    f"{file} is truncated: it has {size:,} bytes, and its header alone needs "
                    f"{length + 8 if len(prefix) == 8 else 8:,}. {REMEDY}"
                )
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Check the file and its permissions.") from error
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise CheckpointError(f"the header of {file} is not JSON: {error}. {REMEDY}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {file} is not a JSON object. {REMEDY}")
    header.pop("__metadata__", None)
    start = 8 + length
    entries = {name: _entry(file, name, info, start) for name, info in header.items()}
    _check_layout(file, entries.values(), start, size)
    return entries


def _entry(file: Path, name: str, info: object, start: int) -> TensorEntry:
    """One header entry, checked against its own numbers."""
    try:
        dtype, shape, (begin, end) = _fields(info)
        bits = DTYPE_BITS[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the header of {file} describes tensor {name!r} as {info!r}, which is not a dtype, a shape and "
            f"a byte range emoe knows ({type(error).__name__}: {error}). {REMEDY}"
        ) from error
    nbytes = end - begin
    if nbytes * 8 != prod(shape) * bits:
        raise CheckpointError(
            f"the header of {file} gives tensor {name!r} {nbytes:,} bytes, but {dtype} {list(shape)} needs "
            f"{prod(shape) * bits // 8:,}. {REMEDY}"
        )
    return TensorEntry(file, name, dtype, shape, start + begin, nbytes)


def _fields(info: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """dtype, shape and range of a header entry. Raises KeyError, TypeError or ValueError without them."""
    shape = tuple(info["shape"])
    begin, end = info["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError("a size or an offset is not a whole number")
    return info["dtype"], shape, (begin, end)


def _check_layout(file: Path, entries: Iterable[TensorEntry], start: int, size: int) -> None:
    """Check that the tensors follow each other without hole or overlap and end where the file ends."""
    at, previous = start, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != at:
            what = "overlaps" if entry.offset < at else f"leaves {entry.offset - at:,} bytes unused after"
            raise CheckpointError(
                f"{file}: tensor {entry.name!r} begins at byte {entry.offset:,} and {what} {previous}, which "
                f"ends at {at:,}. {REMEDY}"
            )
        at, previous = entry.offset + entry.nbytes, f"tensor {entry.name!r}"
        if at > size:
            raise CheckpointError(
                f"{file} is truncated: tensor {entry.name!r} ends at byte {at:,}, and the file has {size:,}. {REMEDY}"
            )
    if at != size:
        raise CheckpointError(f"{file} has {size:,} bytes, {size - at:,} more than its header accounts for. {REMEDY}")


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What tells that a file is still the one that was indexed."""

    nbytes: int
    mtime_ns: int


def stamp_files(entries: Mapping[str, TensorEntry]) -> dict[Path, FileStamp]:
    """The present size and modification time of every file the entries lie in.

    Raises:
        CheckpointError: a file has gone.
    """
    stamps: dict[Path, FileStamp] = {}
    for file in sorted({entry.file for entry in entries.values()}):
        try:
            stat = file.stat()
        except OSError as error:
            raise CheckpointError(f"{file} has gone since its header was read: {error}. {REMEDY}") from error
        stamps[file] = FileStamp(stat.st_size, stat.st_mtime_ns)
    return stamps


def _some(names: list[str], limit: int = 3) -> str:
    """The first few of `names`, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
