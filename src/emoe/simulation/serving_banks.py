"""Which experts are resident while batches run: the engine's slots without bytes, fast enough for hours of traffic.

Two kinds of banks, as the engine makes them (`emoe.residency.budget.plan_slots`). A shared pool is followed slot by
slot, loads under way and slots that prefills pass through included: its misses are those of
`emoe.residency.pool.ExpertPool`. Quotas are followed for all layers at once, as `emoe.residency.table.ResidencyTable`
would with one load at a time, and a prefill passes by without touching what is resident, as with a lane. Property tests
hold both to their models.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emoe.prediction.protocol import RoutingShape
from emoe.residency.budget import PoolPlan
from emoe.residency.eviction import Eviction, Now, Uses

Array = NDArray[Any]

DEPTH = 4
"""Loads under way at once, as in a pool."""
_NEVER = np.iinfo(np.int64).max
_PASSING = -(1 << 62)
"""Below every rule's scores: slots that a prefill passes through are reused first."""


class Banks:
    """The experts of all MoE layers; `resident` is bool [layers, experts]."""

    def __init__(self, shape: RoutingShape, plan: PoolPlan, rule: Eviction) -> None:
        """Start empty. `plan`: one bank whose quotas are by layer rank 0, 1, ...; all zero: a shared pool."""
        self.shape, self._rule = shape, rule
        self._slots = plan.slots
        self._quotas = np.array([plan.quotas[rank] for rank in range(shape.layers)], dtype=np.int64)
        self._shared = not self._quotas.any()
        self._share = max(1, plan.slots // shape.layers)
        size = (shape.layers, shape.experts)
        keys = shape.layers * shape.experts
        self.resident: NDArray[np.bool_] = np.zeros(size, dtype=bool)
        self._flat = self.resident.reshape(-1)
        self._passing = np.zeros(keys, dtype=bool)
        self._most_passing = max(1, min(DEPTH, plan.slots))
        self._kept = [0] * shape.layers
        never = np.full(keys, -1, dtype=np.int64)
        # Quotas compare keys of one layer alone, whose rank says nothing.
        ranks = np.repeat(np.arange(shape.layers), shape.experts) if self._shared else np.zeros(keys, dtype=np.int64)
        self._past = Uses(never, never.copy(), np.zeros(keys, dtype=np.int64), ranks, np.arange(keys))
        self._pass = 0
        self._tick = 0
        self.everything = plan.slots >= keys

    def run(self, counts: Array, *, prefill: bool) -> int:
        """A pass of the model; the experts that it loaded.

        Args:
            counts: int [layers * experts], its tokens that each key was routed to.
            prefill: whether input was read in it.
        """
        self._pass += 1
        tokens = int(counts[: self.shape.experts].sum())
        alone = tokens <= self.shape.top_k  # one token: all its experts are there at once
        if self._shared:
            return self._run_shared(counts, prefill and not alone, alone)
        return self._run_quotas(counts.reshape(self.resident.shape), prefill and not alone, alone)

    # -- quotas ---------------------------------------------------------------------------------------------

    def _run_quotas(self, counts: Array, prefill: bool, alone: bool) -> int:
        used = counts > 0
        flat = used.reshape(-1)
        past = self._past
        past.last_pass[flat] = past.last_tick[flat] = self._pass
        past.uses += flat
        missing = used & ~self.resident
        each = missing.sum(axis=1)
        loads = int(each.sum())
        if not loads:
            return 0
        if prefill:
            self._fill_room(counts, missing)
            return loads
        layers, experts = self.resident.shape
        # A copy: a rule may return what it reads.
        score = np.array(self._rule.score(past, Now(self._pass, self._pass, 0, layers))).reshape(layers, experts)
        if alone:
            score = np.where(used, _NEVER, score)
        else:  # the last one loaded (fewest tokens, highest number) stays; the others are the rule's to keep
            order = np.where(missing, counts * experts - np.arange(experts), _NEVER)
            rows = np.flatnonzero(each)
            score[rows, order[rows].argmin(axis=1)] = _NEVER
        there = self.resident | missing
        ranked = np.where(there, score, -_NEVER).argsort(axis=1, kind="stable")
        stays = np.arange(experts)[None, :] >= experts - self._quotas[:, None]
        rows = np.arange(layers)[:, None]
        kept = np.zeros_like(self.resident)
        kept[rows, ranked] = stays
        self.resident[:] = kept & there
        return loads

    def _fill_room(self, counts: Array, missing: Array) -> None:
        """While a layer has room, a prefill makes residents: of most tokens first, then the lowest number."""
        room = self._quotas - self.resident.sum(axis=1)
        for layer in np.flatnonzero(room > 0).tolist():
            order = np.where(missing[layer], -counts[layer], _NEVER).argsort(kind="stable")
            self.resident[layer, order[: min(int(room[layer]), int(missing[layer].sum()))]] = True

    # -- a shared pool --------------------------------------------------------------------------------------

    def _run_shared(self, counts: Array, prefill: bool, alone: bool) -> int:
        experts = self.shape.experts
        loads = 0
        past = self._past
        for layer in range(self.shape.layers):
            start = layer * experts
            row = counts[start : start + experts]
            order = np.argsort(-row, kind="stable")[: np.count_nonzero(row)]
            if not order.size:
                continue
            self._tick += 1
            keys = order + start
            past.last_pass[keys] = self._pass
            past.last_tick[keys] = self._tick
            past.uses[keys] += 1
            if not prefill and self._passing[keys].any():
                self._keep(keys[self._passing[keys]], layer)
            there = self._flat[keys]
            missing = keys[~there].tolist()
            if missing:
                loads += len(missing)
                _Visit(self, layer, keys[there], missing, prefill, alone).run()
        return loads

    def _keep(self, keys: Array, layer: int) -> None:
        """Make passing experts ordinary residents."""
        self._passing[keys] = False
        self._kept[layer] += len(keys)

    def scores(self, layer: int) -> Array:
        """int64 [keys]: what is evicted first has the least, slots that a prefill passes through before all others."""
        now = Now(self._tick, self._pass, layer, self.shape.layers)
        order = np.where(self._flat, self._rule.score(self._past, now), _NEVER)
        if self._passing.any():
            order[self._passing & self._flat] += _PASSING
        return order

    @property
    def free(self) -> int:
        """Empty slots."""
        return self._slots - int(np.count_nonzero(self._flat))


class _Visit:
    """One layer's turn in a shared pool, load by load, as `ExpertPool.stream` and `take` do it."""

    def __init__(self, banks: Banks, layer: int, hits: Array, missing: list[int], prefill: bool, alone: bool) -> None:
        self._banks, self._layer, self._prefill, self._alone = banks, layer, prefill, alone
        self._hits = hits.tolist()
        self._missing = deque(missing)
        self._flights: deque[int] = deque()
        self._free = banks.free
        self._depth = len(missing) if alone else DEPTH
        self._order = banks.scores(layer)  # of what may be evicted now; _NEVER: nothing there, in use or under way
        self._score = self._order.copy()
        self._order[hits] = _NEVER

    def run(self) -> None:
        """Load everything that is missing."""
        self._fill()
        if self._alone:
            return
        for key in self._hits:
            self._order[key] = self._score[key]
            self._fill()
        while self._flights:
            key = self._flights.popleft()
            self._fill()
            self._order[key] = self._score_of(key)
            self._fill()

    def _score_of(self, key: int) -> int:
        """Of a key that was loaded in this visit: its score did not count while it was not there."""
        banks = self._banks
        past, at = banks._past, slice(key, key + 1)
        one = Uses(past.last_tick[at], past.last_pass[at], past.uses[at], past.rank[at], past.number[at])
        now = Now(banks._tick, banks._pass, self._layer, banks.shape.layers)
        return int(banks._rule.score(one, now)[0]) + (_PASSING if banks._passing[key] else 0)

    def _fill(self) -> None:
        banks = self._banks
        while self._missing and len(self._flights) < self._depth:
            room = self._free > 0 and banks._kept[self._layer] < banks._share
            passing = self._prefill and not room
            if not self._reserve(passing):
                return
            key = self._missing.popleft()
            banks._flat[key] = True
            if passing:
                banks._passing[key] = True
            else:
                banks._kept[self._layer] += 1
            self._flights.append(key)

    def _reserve(self, passing: bool) -> bool:
        banks, order = self._banks, self._order
        lowest = int(order.argmin())
        at = int(order[lowest])
        if passing and at >= _PASSING // 2:  # no passing slot is ready
            if np.count_nonzero(banks._passing) >= banks._most_passing:
                return False
        elif passing:
            self._evict(lowest)
            return True
        if self._free:
            self._free -= 1
            return True
        if at == _NEVER:
            return False
        self._evict(lowest)
        return True

    def _evict(self, key: int) -> None:
        banks = self._banks
        banks._flat[key] = False
        self._order[key] = _NEVER
        if banks._passing[key]:
            banks._passing[key] = False
        else:
            banks._kept[key // banks.shape.experts] -= 1
