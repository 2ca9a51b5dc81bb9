"""Feeds the scorer of evictions with a runtime's passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from emoe.model.collecting import PassRoutes
from emoe.model.runtime import Pass, Runtime
from emoe.prediction.live import LiveScores


class Scores:
    """Tells `live` of prompts and tokens in order."""

    def __init__(self, runtime: Runtime, live: LiveScores, layers: Sequence[int]) -> None:
        """Watch the decoder layers `layers`, ascending."""
        self.live = live
        self._runtime = runtime
        self._ranks = {layer: rank for rank, layer in enumerate(layers)}

    def collect(self, found: PassRoutes) -> None:
        """Observe one pass: a prefill chunk at once, a decode step as one token, a batch's tokens one after another."""
        self.live.observe(found.routes, found.weights, found.token_ids)

    def start_pass(self, now: Pass) -> None:
        """Announce a pass, and a new prompt; a batch of several tasks has none."""
        if now.new_prompt:
            tasks = set(self._runtime.tasks)
            self.live.begin_prompt(tasks.pop() if len(tasks) == 1 else None)
        self.live.begin_pass(now.batch * now.tokens)

    def route(self, now: Pass, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """What the running layer chose, before its experts are asked for."""
        if len(ids) == 1:
            self.live.route(self._ranks[layer], ids[0].cpu().numpy())
