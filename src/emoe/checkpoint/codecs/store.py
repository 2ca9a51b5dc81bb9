"""Experts stored with a codec: found in a cache or quantised into one, and indexed there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from emoe.checkpoint.codecs.building import Progress, build_cache, tensor_name
from emoe.checkpoint.codecs.cache import Card, cache_name, find_cache, places, remedy, writable_place
from emoe.checkpoint.codecs.formats import ExpertCodec, coded_parts
from emoe.checkpoint.fingerprint import fingerprint
from emoe.checkpoint.headers import REMEDY, TensorEntry, read_headers, stamp_files
from emoe.checkpoint.index import ExpertIndex, LayerIndex, build_index
from emoe.checkpoint.parts import PartSpec
from emoe.checkpoint.skeleton import SLOT_DTYPES
from emoe.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)


def coded_cache(
    index: ExpertIndex,
    model: PreTrainedModel,
    codec: ExpertCodec,
    *,
    cache: Path | None = None,
    beside: bool = True,
    progress: Progress | None = None,
) -> Path:
    """The folder that holds the experts of `index` under `codec`; quantises them first where there is none.

    Args:
        index: the checkpoint's experts.
        model: its skeleton.
        codec: how they are stored.
        cache: the folder that caches are kept in; None: beside the model, else the user's cache directory.
        beside: whether the model's own folder may be written to.
        progress: hears of bytes while they are quantised.

    Raises:
        UsageError: no folder can be written.
        CheckpointError: the disk is full, or a weight cannot be quantised.
        UnsupportedModelError: a size that the codec cannot take.
        ReadError: the checkpoint cannot be read.
    """
    for layer in index.layers:
        coded_parts(codec, layer.parts, layer.transposed)  # refuses what it cannot take, before long work
    mark = fingerprint(index.path)
    where, name = places(index.path, cache, beside), cache_name(codec.name, mark)
    found = find_cache(where, name)
    if found is not None:
        return found
    place, refusals = writable_place(where)
    if refusals:
        _log.warning("%s: %s experts are kept in %s", refusals, codec.name, place)
    build_cache(place / name, _as_stored(index, model), codec, mark, progress)
    return place / name


def _as_stored(index: ExpertIndex, model: PreTrainedModel) -> ExpertIndex:
    """The index with experts in the dtype they are stored in: float32 where they are stored in several."""
    stored = {SLOT_DTYPES[dtype] for layer in index.layers for dtype in layer.stored_dtypes().values()}
    dtype = stored.pop() if len(stored) == 1 else torch.float32
    if all(part.dtype == str(dtype).removeprefix("torch.") for layer in index.layers for part in layer.parts):
        return index
    return build_index(index.path, model, dtype)


def open_cache(folder: Path, index: ExpertIndex, codec: ExpertCodec) -> ExpertIndex:
    """The experts of `index` as `folder` holds them.

    Raises:
        CheckpointError: the cache is damaged, or of another checkpoint, codec or version.
    """
    Card.read(folder).check(folder, codec.name, fingerprint(index.path), index.path)
    try:
        entries = read_headers(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"the {codec.name} experts kept for {index.path} are damaged: {str(error).removesuffix(REMEDY)}"
            f"{remedy(folder)}"
        ) from error
    layers = [_stored_layer(folder, layer, codec, entries) for layer in index.layers]
    return index.stored_in(codec.name, layers, stamp_files(entries))


def _stored_layer(folder: Path, layer: LayerIndex, codec: ExpertCodec, entries: dict[str, TensorEntry]) -> LayerIndex:
    parts = coded_parts(codec, layer.parts, layer.transposed)
    found: dict[str, list[TensorEntry]] = {part.name: [] for part in parts}
    for expert in range(layer.num_experts):
        for part in parts:
            name = tensor_name(layer, expert, part.name)
            entry = entries.get(name)
            if entry is None or not _fits(entry, part, part in layer.parts):
                held = "nothing" if entry is None else f"{entry.dtype} {list(entry.shape)}"
                raise CheckpointError(
                    f"{folder} holds {held} as {name!r}, and the model wants {part.dtype} {list(part.shape)}. "
                    f"{remedy(folder)}"
                )
            found[part.name].append(entry)
    return layer.stored_in(parts, found)


def _fits(entry: TensorEntry, part: PartSpec, uncoded: bool) -> bool:
    """Whether a tensor can be the part: of its shape and, where the codec made it, its dtype."""
    dtype = SLOT_DTYPES.get(entry.dtype)
    if dtype is None or entry.shape != part.shape:
        return False
    return dtype.is_floating_point if uncoded else str(dtype).removeprefix("torch.") == part.dtype
