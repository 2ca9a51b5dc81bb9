"""Where quantised experts are kept, and the card that says whose they are.

A cache is a folder of ordinary safetensors files, one a layer, with their index and a card. It lies beside the model
(`MODEL/.emoe/experts-int4-<fingerprint>`), or in the user's cache directory where that folder cannot be written.
"""

from __future__ import annotations

import errno
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import emoe
from emoe.config import user_cache
from emoe.errors import CheckpointError, UsageError

FORMAT = 1
"""Of the card and the files. Raised when older versions could not read what is written."""

CARD = "emoe_experts.json"
BESIDE = ".emoe"


@dataclass(frozen=True, slots=True)
class Card:
    """What a cache holds. `fingerprint` is the checkpoint's (`emoe.checkpoint.fingerprint`), `nbytes` the tensors'."""

    codec: str
    fingerprint: str
    experts: int
    nbytes: int
    emoe: str = emoe.__version__
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write it to `folder`."""
        (folder / CARD).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Card:
        """The card of a cache.

        Raises:
            CheckpointError: there is none, it is damaged, or another version of the format.
        """
        try:
            values = json.loads((folder / CARD).read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise CheckpointError(
                    f"{folder} holds quantised experts in format {values['format']}, and this version of emoe reads "
                    f"format {FORMAT}. {remedy(folder)}"
                )
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder / CARD} is missing or damaged ({type(error).__name__}: {error}). {remedy(folder)}"
            ) from error

    def check(self, folder: Path, codec: str, fingerprint: str, model: Path) -> None:
        """Refuse a cache of another codec or another checkpoint. Raises CheckpointError."""
        if self.codec != codec:
            raise CheckpointError(f"{folder} holds {self.codec} experts, not {codec}. {remedy(folder)}")
        if self.fingerprint != fingerprint:
            raise CheckpointError(
                f"{folder} holds the experts of another checkpoint: its fingerprint is {self.fingerprint[:16]}, that "
                f"of {model} is {fingerprint[:16]}. {remedy(folder)}"
            )


def remedy(folder: Path) -> str:
    """What to do about a cache that cannot be used."""
    return f"Remove {folder}, and it is made again; or give another folder as expert cache."


def cache_name(codec: str, fingerprint: str) -> str:
    """The name of a cache's folder."""
    return f"experts-{codec}-{fingerprint[:16]}"


def places(model: Path, given: Path | None, beside: bool) -> list[Path]:
    """The folders that a cache of the checkpoint in `model` may lie in, best first.

    `given` is the user's choice, the only one then; `beside` allows the model's own folder.
    """
    if given is not None:
        return [given]
    return [*([model / BESIDE] if beside else []), user_cache()]


def find_cache(places: list[Path], name: str) -> Path | None:
    """The cache of that name, where there is one."""
    return next((place / name for place in places if (place / name).is_dir()), None)


def writable_place(places: list[Path]) -> tuple[Path, str]:
    """The first of `places` that can be written, made if need be, and a line on those before it.

    Raises:
        UsageError: none can.
    """
    refusals: list[str] = []
    for place in places:
        refusal = _refusal(place)
        if refusal is None:
            return place, "; ".join(refusals)
        refusals.append(f"{place} cannot be written ({refusal})")
    raise UsageError(f"quantised experts cannot be kept: {'; '.join(refusals)}. Give a folder as expert cache.")


def _refusal(place: Path) -> str | None:
    """Why nothing can be written in `place`; None where it can."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place, prefix=".probe-"):  # of its own name: others may look at once
            pass
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
            return error.strerror
        raise CheckpointError(
            f"{place} cannot be used to keep quantised experts: {error}. Give another folder as expert cache."
        ) from error
    return None
