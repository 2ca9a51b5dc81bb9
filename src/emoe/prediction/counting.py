"""What the simple predictors share: they count the running prompt and learn from it once it has ended.

The running prompt counts as the latest one as soon as one of its tokens was observed. So a prediction made between
prompts follows the last whole prompt, and one made in the middle of a prompt follows what that prompt did so far.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np

from emoe.errors import UsageError
from emoe.prediction.protocol import Array, Report, RoutingShape
from emoe.routing.trace import Trace


class PromptCounter:
    """Base of the predictors that need no training beyond counting; works online without `fit`.

    Subclasses say what they keep: `_learn` takes in a finished prompt, `_arrays` and `_take` are state and restore.
    """

    name = ""
    _task: str | None
    _running: Array
    _latest: Array

    def __init__(self, shape: RoutingShape) -> None:
        self.shape = shape
        self._forget()

    def begin_prompt(self, task: str | None) -> None:
        """End the running prompt, if any of its tokens was observed, and start one of this task."""
        self._end_prompt()
        self._task = task

    def observe(self, routes: Array) -> None:
        """Count routes [tokens, layers, k] of the running prompt."""
        self._running = self._running + self.shape.counts(routes)

    def observe_counts(self, counts: Array) -> None:
        """Add int [layers, experts] tokens per expert, for traces that hold no order of tokens.

        Raises:
            UsageError: the counts are of another shape.
        """
        if counts.shape != self._running.shape:
            wanted = list(self._running.shape)
            raise UsageError(f"counts of shape {list(counts.shape)} do not fit a model that routes over {wanted}.")
        self._running = self._running + counts

    def fit(self, history: Trace, *, seed: int = 0, progress: Report | None = None) -> None:
        """Forget everything and observe the prompts of `history` one after another. `seed` plays no part.

        Raises:
            UsageError: the trace is of a model of another shape.
        """
        check_shape(self.name, self.shape, history)
        self._forget()
        for prompt in range(history.num_prompts):
            self.begin_prompt(history.task_of(prompt))
            self.observe(history.experts[history.offsets[prompt] : history.offsets[prompt + 1]])
        self._end_prompt()
        if progress is not None:
            progress(f"{self.name}: counted {history.num_prompts} prompts")

    def state(self) -> dict[str, Array]:
        """Named arrays, the running prompt included."""
        return {"running": self._running, "latest": self._latest, "task": pack_names([self._task]), **self._arrays()}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over a `state`; predictions are equal bit for bit.

        Raises:
            UsageError: an array is missing or of another shape; nothing is changed then.
        """
        size = (self.shape.layers, self.shape.experts)
        running, latest = (need(state, self.name, name, size) for name in ("running", "latest"))
        (task,) = unpack_names(need(state, self.name, "task"))
        self._take(state)
        self._running, self._latest, self._task = running, latest, task

    @property
    def latest(self) -> Array:
        """int64 [layers, experts]: the running prompt's tokens per expert, or before its first token the last one's."""
        return self._running if self._running.any() else self._latest

    def _end_prompt(self) -> None:
        if not self._running.any():
            return
        self._learn(self._running, self._task)
        self._latest = self._running
        self._running = np.zeros_like(self._running)

    def _forget(self) -> None:
        self._task = None
        self._running = np.zeros((self.shape.layers, self.shape.experts), dtype=np.int64)
        self._latest = np.zeros_like(self._running)

    def _learn(self, counts: Array, task: str | None) -> None:
        """Take in a finished prompt's counts [layers, experts]."""

    def _arrays(self) -> dict[str, Array]:
        return {}

    def _take(self, state: Mapping[str, Array]) -> None:
        """Restore what `_arrays` gave, or raise UsageError before changing anything."""


def check_shape(name: str, shape: RoutingShape, history: Trace) -> None:
    """Raise UsageError unless the trace is of a model of this shape."""
    if RoutingShape.of(history) != shape:
        raise UsageError(f"{name} is made for {shape}, but the history is of {RoutingShape.of(history)}.")


def need(state: Mapping[str, Array], name: str, key: str, shape: Sequence[int | None] | None = None) -> Array:
    """A copy of one array of a stored state; None in `shape` fits any length.

    Raises:
        UsageError: it is missing or of another shape.
    """
    if key not in state:
        raise UsageError(f"the stored state of {name} lacks {key!r}: it is another predictor's, or damaged; fit again.")
    array = np.array(state[key])
    fits = shape is None or (
        array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
    )
    if not fits:
        raise UsageError(
            f"the stored state of {name} holds {key!r} as {list(array.shape)}, not {list(shape or ())}: it is of "
            "another model; fit again."
        )
    return array


def pack_names(names: Sequence[str | None]) -> Array:
    """Names as uint8 [any], which safetensors can hold."""
    return np.frombuffer(json.dumps(list(names)).encode(), dtype=np.uint8).copy()


def unpack_names(packed: Array) -> list[str | None]:
    """The inverse of `pack_names`.

    Raises:
        UsageError: the bytes are no list of names.
    """
    try:
        names = json.loads(packed.astype(np.uint8).tobytes().decode())
    except ValueError as error:
        raise UsageError(f"the stored names of tasks are damaged ({error}); fit the predictor again.") from error
    if not isinstance(names, list) or not all(name is None or isinstance(name, str) for name in names):
        raise UsageError("the stored names of tasks are damaged (no list of names); fit the predictor again.")
    return names
