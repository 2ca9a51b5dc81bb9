"""Whether a planted checkpoint routes as it should: run it, record the routes, compare them with what was planted."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from emoe import model as emoe_model
from emoe.bench.forced import forced
from emoe.bench.plant.card import ROUTES, read_card
from emoe.bench.plant.next_gate import RECORDED, Guesses
from emoe.config import ExpertMemory
from emoe.routing.trace import DECODE, PREFILL, Array, Trace

Say = Callable[[str], None]

MEMORY = ExpertMemory("share", 0.25)
"""Of the experts: enough for the check, little enough for the largest checkpoint."""

STEPS = 48
"""Tokens decoded one by one, and of each sequence of the batch."""

BATCH = 3
PROMPT = 8
"""Tokens that come before those."""


@dataclass(frozen=True, slots=True)
class Difference:
    """What one part of the check found. Routes are counted for each token and layer.

    next_gate: the share of a token's experts that the next layer's router found when it was asked a layer early (None
    where there is no next layer); planted: the share that it should find, None where not every token was fed once.
    """

    part: str
    routes: int
    wrong: int
    first: str
    weights_off: float
    next_gate: float | None = None
    planted: float | None = None

    @property
    def failed(self) -> bool:
        """Whether it is not what was planted."""
        if self.next_gate is None or self.planted is None:
            return bool(self.wrong)
        return bool(self.wrong) or abs(self.next_gate - self.planted) > RECORDED

    @property
    def text(self) -> str:
        """For people."""
        if self.wrong:
            return f"{self.part}: {self.wrong} of {self.routes} routes differ from the trace, {self.first}"
        said = f"{self.part}: all {self.routes} routes equal the trace, weights within {self.weights_off:.3f}"
        if self.next_gate is None:
            return said
        wanted = "" if self.planted is None else f" (planted: {self.planted:.1%})"
        return f"{said}; next gate right about {self.next_gate:.1%} of a token's experts{wanted}"


def check(folder: str | Path, say: Say = lambda _: None, dtype: str = "auto") -> list[Difference]:
    """Run the checkpoint in `folder` with emoe, exact, and compare its routes with the planted ones, and what the next
    layer's router guesses with what it should.

    All tokens as one prompt, then the last ones one by one, then a batch of sequences.

    Raises:
        UsageError: no planted checkpoint.
        TraceError: its routes are missing.
    """
    folder = Path(folder)
    card = read_card(folder)
    planted = Trace.read(folder / ROUTES)
    tokens = torch.arange(card.tokens)
    steps = min(STEPS, card.tokens - PROMPT) if card.tokens > PROMPT else 0
    starts = [card.tokens * n // BATCH for n in range(BATCH)]
    parts = [("prefill", tokens[None], card.tokens)]
    if steps:
        parts.append(("decode", tokens[None, -steps - PROMPT :], PROMPT))
        rows = torch.stack([(tokens[: steps + PROMPT] + start) % card.tokens for start in starts])
        parts.append((f"batch of {BATCH}", rows, PROMPT))
    found = []
    for name, ids, prompt in parts:
        with tempfile.TemporaryDirectory(prefix="emoe-plant-") as scratch:
            record = Path(scratch) / "routes.npz"
            # Prefetching and plans would change nothing; without them the check needs the least.
            loaded, _ = emoe_model.load(folder, expert_memory=MEMORY, trace=record, dtype=dtype)
            guesses = Guesses(loaded)
            try:
                for _ in forced(loaded, ids, prompt):
                    pass
            finally:
                guesses.remove()
                emoe_model.close(loaded)
            routes = compare(name, planted, Trace.read(record))
            every = card.next_gate if ids.shape == (1, card.tokens) else None
            found.append(replace(routes, next_gate=guesses.share, planted=every))
        say(found[-1].text)
    return found


def compare(part: str, planted: Trace, recorded: Trace) -> Difference:
    """Recorded routes against the planted ones of the same token ids, best expert first."""
    if recorded.token_ids is None or recorded.weights is None:
        raise ValueError("a recorded trace has token ids and weights")
    wanted, found = planted.experts[recorded.token_ids], _best_first(recorded)
    wrong = (wanted != found).any(axis=2)
    first = ""
    if wrong.any():
        row, layer = np.argwhere(wrong)[0]
        phase = {PREFILL: "prefill", DECODE: "decode"}[int(recorded.phase[row])]
        first = (
            f"first in {phase}, token {recorded.token_ids[row]}, layer {recorded.layers[layer]}: "
            f"{found[row, layer].tolist()} instead of {wanted[row, layer].tolist()}"
        )
    off = 0.0
    if planted.weights is not None:
        shares = [_shares(weights) for weights in (planted.weights[recorded.token_ids], recorded.weights)]
        off = float(np.abs(-np.sort(-shares[0]) + np.sort(-shares[1])).max())
    return Difference(part, wrong.size, int(wrong.sum()), first, off)


def _best_first(trace: Trace) -> Array:
    """Expert ids in falling order of their weights: not every family's router returns them so."""
    if trace.weights is None:
        return trace.experts
    order = np.argsort(-trace.weights.astype(np.float32), axis=2, kind="stable")
    return np.take_along_axis(trace.experts, order, axis=2)


def _shares(weights: Array) -> Array:
    weights = weights.astype(np.float32)
    shares: Array = weights / weights.sum(axis=2, keepdims=True)
    return shares
