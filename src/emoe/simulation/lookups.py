"""A trace as the look-ups that a bank is asked for, in the order in which they are served.

A *sequence* is one prompt's routed tokens. Sequences follow each other without a reset; interleaved, N of them take
turns token by token, as the steps of a batch would, and one that ends is replaced by the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from emoe.errors import UsageError, unknown
from emoe.prediction.protocol import RoutingShape
from emoe.routing.trace import DECODE, PREFILL, Array, Trace

Phases = Literal["all", "prefill", "decode"]
PHASES: tuple[Phases, ...] = ("all", "prefill", "decode")

NEVER = np.iinfo(np.int32).max
"""The next use of a key that is not used again."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """One prompt being served: its rows of the trace, and the lane of the batch that it runs in."""

    prompt: int
    lane: int
    task: str | None
    rows: Array


@dataclass(frozen=True, eq=False)
class Lookups:
    """Look-ups of a trace.

    Attributes:
        trace: where they come from.
        shape: the model's routing.
        keys: int64 [tokens, layers * k] flat keys (rank * experts + expert) in the order served. `shape.layers *
            shape.experts` stands for "not computed", and for an expert that the same token named before.
        sequences: in the order in which they begin.
        sequence: int64 [tokens] the sequence of each token.
        lanes: sequences at once.
    """

    trace: Trace
    shape: RoutingShape
    keys: Array
    sequences: tuple[Sequence, ...]
    sequence: Array
    lanes: int

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def nowhere(self) -> int:
        """The flat key that stands for none."""
        return self.shape.layers * self.shape.experts

    @property
    def count(self) -> int:
        """Look-ups: routed expert keys."""
        return int((self.keys != self.nowhere).sum())

    def next_use(self) -> Array:
        """int32 [tokens, layers * k]: the token that next uses each looked-up key, NEVER where none does."""
        following = np.full(self.nowhere + 1, NEVER, dtype=np.int32)
        found = np.empty(self.keys.shape, dtype=np.int32)
        for i in range(len(self.keys) - 1, -1, -1):
            ids = self.keys[i]
            found[i] = following[ids]
            following[ids] = i
        return found

    @classmethod
    def of(cls, trace: Trace, *, phases: Phases = "all", interleave: int = 1, prompts: int | None = None) -> Lookups:
        """Order a trace's look-ups.

        Args:
            trace: the trace.
            phases: which tokens count.
            interleave: sequences at once.
            prompts: only the first so many.

        Raises:
            UsageError: nothing is left to look up, or a number cannot be meant.
        """
        if interleave < 1:
            raise UsageError(f"--interleave must be at least 1, not {interleave}.")
        if phases not in PHASES:
            raise unknown("phase", phases, PHASES)
        shape = RoutingShape.of(trace)
        kept = np.ones(len(trace), dtype=bool)
        if phases != "all":
            kept = trace.phase == {"prefill": PREFILL, "decode": DECODE}[phases]
        waiting = []
        for prompt in range(trace.num_prompts if prompts is None else min(prompts, trace.num_prompts)):
            rows = np.arange(trace.offsets[prompt], trace.offsets[prompt + 1])
            rows = rows[kept[rows]]
            if rows.size:
                waiting.append((prompt, rows))
        if not waiting:
            which = "" if phases == "all" else f" in phase {phases}"
            raise UsageError(f"the trace holds no routed token{which}, so there is nothing to look up.")
        sequences, order, sequence = _take_turns(trace, waiting, interleave)
        found = cls(trace, shape, _flat_keys(trace, shape, order), tuple(sequences), sequence, interleave)
        if not found.count:
            raise UsageError(
                f"of {len(found)} tokens the trace holds no expert of any layer: there is nothing to look up."
            )
        return found


def _take_turns(trace: Trace, waiting: list[tuple[int, Array]], lanes: int) -> tuple[list[Sequence], Array, Array]:
    """Sequences in the order they begin, and of each token in order of service its row and its sequence."""
    if lanes == 1:
        lengths = [len(rows) for _, rows in waiting]
        served = [Sequence(prompt, 0, trace.task_of(prompt), rows) for prompt, rows in waiting]
        return served, np.concatenate([rows for _, rows in waiting]), np.repeat(np.arange(len(waiting)), lengths)
    queue: Iterator[tuple[int, Array]] = iter(waiting)
    sequences: list[Sequence] = []
    running: list[tuple[int, Iterator[int]] | None] = [None] * lanes
    order: list[int] = []
    owner: list[int] = []
    live = True
    while live:
        live = False
        for lane in range(lanes):
            now = running[lane]
            row = None if now is None else next(now[1], None)
            if row is None:
                coming = next(queue, None)
                if coming is None:
                    running[lane] = None
                    continue
                prompt, rows = coming
                sequences.append(Sequence(prompt, lane, trace.task_of(prompt), rows))
                now = running[lane] = (len(sequences) - 1, iter(rows.tolist()))
                row = next(now[1])
            if now is not None:
                order.append(row)
                owner.append(now[0])
                live = True
    return sequences, np.array(order, dtype=np.int64), np.array(owner, dtype=np.int64)


def _flat_keys(trace: Trace, shape: RoutingShape, rows: Array) -> Array:
    nowhere = shape.layers * shape.experts
    experts = trace.experts[rows]
    known = trace.computed[rows]
    if shape.top_k > 1:  # no router names an expert twice for one token, but a file may
        ordered = np.sort(experts, axis=2)
        repeated = (ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] < shape.experts)
        for token, layer in np.argwhere(repeated.any(axis=2)):
            seen: set[int] = set()
            for j, expert in enumerate(experts[token, layer].tolist()):
                known[token, layer, j] &= expert not in seen
                seen.add(expert)
    keys = experts.astype(np.int64) + (np.arange(shape.layers) * shape.experts)[None, :, None]
    keys[~known] = nowhere
    return keys.reshape(len(rows), -1)
