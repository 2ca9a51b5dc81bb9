"""The files that engines read: made before anything is measured, outside the limits and the clock, and kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from emoe.bench.peers.build import llama_python
from emoe.bench.peers.entries import LLAMA_PRECISIONS, PeersSettings
from emoe.bench.peers.gguf_file import cached_gguf
from emoe.bench.peers.routes import Agreement, planted_routes
from emoe.bench.plant.card import is_planted
from emoe.checkpoint.codecs.formats import NATIVE
from emoe.checkpoint.writing import Progress
from emoe.config import format_bytes
from emoe.errors import UnsupportedModelError, UsageError
from emoe.model import quantise

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Files:
    """By expert dtype: emoe's `quantised` experts (none for native ones), llama.cpp's `ggufs` (or why there is none),
    and where it was asked how far its `routes` are the planted ones. `llama` is the Python that has llama.cpp."""

    checkpoint: tuple[Path, ...]
    llama: Path | None
    quantised: dict[str, Path]
    ggufs: dict[str, Path | str]
    routes: dict[str, Agreement]


def prepared(settings: PeersSettings, say: Say) -> Files:
    """Make what is not there yet. Takes minutes for a large checkpoint, and its size again on the disk.

    Raises:
        UsageError: routes are to be checked without llama.cpp or a planted checkpoint.
        CheckpointError: the checkpoint is damaged, or the disk full.
    """
    quantised = {}
    if "emoe" in settings.peers:
        for dtype in settings.expert_dtypes:
            if dtype != NATIVE:
                quantised[dtype] = quantise(settings.folder, expert_dtype=dtype, progress=_progress(dtype, say))
    llama = llama_python(settings.cache) if "llama.cpp" in settings.peers else None
    ggufs = {dtype: _gguf(settings, dtype, say) if llama else "GGUF" for dtype in settings.expert_dtypes}
    return Files(
        checkpoint=tuple(sorted(settings.folder.glob("*.safetensors"))),
        llama=llama,
        quantised=quantised,
        ggufs=ggufs,
        routes=_routes(settings, llama, ggufs, say) if settings.check_routes else {},
    )


def _gguf(settings: PeersSettings, dtype: str, say: Say) -> Path | str:
    precision = LLAMA_PRECISIONS[dtype]
    try:
        return cached_gguf(settings.folder, precision, settings.cache, _progress(f"{precision} GGUF", say))
    except (UsageError, UnsupportedModelError) as error:
        return f"no GGUF: {error}"


def _progress(what: str, say: Say) -> Progress:
    """Says each tenth of `what`."""
    shown = -1

    def show(done: int, total: int) -> None:
        nonlocal shown
        if done * 10 // total > shown:
            shown = done * 10 // total
            say(f"writing {what}: {done / total:.0%} of {format_bytes(total)}")

    return show


def _routes(
    settings: PeersSettings, llama: Path | None, ggufs: dict[str, Path | str], say: Say
) -> dict[str, Agreement]:
    """By expert dtype: whether llama.cpp routes as planted."""
    if llama is None or not is_planted(settings.folder):
        raise UsageError("--check-routes compares llama.cpp's routes with planted ones: it needs both")
    found = {}
    for dtype, gguf in ggufs.items():
        if isinstance(gguf, Path):
            found[dtype] = planted_routes(settings.folder, gguf, llama)
            say(f"{dtype}: {found[dtype].text}")
    return found
