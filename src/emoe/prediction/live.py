"""One scorer at work: told of prompts, passes and routes, asked only for layers that must evict.

The engine and the replay of its traces share it, so the same routes give the same evictions in both.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from emoe.prediction.protocol import Array, LayerScorer, RoutingShape, UseScorer
from emoe.prediction.registry import CONTESTED
from emoe.residency.contest import RECENCY, SCORES, Contest
from emoe.residency.eviction import Counts, LeastStale, Now, Scored, Uses
from emoe.routing.trace import id_dtype, missing_id


class LiveScores:
    """The scores of the running pass."""

    def __init__(self, scorer: UseScorer, shape: RoutingShape) -> None:
        """Start before the first prompt."""
        self.scorer = scorer
        self.version = 0
        """Changes whenever scores may."""
        self.active = True
        """False: the scorer is neither told nor asked, and evictions go by least-stale."""
        self.spent_s = 0.0
        """What telling and asking took so far."""
        self.contests: dict[int, tuple[Contest, int]] = {}
        """By rank: the contest of the layer's bank, and which of its layers it is."""
        self._by_layer = scorer if isinstance(scorer, LayerScorer) else None
        dtype = id_dtype(shape.experts)
        self._missing = missing_id(dtype)
        self._running = np.full((shape.layers, shape.top_k), self._missing, dtype=dtype)
        self._single = False
        self._routed = -1
        self._whole: Array | None = None
        self._rows: dict[int, Array] = {}

    def begin_prompt(self, task: str | None) -> None:
        """A prompt of this task starts (None: unknown, or several)."""
        self.scorer.begin_prompt(task)
        self._forget()

    def begin_pass(self, tokens: int) -> None:
        """A pass over so many tokens starts. Of a single token the layers' own routes are looked at as they come."""
        self._single = tokens == 1 and self.active
        if self._single:
            for contest in {id(contest): contest for contest, _ in self.contests.values()}.values():
                contest.begin_token()
        self._routed = -1
        self._running[:] = self._missing
        self._forget()

    def route(self, rank: int, ids: Array) -> None:
        """The running token was routed to `ids` [k] in this layer."""
        if not self._single:
            return
        self._running[rank, : len(ids)] = ids
        self._routed = rank
        if rank in self.contests:
            contest, layer = self.contests[rank]
            used = np.zeros((1, contest.experts), dtype=bool)
            used[0, ids] = True
            contest.visit(np.array([layer]), used, lambda: self.of_layer(rank)[None, : contest.experts])

    def observe(self, routes: Array, weights: Array | None, token_ids: Array | None) -> None:
        """The pass has ended: its tokens' routes [tokens, layers, k], weights and ids."""
        if len(routes) and self.active:
            start = time.perf_counter()
            self.scorer.observe(routes, weights, token_ids)
            self.spent_s += time.perf_counter() - start
            self._forget()

    def spared_loads(self) -> int:
        """Loads that plain recency would have made beyond those of the scores, as far as contests counted."""
        contests = {id(contest): contest for contest, _ in self.contests.values()}.values()
        return sum(contest.made[RECENCY] - contest.made[SCORES] for contest in contests)

    def of_layer(self, rank: int) -> Array:
        """float32 [experts]: scores of one layer now."""
        start = time.perf_counter()
        row = self._of_layer(rank)
        self.spent_s += time.perf_counter() - start
        return row

    def _of_layer(self, rank: int) -> Array:
        if self._single and self._by_layer is not None and rank == self._routed:
            if rank not in self._rows:
                self._rows[rank] = self._by_layer.scores_at(rank, self._running)
            return self._rows[rank]
        if self._whole is None:
            self._whole = self.scorer.scores()
        row: Array = self._whole[rank]
        return row

    def _forget(self) -> None:
        self._whole = None
        self._rows.clear()
        self.version += 1


class LiveScored(Scored):
    """The eviction rule of one bank: values are brought up to date for the layers that an eviction is about."""

    def __init__(self, scores: LiveScores, ranks: Sequence[int], experts: Sequence[int], quotas: Sequence[int]) -> None:
        """Make the rule.

        Args:
            scores: where values come from.
            ranks: of the bank's layers among all MoE layers, ascending.
            experts: how many each layer has.
            quotas: slots of each layer; all 0 where they share the bank.
        """
        super().__init__(scores.scorer.name, sum(experts))
        self._plain = LeastStale()
        self.contest: Contest | None = None
        if self.name in CONTESTED and all(quotas) and len(set(experts)) == 1:
            self.contest = Contest(quotas, experts[0])
            scores.contests.update({rank: (self.contest, layer) for layer, rank in enumerate(ranks)})
        self._scores = scores
        self._ranks = list(ranks)
        ends = np.cumsum([0, *experts]).tolist()
        self._parts = [slice(start, end) for start, end in pairwise(ends)]
        self._fresh: dict[int, tuple[int, bool]] = {}

    def score(self, past: Uses, now: Now) -> Counts:
        """Score by what was observed before the running pass and, for one token, by its own routes so far; by the last
        use alone while that loads less."""
        if not self._scores.active:
            return self._plain.score(past, now)
        if self.contest is not None and self.contest.lead == RECENCY:
            return past.last_tick
        for layer in np.unique(past.rank).tolist():
            state = self._scores.version, layer == now.layer_rank
            if self._fresh.get(layer) != state:
                self._fresh[layer] = state
                part = self._parts[layer]
                self.values[part] = self._scores.of_layer(self._ranks[layer])[: part.stop - part.start]
        return super().score(past, now)
