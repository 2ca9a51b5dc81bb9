"""The profile of a model: what was measured offline, in one directory (format: docs/profile.md).

profile.json                 everything people may want to read or edit
popularity.safetensors       for each task, float32 [layers, experts]
predictors/NAME.safetensors  what each predictor learned

profile = Profile.read("emoe-nano-profile", fingerprint(folder))
profile.keywords.task_of("Summarise this text.")
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from emoe.checkpoint.whole import write_whole
from emoe.errors import EmoeError, UsageError
from emoe.prediction.protocol import Array, RoutingShape
from emoe.tasks.keywords import OTHER, Keywords
from emoe.tasks.lengths import Lengths
from emoe.tasks.sensitivity import Sensitivity

FORMAT = "emoe-profile"
VERSION = 1
FILE = "profile.json"
POPULARITY = "popularity.safetensors"
PREDICTORS = "predictors"
PREDICTOR_NAME = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")

State = Mapping[str, Array]
_BROKEN = (KeyError, TypeError, ValueError, AttributeError)


class ProfileError(EmoeError):
    """A profile is missing, damaged, contradicts itself, or is of a version this emoe does not read."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class Timings:
    """What the profiled machine took; None where it was not measured.

    load_bytes_per_s: experts into slots, with as many loads under way as the engine has; expert_load_s: one expert
    alone, waited for; token_s: one decode step of one sequence, waiting for experts not counted, in the fastest tenth
    of the answers; prefill_token_s: the same for each token of a prompt; reader, device: how experts were read,
    and to where.
    """

    load_bytes_per_s: float | None = None
    expert_load_s: float | None = None
    token_s: float | None = None
    prefill_token_s: float | None = None
    reader: str = ""
    device: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}


class PredictorStates(Mapping[str, State]):
    """What each predictor learned, by name; read from its file, and checked, when it is asked for."""

    def __init__(self, states: Mapping[str, State | Callable[[], State]] | None = None) -> None:
        self._states = dict(states or {})

    def __getitem__(self, name: str) -> State:
        state = self._states[name]
        if callable(state):
            state = self._states[name] = state()
        return state

    def __iter__(self) -> Iterator[str]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)


