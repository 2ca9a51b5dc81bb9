"""Feeds the scorer of evictions with a runtime's passes, and switches it off while it costs more than it saves."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from emoe.model.collecting import PassRoutes
from emoe.model.passes import Pass
from emoe.model.runtime import Runtime
from emoe.prediction.live import LiveScores
from emoe.residency.pool import ExpertPool
from emoe.residency.worth import Worth


class Scores:
    """Tells `live` of prompts and tokens in order."""

    def __init__(self, runtime: Runtime, live: LiveScores, layers: Sequence[int]) -> None:
        """Watch the decoder layers `layers`, ascending."""
        self.live = live
        self._runtime = runtime
        self._ranks = {layer: rank for rank, layer in enumerate(layers)}
        self.pools: Sequence[ExpertPool] = ()
        self.worth = Worth()
        """Load time spared against scoring time. Judged only where a contest counts what recency would have loaded."""
        self.idle = ""
        """Why nothing is scored at all; empty where something is."""
        self._last_pass_s = time.perf_counter()
        self._spent_s, self._spared = 0.0, 0

    def rest(self, reason: str) -> None:
        """Neither be told nor asked: evictions go by least-stale."""
        self.idle = reason
        self.live.active = False

    def collect(self, found: PassRoutes) -> None:
        """Observe one pass: a prefill chunk at once, a decode step as one token, a batch's tokens one after another."""
        self.live.observe(found.routes, found.weights, found.token_ids)

    def start_pass(self, now: Pass) -> None:
        """Announce a pass, and a new prompt; a batch of several tasks has none."""
        self._weigh()
        if now.new_prompt:
            tasks = set(self._runtime.tasks)
            self.live.begin_prompt(tasks.pop() if len(tasks) == 1 else None)
        self.live.begin_pass(now.batch * now.tokens)

    def _weigh(self) -> None:
        """Set what the scores spared in the last pass against what they took."""
        now = time.perf_counter()
        seconds, self._last_pass_s = now - self._last_pass_s, now
        if not self.live.contests:
            return
        spent, spared = self.live.spent_s, self.live.spared_loads()
        loads = sum(c.loads for pool in self.pools for c in pool.table.counters.values())
        each_s = sum(pool.load_wait_s for pool in self.pools) / max(1, loads)
        self.worth.hide((spared - self._spared) * each_s)
        self.worth.spend(spent - self._spent_s)
        self._spent_s, self._spared = spent, spared
        self.worth.end_pass(seconds)
        self.live.active = self.worth.active

    def route(self, now: Pass, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """What the running layer chose, before its experts are asked for."""
        if len(ids) == 1:
            self.live.route(self._ranks[layer], ids.cpu().numpy()[0])
