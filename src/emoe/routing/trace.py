"""Routing traces: which experts each token of each prompt was routed to, in order.

A trace is one `.npz` file without pickles, version 1. Rows are routed tokens, grouped by prompt and in order
within it. Arrays:

    experts               uint8 or uint16 [tokens, layers, k]   expert ids, best first where the router orders them;
                                                                the dtype's largest value: not computed
    weights               float16 [tokens, layers, k]           gate weights, 0 where not computed    (optional)
    phase                 uint8 [tokens]                        0 prefill, 1 decode
    step                  int64 [tokens]                        forward pass that routed the token: the order in time
    token_ids             int32 [tokens]                        the token that was routed             (optional)
    offsets               int64 [prompts + 1]                   prompt i owns rows offsets[i]:offsets[i + 1]
    task                  int32 [prompts]                       index into the header's tasks, -1 without a label
    prompt_token_ids      int32 [any]                           the prompts' own texts as ids         (optional)
    prompt_token_offsets  int64 [prompts + 1]                   prompt i owns ids [i]:[i + 1]         (optional)
    layers                int32 [layers]                        decoder layer numbers, ascending
    header                uint8                                 UTF-8 JSON: format "emoe-trace", version, num_experts,
                                                                tasks, prompts (an object for each), source

`Trace.read` also reads the layouts that `layouts` describes.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emoe.checkpoint.whole import whole_file
from emoe.errors import EmoeError

FORMAT = "emoe-trace"
VERSION = 1
PREFILL, DECODE = 0, 1
PHASES = ("prefill", "decode")
FINAL_LAYER = "final_layer"
"""In a trace's `source`: the model's last layer, where of each prompt in a pass only the last token was run."""

Array = NDArray[Any]
_READ_ERRORS = (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error)


class TraceError(EmoeError):
    """A trace file is missing, damaged, of an unknown layout, or contradicts itself."""

    exit_code = 3


def missing_id(dtype: np.dtype[Any]) -> int:
    """The expert id that means "not computed" in arrays of this dtype: its largest value."""
    return int(np.iinfo(dtype).max)


def id_dtype(num_experts: int) -> np.dtype[Any]:
    """The smallest dtype that holds every id of `num_experts` experts and one more for "not computed"."""
    return np.dtype(np.uint8 if num_experts <= missing_id(np.dtype(np.uint8)) else np.uint16)


@dataclass(frozen=True, eq=False)
class Trace:
    """A trace in memory; the fields are the file's, see the module's text.

    tasks: the distinct labels; prompts: what else is known about each prompt; source: where the trace is from
    (model, mode, data). Raises TraceError when the arrays contradict each other.
    """

    experts: Array
    phase: Array
    step: Array
    offsets: Array
    task: Array
    tasks: tuple[str, ...]
    layers: Array
    num_experts: int
    weights: Array | None = None
    token_ids: Array | None = None
    prompt_token_ids: Array | None = None
    prompt_token_offsets: Array | None = None
    prompts: tuple[Mapping[str, Any], ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _validate(self)

    def __len__(self) -> int:
        return len(self.experts)

    @property
    def num_prompts(self) -> int:
        """Prompts in the trace, those without routed tokens included."""
        return len(self.offsets) - 1

    @property
    def top_k(self) -> int:
        """Experts for each token and layer."""
        return int(self.experts.shape[2])

    @property
    def computed(self) -> Array:
        """bool [tokens, layers, k]: False where the trace holds no expert."""
        mask: Array = self.experts != missing_id(self.experts.dtype)
        return mask

    def task_of(self, prompt: int) -> str | None:
        """The prompt's label, None where it has none."""
        index = int(self.task[prompt])
        return None if index < 0 else self.tasks[index]

    def prompt_of_token(self) -> Array:
        """int64 [tokens]: the prompt each row belongs to."""
        numbers: Array = np.repeat(np.arange(self.num_prompts), np.diff(self.offsets))
        return numbers

    def in_time(self) -> Array:
        """int64 [tokens]: row numbers in the order in which the tokens were routed."""
        return np.argsort(self.step, kind="stable")

    def counts(self, phase: int | None = None) -> Array:
        """int64 [prompts, layers, num_experts]: tokens of each prompt routed to each expert, in one phase or both."""
        layers = len(self.layers)
        rows = np.ones(len(self), dtype=bool) if phase is None else self.phase == phase
        keys = self.prompt_of_token()[rows, None] * layers + np.arange(layers)
        flat = keys[:, :, None] * self.num_experts + self.experts[rows]
        size = self.num_prompts * layers * self.num_experts
        return np.bincount(flat[self.computed[rows]], minlength=size).reshape(-1, layers, self.num_experts)

    def shares(self, prompts: Iterable[int] | None = None) -> Array:
        """float64 [layers, num_experts]: share of the tokens of these prompts (all by default) routed to each
        expert. A layer's shares sum to k, or to 0 where nothing was computed."""
        counts = self.counts()
        total = (counts if prompts is None else counts[list(prompts)]).sum(axis=0)
        tokens = total.sum(axis=1, keepdims=True) / self.top_k
        shares: Array = np.divide(total, tokens, out=np.zeros(total.shape), where=tokens > 0)
        return shares

    def shares_by_task(self) -> dict[str, Array]:
        """`shares` of the prompts of each task."""
        return {name: self.shares(np.flatnonzero(self.task == i)) for i, name in enumerate(self.tasks)}

    def select(self, prompts: Sequence[int]) -> Trace:
        """The trace of these prompts alone, in the order given; steps keep their values."""
        chosen = np.asarray(prompts, dtype=np.int64)
        rows, offsets = _slices(self.offsets, chosen)
        text, text_offsets = None, None
        if self.prompt_token_ids is not None and self.prompt_token_offsets is not None:
            which, text_offsets = _slices(self.prompt_token_offsets, chosen)
            text = self.prompt_token_ids[which]
        return dataclasses.replace(
            self,
            experts=self.experts[rows],
            weights=None if self.weights is None else self.weights[rows],
            phase=self.phase[rows],
            step=self.step[rows],
            token_ids=None if self.token_ids is None else self.token_ids[rows],
            offsets=offsets,
            task=self.task[chosen],
            prompt_token_ids=text,
            prompt_token_offsets=text_offsets,
            prompts=tuple(self.prompts[i] for i in chosen),
        )

    def write(self, path: Path | str) -> Path:
        """Write the file: complete under its name, or not at all. Raises TraceError naming path and reason."""
        path = Path(path)
        arrays = {name: getattr(self, name) for name in _ARRAYS if getattr(self, name) is not None}
        header = {
            "format": FORMAT,
            "version": VERSION,
            "arrays": list(arrays),
            "num_experts": self.num_experts,
            "tasks": self.tasks,
            "prompts": self.prompts,
            "source": self.source,
        }
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
        arrays["header"] = np.frombuffer(text.encode(), dtype=np.uint8)
        try:
            with whole_file(path) as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)
        except OSError as error:
            raise TraceError(
                f"{path}: the trace could not be written: {error.strerror or error}. Make room, or give another path."
            ) from error
        return path

    @classmethod
    def read(cls, path: Path | str, num_experts: int | None = None) -> Trace:
        """Read a trace file, or a folder that holds a `trace.npz`.

        num_experts: for layouts that do not say; without it, the largest id plus one.
        """
        from emoe.routing.layouts import read_foreign

        path = Path(path)
        file = path / "trace.npz" if path.is_dir() else path
        arrays = load_arrays(file)
        if "header" not in arrays:
            return read_foreign(file, arrays, num_experts)
        header = _header(file, arrays.pop("header"))
        known = {name: arrays[name] for name in _ARRAYS if name in arrays}
        try:
            absent = [name for name in (*_REQUIRED, *header.get("arrays", ())) if name not in known]
            if absent:
                raise TraceError(f"it lacks the arrays {', '.join(sorted({*absent}))}")
            return cls(
                **known,
                num_experts=int(header["num_experts"]),
                tasks=tuple(str(name) for name in header["tasks"]),
                prompts=tuple(header["prompts"]),
                source=dict(header["source"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise TraceError(f"{file}: the trace's header is incomplete: {error!r}; record it again") from error
        except TraceError as error:
            raise TraceError(f"{file}: {error}; the file is damaged, record it again") from error


_REQUIRED = ("experts", "phase", "step", "offsets", "task", "layers")
_ARRAYS = (*_REQUIRED, "weights", "token_ids", "prompt_token_ids", "prompt_token_offsets")


def _slices(offsets: Array, chosen: Array) -> tuple[Array, Array]:
    """Rows of the chosen ranges one after another, and their new offsets."""
    lengths = np.diff(offsets)[chosen]
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return np.repeat(offsets[chosen] - ends[:-1], lengths) + np.arange(ends[-1]), ends


def load_arrays(file: Path) -> dict[str, Array]:
    """The arrays of an .npz file. Raises TraceError naming what is wrong with it."""
    try:
        with file.open("rb") as stream:
            if stream.read(2) not in (b"PK", b"\x93N"):  # numpy would take it for a pickle, and say how to load one
                raise TraceError(f"{file} is no .npz file; give a trace that emoe wrote")
            stream.seek(0)
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise TraceError(f"{file} holds a single array, not a trace; give an .npz file that emoe wrote")
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise TraceError(f"there is no trace at {file}; check the path") from None
    except _READ_ERRORS as error:
        raise TraceError(f"{file} is not a readable trace ({error}); it is damaged or no .npz file") from error


def _header(file: Path, raw: Array) -> dict[str, Any]:
    try:
        header = json.loads(raw.tobytes().decode())
    except ValueError as error:
        raise TraceError(f"{file}: the trace's header is not JSON ({error}); record it again") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise TraceError(f"{file} is not a trace: its header does not say {FORMAT!r}")
    if header.get("version") != VERSION:
        raise TraceError(
            f"{file} is a trace of version {header.get('version')!r}; this emoe reads {VERSION}: update emoe"
        )
    return header


def _validate(trace: Trace) -> None:
    """Every array against the others; the first contradiction is named with its numbers."""
    experts = trace.experts
    _need(experts.ndim == 3 and experts.dtype in {np.dtype(np.uint8), np.dtype(np.uint16)}, "experts", experts)
    for name in _ARRAYS:
        array = getattr(trace, name)
        _need(array is None or array.dtype.kind in ("f" if name == "weights" else "iu"), name, array)
    tokens, layers, _ = experts.shape
    _need_offsets("offsets", trace.offsets, tokens, "tokens")
    prompts = len(trace.offsets) - 1
    _need(trace.layers.shape == (layers,), "layers", trace.layers, f"for {layers} layers")
    for name in ("phase", "step", "token_ids"):
        array = getattr(trace, name)
        _need(array is None or array.shape == (tokens,), name, array, f"for {tokens} tokens")
    _need(trace.weights is None or trace.weights.shape == experts.shape, "weights", trace.weights)
    _need(trace.task.shape == (prompts,), "task", trace.task, f"for {prompts} prompts")
    if (trace.prompt_token_ids is None) != (trace.prompt_token_offsets is None):
        raise TraceError("prompt_token_ids and prompt_token_offsets belong together; one is absent")
    if trace.prompt_token_ids is not None and trace.prompt_token_offsets is not None:
        text = trace.prompt_token_offsets
        _need(text.shape == (prompts + 1,), "prompt_token_offsets", text, f"for {prompts} prompts")
        _need_offsets("prompt_token_offsets", text, len(trace.prompt_token_ids), "prompt tokens")
    if len(trace.prompts) != prompts or not all(isinstance(about, Mapping) for about in trace.prompts):
        raise TraceError(f"{len(trace.prompts)} prompts are described, but offsets speak of {prompts}")
    known = experts[trace.computed]
    if known.size and int(known.max()) >= trace.num_experts:
        raise TraceError(f"experts holds the id {known.max()}, but there are {trace.num_experts} experts")
    if not np.isin(trace.phase, (PREFILL, DECODE)).all():
        raise TraceError(f"phase holds {sorted(set(trace.phase.tolist()))}; 0 is prefill, 1 is decode")
    if prompts and (int(trace.task.min()) < -1 or int(trace.task.max()) >= len(trace.tasks)):
        raise TraceError(f"task holds an index outside the {len(trace.tasks)} task labels")


def _need(sound: bool, name: str, array: Array | None, where: str = "") -> None:
    if not sound and array is not None:
        raise TraceError(f"{name} is {array.dtype} {list(array.shape)} {where}".rstrip() + ", which does not fit")


def _need_offsets(name: str, offsets: Array, end: int, what: str) -> None:
    _need(offsets.ndim == 1 and len(offsets) > 0, name, offsets)
    if int(offsets[0]) != 0 or int(offsets[-1]) != end or bool((offsets[1:] < offsets[:-1]).any()):
        raise TraceError(f"{name} must rise from 0 to {end}, the number of {what}")
