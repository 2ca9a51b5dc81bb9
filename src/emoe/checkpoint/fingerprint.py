"""What tells one checkpoint from another: a hash of its tensors' names, dtypes, shapes and some of their bytes.

It depends neither on where the files lie nor on how the tensors are spread over them. Reading is bounded: tensors of
one kind (names alike but for their numbers: `layers.*.mlp.gate.weight`) are sampled together, evenly over the kind, at
most `READS` reads of `READ_BYTES` in all, so every kind of tensor is looked at, also the small ones such as routers.

Another training of the same architecture changes nearly every weight, and one differing byte in a sample is enough.
What it can miss: a change of single weights that no sample covers, e.g. one expert of one layer edited by hand.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from emoe.checkpoint.headers import TensorEntry, read_headers
from emoe.errors import CheckpointError

READS = 512
READ_BYTES = 4096  # a page: less costs a disk the same
_NUMBER = re.compile(r"\d+")


def layout_fingerprint(entries: Mapping[str, TensorEntry]) -> str:
    """A hash of names, dtypes and shapes alone: the same for every training of one architecture."""
    return _layout(entries).hexdigest()


def _layout(entries: Mapping[str, TensorEntry]) -> hashlib._Hash:
    digest = hashlib.sha256()
    for name in sorted(entries):
        entry = entries[name]
        digest.update(f"{name}\0{entry.dtype}\0{entry.shape}\n".encode())
    return digest


def fingerprint(directory: Path, entries: Mapping[str, TensorEntry] | None = None) -> str:
    """The fingerprint of the checkpoint in `directory`: 64 hexadecimal digits.

    `entries` are its headers, where they have been read already.

    Raises:
        CheckpointError: a file is missing, truncated or malformed, or cannot be read.
    """
    entries = read_headers(directory) if entries is None else entries
    digest = _layout(entries)
    opened: dict[Path, int] = {}
    try:
        for entry, offset, nbytes in samples(entries):
            if entry.file not in opened:
                opened[entry.file] = os.open(entry.file, os.O_RDONLY)
            data = os.pread(opened[entry.file], nbytes, entry.offset + offset)
            if len(data) != nbytes:
                raise CheckpointError(f"{entry.file} ends inside tensor {entry.name!r}. Download the checkpoint again.")
            digest.update(data)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error}. Check the files and their permissions.") from error
    finally:
        for descriptor in opened.values():
            os.close(descriptor)
    return digest.hexdigest()


def samples(entries: Mapping[str, TensorEntry]) -> Iterator[tuple[TensorEntry, int, int]]:
    """(tensor, offset in it, bytes): what `fingerprint` reads, in order."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(entries):
        if entries[name].nbytes:
            kinds.setdefault(_NUMBER.sub("*", name), []).append(name)
    each = max(1, READS // max(1, len(kinds)))
    for kind, names in sorted(kinds.items())[:READS]:
        count = min(each, len(names))
        for i in range(count):
            # The middle of each of `count` equal stretches of the kind; the place inside a tensor varies with its name.
            entry = entries[names[(2 * i + 1) * len(names) // (2 * count)]]
            nbytes = min(READ_BYTES, entry.nbytes)
            room = entry.nbytes - nbytes
            at = int.from_bytes(hashlib.sha256(f"{kind}{entry.name}".encode()).digest()[:8], "little")
            yield entry, at % (room + 1), nbytes