@dataclass(frozen=True, eq=False)
class Profile:
    """A model's profile in memory.

    fingerprint: of the checkpoint (emoe.checkpoint.fingerprint); shape: how it routes; tasks: the labels it was made
    with, without `OTHER`. lengths and popularity (float64 [layers, experts], rows sum to k) hold, beside each task,
    `OTHER`: all prompts together, for prompts of no known task. tokens: routed tokens behind each popularity.
    predictors: name -> arrays for `Trainable.restore`. source: model, prompts, options, versions.

    Raises:
        UsageError: a part does not fit the shape or the tasks.
    """

    fingerprint: str
    shape: RoutingShape
    tasks: tuple[str, ...]
    keywords: Keywords
    lengths: Mapping[str, Lengths]
    sensitivity: Sensitivity
    popularity: Mapping[str, Array]
    predictors: PredictorStates = field(default_factory=PredictorStates)
    timings: Timings = field(default_factory=Timings)
    tokens: Mapping[str, int] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        size = (self.shape.layers, self.shape.experts)
        for task, shares in self.popularity.items():
            if shares.shape != size:
                raise UsageError(f"the popularity of task {task!r} is {list(shares.shape)}, not {list(size)}.")
        if self.sensitivity.layers != self.shape.layers:
            raise UsageError(f"sensitivity of {self.sensitivity.layers} layers, but there are {self.shape.layers}.")
        known = {*self.tasks, OTHER}
        named = {*self.keywords.tasks, *self.lengths, *self.popularity, *self.sensitivity.tasks}
        if OTHER in self.tasks or named - known:
            raise UsageError(f"tasks {sorted(named - known) or [OTHER]} are not among the profile's: {self.tasks}.")

    def task_of(self, prompt: str, label: str | None = None) -> str:
        """The caller's label where there is one, else what the keywords say (`OTHER` for no match)."""
        return self.keywords.task_of(prompt, label)

    def lengths_of(self, task: str | None) -> Lengths | None:
        """The answers of that task, else of all prompts; None where nothing was generated."""
        return self.lengths.get(OTHER if task is None else task) or self.lengths.get(OTHER)

    def popularity_of(self, task: str | None) -> Array:
        """float64 [layers, experts]: the shares of that task, else of all prompts, else uniform."""
        shares = None if task is None else self.popularity.get(task)
        shares = self.popularity.get(OTHER) if shares is None else shares
        return self.shape.uniform() if shares is None else shares

    def check(self, fingerprint: str, model: str = "the model") -> None:
        """Refuse another model's checkpoint.

        Raises:
            UsageError: with both fingerprints.
        """
        if fingerprint != self.fingerprint:
            raise UsageError(
                f"the profile was made for {self.source.get('model', 'a model')} with the fingerprint "
                f"{self.fingerprint}, and {model} has {fingerprint}: other weights route otherwise. Make a profile of "
                "it with `emoe profile`."
            )

    @classmethod
    def read(cls, directory: Path | str, fingerprint: str | None = None, model: str = "the model") -> Profile:
        """Read a profile; predictors' files are read when they are asked for.

        Args:
            directory: what `write` or `emoe profile` made.
            fingerprint: of the model it is to be used with; None skips that check.
            model: what to call that model in the refusal.

        Raises:
            ProfileError: no profile there, a damaged one, or one of a newer version.
            UsageError: it was made for another model.
        """
        directory = Path(directory)
        header = _header(directory)
        try:
            made = cls._from_header(directory, header)
        except _BROKEN as error:
            raise ProfileError(
                f"{directory / FILE} is damaged or was edited into something else: {_reason(error)}. Correct it, or "
                "make the profile again with `emoe profile`."
            ) from error
        if fingerprint is not None:
            made.check(fingerprint, model)
        return made

    @classmethod
    def _from_header(cls, directory: Path, header: Mapping[str, Any]) -> Profile:
        shape = RoutingShape(**{name: int(header["shape"][name]) for name in ("layers", "experts", "top_k")})
        arrays = _read_arrays(directory / POPULARITY, header["popularity"])
        predictors: dict[str, State | Callable[[], State]] = {}
        for name, about in header["predictors"].items():
            _check_name(name)
            file = directory / PREDICTORS / f"{name}.safetensors"
            facts = {"nbytes": int(about["nbytes"]), "sha256": str(about["sha256"])}
            if not file.is_file():
                raise ProfileError(f"{file} is missing: the profile is damaged, make it again with `emoe profile`.")
            predictors[name] = partial(_read_arrays, file, facts)
        return cls(
            fingerprint=str(header["fingerprint"]),
            shape=shape,
            tasks=tuple(str(task) for task in header["tasks"]),
            keywords=Keywords.from_json(header["keywords"]),
            lengths={str(task): Lengths.from_json(values) for task, values in header["lengths"].items()},
            sensitivity=Sensitivity.from_json(header["sensitivity"], shape.layers),
            popularity={task: shares.astype(np.float64) for task, shares in arrays.items()},
            predictors=PredictorStates(predictors),
            timings=Timings(**header["timings"]),
            tokens={str(task): int(count) for task, count in header["tokens"].items()},
            source=dict(header["source"]),
        )

    def write(self, directory: Path | str) -> Path:
        """Write the directory. `profile.json` is written last, so an interrupted write is no profile.

        Raises:
            ProfileError: it cannot be written; the text says why.
        """
        directory = Path(directory)
        try:
            (directory / PREDICTORS).mkdir(parents=True, exist_ok=True)
            (directory / FILE).unlink(missing_ok=True)
            shares = {task: shares.astype(np.float32) for task, shares in self.popularity.items()}
            popularity = _write_arrays(directory / POPULARITY, shares)
            predictors = {}
            for name in sorted(self.predictors):
                _check_name(name)
                file = directory / PREDICTORS / f"{name}.safetensors"
                predictors[name] = _write_arrays(file, self.predictors[name])
            header = {
                "format": FORMAT,
                "version": VERSION,
                "fingerprint": self.fingerprint,
                "shape": {"layers": self.shape.layers, "experts": self.shape.experts, "top_k": self.shape.top_k},
                "tasks": list(self.tasks),
                "lengths": {task: lengths.as_json() for task, lengths in self.lengths.items()},
                "tokens": dict(self.tokens),
                "timings": self.timings.as_json(),
                "sensitivity": self.sensitivity.as_json(),
                "popularity": popularity,
                "predictors": predictors,
                "source": dict(self.source),
                "keywords": self.keywords.as_json(),
            }
            text = json.dumps(header, ensure_ascii=False, indent=1)
            write_whole(directory / FILE, (text + "\n").encode())
        except OSError as error:
            raise ProfileError(
                f"the profile {directory} could not be written: {error}. Make room there, or give another folder."
            ) from error
        return directory


def _header(directory: Path) -> dict[str, Any]:
    file = directory / FILE
    try:
        header = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ProfileError(
            f"{directory} holds no {FILE}: make a profile with `emoe profile MODEL --prompts FILE --out {directory}`."
        ) from None
    except (OSError, ValueError) as error:
        raise ProfileError(f"{file} cannot be read as JSON: {error}. Make the profile again.") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ProfileError(f"{file} is no profile: it does not say {FORMAT!r}.")
    version = header.get("version")
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        remedy = "update emoe" if newer else "make the profile again with `emoe profile`"
        raise ProfileError(f"{file} is a profile of version {version!r}, and this emoe reads {VERSION}: {remedy}.")
    return header


def _check_name(name: str) -> None:
    """Names become files: keep them inside the directory."""
    if PREDICTOR_NAME.fullmatch(name) is None:
        raise UsageError(f"{name!r} is no name of a predictor: write lower-case words joined by hyphens.")


def _write_arrays(file: Path, arrays: Mapping[str, Array]) -> dict[str, Any]:
    data = save_arrays({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    write_whole(file, data)
    return {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _read_arrays(file: Path, facts: Mapping[str, Any]) -> dict[str, Array]:
    try:
        data = file.read_bytes()
        if len(data) != facts["nbytes"] or hashlib.sha256(data).hexdigest() != facts["sha256"]:
            raise ProfileError(
                f"{file} is damaged: its {len(data)} bytes are not the ones {FILE} names; make it again."
            )
        return load_arrays(data)
    except (OSError, SafetensorError) as error:
        raise ProfileError(f"{file} cannot be read: {error}. Make the profile again.") from error


def _reason(error: Exception) -> str:
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
