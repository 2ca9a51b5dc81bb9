"""Experts of int8 and int4: made once by `quantise`, or by `load` when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from emoe.checkpoint.codecs.formats import EXPERT_DTYPES, NATIVE, ExpertCodec, codec_of
from emoe.checkpoint.codecs.store import coded_cache, open_cache
from emoe.checkpoint.index import ExpertIndex, build_index
from emoe.checkpoint.skeleton import skeleton
from emoe.checkpoint.source import resolve
from emoe.errors import UsageError

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

HUB_SETTINGS = ("revision", "token", "local_files_only")
"""What chooses a hub model's files; of `emoe.load`'s keywords for transformers."""


def quantise(
    model_id: str | Path | None = None,
    *,
    expert_dtype: str,
    expert_cache: str | Path | None = None,
    progress: bool | Progress = False,
    **kwargs: Any,
) -> Path:
    """Quantise a checkpoint's experts, unless that has been done, so that `emoe.load` finds them.

    Memory holds one part of one expert at a time. Interrupted, a second call goes on where the first stopped.

    Args:
        model_id: a checkpoint's folder or a hub id; None is the embedded emoe-nano.
        expert_dtype: "int8" or "int4".
        expert_cache: the folder that keeps them; None: `.emoe` in the checkpoint's folder, or the user's cache
            directory where that cannot be written. Give `emoe.load` the same.
        progress: True for a progress bar, or a function called with (bytes done, bytes in all).
        **kwargs: revision, token, local_files_only and trust_remote_code, as for `emoe.load`.

    Returns:
        The folder that holds the quantised experts.

    Raises:
        UsageError: an argument that cannot be meant, or no folder that can be written.
        CheckpointError: files missing, truncated or inconsistent, or no room for the quantised experts.
        UnsupportedModelError: a dense model, an unknown layout, or sizes that the codec cannot take.
        ReadError: the checkpoint could not be read.
    """
    codec = codec_of(expert_dtype)
    if codec is None:
        raise UsageError(f"{NATIVE} experts are the checkpoint's own: quantise to {' or '.join(EXPERT_DTYPES[1:])}.")
    hub = {name: kwargs.pop(name) for name in HUB_SETTINGS if name in kwargs}
    path = resolve(embedded() if model_id is None else model_id, **hub)
    _, empty = skeleton(path, **kwargs)
    index = build_index(path, empty)
    return _cache(index, empty, codec, expert_cache, progress)


def stored_experts(
    index: ExpertIndex,
    model: PreTrainedModel,
    codec: ExpertCodec | None,
    expert_cache: str | Path | None,
    progress: bool | Progress,
) -> ExpertIndex:
    """The experts of `index` as `codec` stores them (None: as they are), quantised now where they have not been."""
    if codec is None:
        return index
    return open_cache(_cache(index, model, codec, expert_cache, progress), index, codec)


def _cache(
    index: ExpertIndex,
    model: PreTrainedModel,
    codec: ExpertCodec,
    expert_cache: str | Path | None,
    progress: bool | Progress,
) -> Path:
    return coded_cache(
        index,
        model,
        codec,
        cache=None if expert_cache is None else Path(expert_cache).expanduser(),
        beside=index.path != embedded(),  # a package's own folder is no place for caches
        progress=progress if callable(progress) else _Bar() if progress else None,
    )


class _Bar:
    """A progress bar that appears with the first bytes: mostly there is nothing to do."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        """Show the state."""
        if self._bar is None:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="Quantising experts")
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.close()


def embedded() -> Path:
    """The folder of emoe-nano."""
    from emoe import nano

    return nano.path()
