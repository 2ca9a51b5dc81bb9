"""Record a trace while a model runs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from emoe.errors import UsageError
from emoe.routing.trace import PHASES, Array, Trace, id_dtype, missing_id

if TYPE_CHECKING:
    from torch import Tensor

Phase = Literal["prefill", "decode"]


class TraceWriter:
    """Collects routes pass by pass and writes one trace file at the end.

        with TraceWriter("run.npz", layers=[0, 1], num_experts=8, top_k=2) as writer:
            prompt = writer.add_prompt(task="maths")
            writer.begin_pass([prompt], "prefill", tokens_each=5)
            writer.record(0, ids, weights)  # [5, 2] each
            writer.record(1, ids, weights)

    Nothing is copied off the device before a pass ends, so recording does not stall the layers. Rows are kept in
    memory, 3 bytes for each token, layer and choice, and written by `finish`, at the end of the `with` block. When
    that block ends with an error, nothing is written.
    """

    def __init__(
        self,
        path: Path | str,
        layers: Sequence[int],
        num_experts: int,
        top_k: int,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        """Start a trace of these decoder layers.

        num_experts and top_k are the largest of any layer. source: JSON values that say where the trace is from.
        Raises UsageError when `path` cannot be written, before any work is done.
        """
        self.path = Path(path)
        if not os.access(self.path.parent, os.W_OK) or self.path.is_dir():
            raise UsageError(f"cannot write a trace to {self.path}; give a file in a folder that can be written to")
        if list(layers) != sorted({*layers}) or not layers:
            raise UsageError(f"layers must be ascending numbers without repeats, not {list(layers)}")
        self._rows_of = {layer: index for index, layer in enumerate(layers)}
        self._num_experts = num_experts
        self._top_k = top_k
        self._dtype = id_dtype(num_experts)
        self._source = _plain("source", source or {})
        self._tasks: list[str | None] = []
        self._texts: list[Array | None] = []
        self._about: list[dict[str, Any]] = []
        self._chunks: list[tuple[Array, ...]] = []
        self._pass: dict[int, tuple[Tensor, Tensor]] | None = None
        self._prompts = self._phases = self._kept = self._tokens = np.zeros(0, dtype=np.int64)
        self._with_tokens = True
        self._steps = 0
        self._finished = False

    def add_prompt(self, task: str | None = None, token_ids: Sequence[int] | None = None, **about: Any) -> int:
        """Announce a prompt and return its number. `about`: JSON values to keep with it."""
        self._open()
        self._about.append(_plain("about", about))
        self._tasks.append(task)
        self._texts.append(None if token_ids is None else np.asarray(token_ids, dtype=np.int32))
        return len(self._tasks) - 1

    def begin_pass(
        self,
        prompts: Sequence[int],
        phase: Phase | Sequence[Phase],
        tokens_each: int = 1,
        *,
        mask: Tensor | Array | None = None,
        token_ids: Tensor | Array | None = None,
    ) -> None:
        """Start a forward pass over len(prompts) x tokens_each tokens, sequence after sequence, as transformers
        flattens a batch. A pass still open is ended first.

        prompts: the prompt of each sequence of the batch. In a packed batch give each token's prompt.
        phase: of the whole pass, or of each entry of `prompts`.
        mask: True for tokens to keep, False for padding; any shape with that many entries. Leave out, too, the
            sequences of a batch that have ended and are fed padding until the others end.
        token_ids: the tokens, any shape with that many entries.
        """
        self._open()
        self.end_pass()
        count = len(prompts) * tokens_each
        if not all(0 <= prompt < len(self._tasks) for prompt in prompts):
            raise UsageError(f"prompts {list(prompts)} were not all announced; {len(self._tasks)} were")
        phases = [phase] * len(prompts) if isinstance(phase, str) else list(phase)
        if len(phases) != len(prompts) or any(each not in PHASES for each in phases):
            raise UsageError(f"phase must be one of {', '.join(PHASES)}, or one for each prompt, not {phase!r}")
        self._kept = np.ones(count, dtype=bool) if mask is None else _flat(mask, count, "mask") != 0
        self._prompts = np.repeat(np.asarray(prompts, dtype=np.int64), tokens_each)
        self._phases = np.repeat(np.array([PHASES.index(p) for p in phases], dtype=np.uint8), tokens_each)
        self._with_tokens = self._with_tokens and token_ids is not None
        self._tokens = np.zeros(count, dtype=np.int32)
        if token_ids is not None:
            self._tokens = _flat(token_ids, count, "token_ids").astype(np.int32)
        self._pass = {}

    def record(self, layer: int, ids: Tensor, weights: Tensor) -> None:
        """One layer's route in this pass: expert ids and gate weights [tokens, k], padding included.

        The tensors are kept, not copied, until the pass ends.
        """
        if self._pass is None:
            raise UsageError("begin_pass must come before record")
        if layer not in self._rows_of or layer in self._pass:
            why = "was recorded twice in one pass" if layer in self._pass else "is not one of the trace's"
            raise UsageError(f"layer {layer} {why}; its layers are {list(self._rows_of)}")
        expected = len(self._prompts)
        if ids.shape != weights.shape or ids.ndim != 2 or len(ids) != expected or ids.shape[1] > self._top_k:
            raise UsageError(
                f"layer {layer}: ids {list(ids.shape)} and weights {list(weights.shape)} must both be "
                f"[{expected}, at most {self._top_k}]"
            )
        self._pass[layer] = (ids.detach(), weights.detach())

    def end_pass(self) -> None:
        """Take in what was recorded since `begin_pass`. Layers not recorded count as not computed."""
        recorded, self._pass = self._pass, None
        if not recorded:
            return
        rows = np.flatnonzero(self._kept)
        shape = (len(rows), len(self._rows_of), self._top_k)
        experts = np.full(shape, missing_id(self._dtype), dtype=self._dtype)
        weights = np.zeros(shape, dtype=np.float16)
        for layer, (ids, gate) in recorded.items():
            chosen = ids.cpu().numpy()[rows]
            if chosen.size and not (chosen.min() >= 0 and chosen.max() < self._num_experts):
                raise UsageError(
                    f"layer {layer}: expert ids {chosen.min()} to {chosen.max()} of {self._num_experts} experts"
                )
            experts[:, self._rows_of[layer], : ids.shape[1]] = chosen
            weights[:, self._rows_of[layer], : ids.shape[1]] = gate.float().cpu().numpy()[rows]
        steps = np.full(len(rows), self._steps, dtype=np.int64)
        of = (self._prompts[rows], self._phases[rows], steps, self._tokens[rows])
        self._chunks.append((experts, weights, *of))
        self._steps += 1

    def finish(self) -> Path:
        """Write the file, complete or not at all, and return its path. Calling it again does nothing."""
        if not self._finished:
            self.end_pass()
            self.trace().write(self.path)
            self._finished = True
            self._chunks.clear()
        return self.path

    def say(self, **source: Any) -> None:
        """Add JSON values to what the trace says of where it is from."""
        self._source |= _plain("source", source)

    def discard(self) -> None:
        """Forget everything and write nothing."""
        self._finished, self._pass = True, None
        self._chunks.clear()

    def trace(self) -> Trace:
        """What was recorded so far, up to the last pass that ended."""
        self._open()
        empty = (np.zeros((0, len(self._rows_of), self._top_k), self._dtype), *[np.zeros(0)] * 5)
        parts = zip(*(self._chunks or [empty]), strict=True)
        experts, weights, prompts, phases, steps, tokens = (np.concatenate(part) for part in parts)
        order = np.argsort(prompts, kind="stable")
        offsets = np.searchsorted(prompts[order], np.arange(len(self._tasks) + 1)).astype(np.int64)
        labels = list(dict.fromkeys(task for task in self._tasks if task is not None))
        texts = [text for text in self._texts if text is not None]
        whole = bool(texts) and len(texts) == len(self._texts)
        ends = np.cumsum([0, *(len(text) for text in texts)], dtype=np.int64)
        return Trace(
            experts=experts[order],
            weights=weights[order] if self._chunks else np.zeros(experts.shape, np.float16),
            phase=phases[order].astype(np.uint8),
            step=steps[order].astype(np.int64),
            token_ids=tokens[order].astype(np.int32) if self._with_tokens and self._chunks else None,
            offsets=offsets,
            task=np.array([-1 if t is None else labels.index(t) for t in self._tasks], dtype=np.int32),
            tasks=tuple(labels),
            prompt_token_ids=np.concatenate(texts) if whole else None,
            prompt_token_offsets=ends if whole else None,
            layers=np.array(list(self._rows_of), dtype=np.int32),
            num_experts=self._num_experts,
            prompts=tuple(self._about),
            source=self._source,
        )

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.discard()

    def _open(self) -> None:
        if self._finished:
            raise UsageError(f"the trace {self.path} is finished; start another one")


def _flat(values: Tensor | Array, count: int, name: str) -> Array:
    array = np.asarray(values.cpu() if hasattr(values, "cpu") else values).reshape(-1)
    if len(array) != count:
        raise UsageError(f"{name} has {len(array)} entries for a pass of {count} tokens")
    return array


def _plain(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse now what could not be written at the end."""
    try:
        json.dumps(dict(values))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name} of a trace must hold JSON values: {error}") from error
    return dict(values)
