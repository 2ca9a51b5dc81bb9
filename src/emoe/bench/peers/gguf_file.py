"""Writing a GGUF file for llama.cpp from a hub checkpoint, tensor by tensor, with the `gguf` package (an extra).

The file has no vocabulary ("no_vocab"): it can only be fed token ids. Dense weights keep the checkpoint's dtype also
in a quantised file, so that tokens meet the same routers and take the same routes: only experts are quantised.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emoe.bench.peers.gguf_layout import DTYPES, GgufTensor, layout_of
from emoe.checkpoint.fingerprint import fingerprint
from emoe.checkpoint.headers import read_headers
from emoe.checkpoint.writing import Progress
from emoe.config import format_bytes
from emoe.errors import CheckpointError, UnsupportedModelError, UsageError

PRECISIONS = ("native", "q8_0", "q4_0")
"""native: the checkpoint's own dtype; the others quantise experts."""

_FILE_TYPES = {
    "BF16": "MOSTLY_BF16",
    "F16": "MOSTLY_F16",
    "F32": "ALL_F32",
    "Q8_0": "MOSTLY_Q8_0",
    "Q4_0": "MOSTLY_Q4_0",
}


def gguf_package() -> Any:
    """The `gguf` package. Raises UsageError."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise UsageError(
            'GGUF files are written with gguf, which is not installed: pip install "emoe[peers]"'
        ) from error


@dataclass(frozen=True, slots=True)
class _Planned:
    tensor: GgufTensor
    kind: Any  # gguf.GGMLQuantizationType
    nbytes: int


def cached_gguf(checkpoint: Path, precision: str, cache: Path, progress: Progress | None = None) -> Path:
    """The GGUF of `checkpoint` in `cache`, written if it is not there yet. Named after the checkpoint's fingerprint.

    Raises:
        As `write_gguf`.
    """
    digest = fingerprint(checkpoint)[:12]
    file = cache / f"{checkpoint.resolve().name}-{digest}-{precision}.gguf"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        write_gguf(checkpoint, file, precision, progress)
    return file


def write_gguf(checkpoint: Path, file: Path, precision: str = "native", progress: Progress | None = None) -> Path:
    """Write `checkpoint` as `file` and return it. Memory stays at a few blocks; `file` appears when it is complete.

    Args:
        checkpoint: a folder in hub layout, of a family in `gguf_layout.LAYOUTS`.
        file: where to; overwritten.
        precision: of the experts, one of `PRECISIONS`.
        progress: called with (bytes done, bytes in all).

    Raises:
        UsageError: no such precision, or the `gguf` package is missing.
        UnsupportedModelError: a family or a setting that llama.cpp's loader does not know, rows that do not divide
            into blocks.
        CheckpointError: tensors missing or left over; no room on the disk.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"no GGUF precision is called {precision!r}; use {', '.join(PRECISIONS)}")
    gguf = gguf_package()
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint)
    layout = layout_of(config)
    planned = [_plan(gguf, tensor, precision) for tensor in layout.tensors(read_headers(checkpoint), config)]
    total = sum(one.nbytes for one in planned)
    free = shutil.disk_usage(file.parent).free
    if free < total * 1.02:
        raise CheckpointError(
            f"a GGUF of {checkpoint} takes {format_bytes(total)}, and {file.parent} has {format_bytes(free)} free; "
            "choose another folder with --cache"
        )
    part = file.with_name(f"{file.name}.part{os.getpid()}")
    try:
        writer = gguf.GGUFWriter(part, layout.architecture)
        writer.add_name(checkpoint.name)
        writer.add_tokenizer_model("no_vocab")
        kind = next(one.kind for one in planned if one.tensor.role == "expert")
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind.name]])
        for key, value in layout.settings(config).items():
            _add(writer, f"{layout.architecture}.{key}", value)
        for one in planned:
            # With a byte dtype the writer would take the shape for one in bytes.
            writer.add_tensor_info(one.tensor.name, one.tensor.shape, np.float32, one.nbytes, one.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        out = writer.fout[0]
        done = 0
        for one in planned:
            writer.write_padding(out, out.tell())
            written = sum(out.write(data) for data in _data(gguf, one))
            if written != one.nbytes:
                raise CheckpointError(f"{one.tensor.name}: {written} bytes were made, {one.nbytes} announced")
            writer.write_padding(out, one.nbytes)
            done += written
            if progress is not None:
                progress(done, total)
        out.flush()
        os.fsync(out.fileno())  # dirty pages could not be dropped from the page cache before a measurement
        writer.close()
        part.rename(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return file


def _plan(gguf: Any, tensor: GgufTensor, precision: str) -> _Planned:
    """The dtype of `tensor` in the file, and its bytes there."""
    kinds = gguf.GGMLQuantizationType
    if tensor.role == "exact":
        kind = kinds.F32
    elif tensor.role == "expert" and precision != "native":
        kind = kinds[precision.upper()]
    else:
        kind = kinds[tensor.dtype]
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    if tensor.shape[-1] % block:
        raise UnsupportedModelError(
            f"{tensor.name} has rows of {tensor.shape[-1]}, which do not divide into {kind.name} blocks of {block}"
        )
    elements = 1
    for size in tensor.shape:
        elements *= size
    return _Planned(tensor, kind, elements // block * nbytes)


def _data(gguf: Any, one: _Planned) -> Iterator[bytes | memoryview]:
    """The file's bytes of one tensor, block by block."""
    for block in one.tensor.blocks():
        if one.kind.name in DTYPES:
            yield block.to(DTYPES[one.kind.name]).contiguous().view(torch.uint8).numpy().data
        else:
            yield gguf.quants.quantize(block.float().contiguous().numpy(), one.kind).data


def _add(writer: Any, key: str, value: object) -> None:
    """Metadata of the type that llama.cpp's loader asks for: it reads counts as uint32 and reals as float32."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        raise UnsupportedModelError(f"{key} = {value!r} cannot be written to a GGUF")
