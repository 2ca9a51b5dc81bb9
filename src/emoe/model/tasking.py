"""Which task each sequence of a pass belongs to, and what a profile knows of that task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from emoe.checkpoint.fingerprint import fingerprint
from emoe.model.collecting import tokens_of
from emoe.model.passes import Pass
from emoe.model.runtime import Runtime
from emoe.tasks.keywords import OTHER
from emoe.tasks.profile import Profile

Array = npt.NDArray[Any]
Decode = Callable[[list[int]], str]
"""Token ids of one prompt -> its text."""


def profile_for(given: str | Path | Profile | None, path: Path) -> Profile | None:
    """The profile of the checkpoint in `path`, read where it is a folder; refused if it is of another model."""
    if given is None:
        return None
    if isinstance(given, Profile):
        given.check(fingerprint(path), str(path))
        return given
    return Profile.read(given, fingerprint(path), str(path))


def nano_profile() -> Path | None:
    """The embedded model's profile, where it is installed."""
    from emoe import nano

    return nano.profile_path() if nano.profile_path().is_dir() else None


class TaskReader:
    """Reads the tasks of a new prompt once; None where neither a label nor a keyword tells."""

    def __init__(self, runtime: Runtime, profile: Profile | None, decode: Decode | None) -> None:
        """`decode` is the tokenizer's; without one, or without a profile, only labels count."""
        self._runtime = runtime
        self._profile = profile
        self._decode = decode

    def __call__(self, now: Pass) -> list[str | None]:
        """The task of each sequence of the batch."""
        label = self._runtime.task
        if label is not None or self._profile is None or self._decode is None or now.input_ids is None:
            return [label] * now.batch
        found = (self._profile.task_of(self._decode(tokens_of(now, row) or [])) for row in range(len(now.segments)))
        return [None if task == OTHER else task for task in found]


class KnownHabits:
    """Expected lengths and sensitivity of a profile's tasks; nothing is known without a profile."""

    def __init__(self, profile: Profile | None, threshold: float | None) -> None:
        """`threshold`: a layer whose random prefix keeps the accuracy at that or above is insensitive (section 2.4).

        None: the profile's own.
        """
        self._profile = profile
        self._threshold = threshold

    def output_tokens(self, task: str | None) -> float | None:
        """Mean answer of that task, else of all prompts, None where nothing is known."""
        lengths = None if self._profile is None else self._profile.lengths_of(task)
        return None if lengths is None else lengths.mean

    def sensitive(self, task: str | None) -> Array | None:
        """bool [layers], None without a profile: every layer is sensitive then."""
        return None if self._profile is None else self._profile.sensitivity.sensitive(task, self._threshold)

    def shares(self, task: str | None) -> Array | None:
        """float64 [layers, experts]: the popularity of that task, else of all prompts; None without a profile."""
        return None if self._profile is None else self._profile.popularity_of(task)

    def all_sensitive(self) -> bool:
        """Whether no layer of any task is insensitive: then nothing is ever rerouted in mode `balanced`."""
        if self._profile is None:
            return True
        return all(bool(np.all(self.sensitive(task))) for task in self._profile.sensitivity.tasks)
