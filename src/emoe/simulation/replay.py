"""A recorded run once more through the engine's own pool, with slots that hold no bytes, on a virtual clock.

Passes are the trace's steps: a pass of one token takes its experts at once, any other streams them, as in
`emoe.model.runtime`. The hits, misses and loads are those of the engine that recorded the trace, given the same slots
and eviction rule (mode `exact`, no prefetching). One thing a trace does not hold: padding, whose tokens the engine
routes too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from emoe.config import ExpertMemory
from emoe.errors import UsageError
from emoe.prediction.live import LiveScored, LiveScores
from emoe.prediction.protocol import RoutingShape, UseScorer
from emoe.residency.budget import LayerNeed, PoolPlan, SlotPlan, plan_slots
from emoe.residency.eviction import Eviction, Scored
from emoe.residency.loader import Loader
from emoe.residency.retention import kept_after
from emoe.residency.table import LayerCounters, ResidencyTable
from emoe.routing.trace import FINAL_LAYER, PREFILL, Array, Trace
from emoe.simulation.clock import Link


@dataclass(frozen=True, slots=True)
class Replay:
    """What the engine would have counted.

    Attributes:
        layers: hits, misses, loads, bytes and tokens by decoder layer.
        seconds: the virtual clock at the end: loads one after another, and layers computing.
        slots: over all banks.
    """

    layers: dict[int, LayerCounters]
    seconds: float
    slots: int

    def total(self, name: str) -> int:
        """The sum of a counter over layers."""
        return sum(int(getattr(each, name)) for each in self.layers.values())


def plan_of(trace: Trace, share: float, rule: Eviction | None = None, expert_bytes: int = 1) -> SlotPlan:
    """The slots that the engine would make of a budget of this share of all experts, under this rule (None: a scorer).

    Raises:
        BudgetError: the share is below one token's experts of one layer.
    """
    needs = [LayerNeed(layer, trace.num_experts, trace.top_k, expert_bytes) for layer in trace.layers.tolist()]
    return plan_slots(ExpertMemory("share", share), needs, shared_from=(rule or Scored).shared_from)


def replay(
    trace: Trace,
    plan: SlotPlan,
    make_rule: Callable[[], Eviction] | None = None,
    *,
    scorer: UseScorer | None = None,
    experts: Mapping[int, int] | None = None,
    link: Link | None = None,
    passed: Callable[[bool, list[LayerCounters]], None] | None = None,
) -> Replay:
    """Serve a trace's passes in the order in which they ran.

    Args:
        trace: as recorded by `emoe.load(..., trace=...)`.
        plan: the engine's slots.
        make_rule: returns a new eviction rule for each bank; or else
        scorer: scores the experts of all banks. It is told of prompts and passes as the engine tells its own.
        experts: experts of each decoder layer (default: the trace's number for all).
        link: what loads and layers take; without one the clock stands still.
        passed: called after each pass with whether it read a prompt, and what the layers have counted so far.

    Raises:
        UsageError: both or neither of a rule and a scorer are given.
        BudgetError: the slots do not hold one token's experts.
    """
    if make_rule is not None and scorer is not None:
        raise UsageError("a replay evicts by a rule or by a scorer: give one of them.")
    from emoe.residency.pool import ExpertPool  # here: it imports torch

    clock = _Clock(link)
    live = None if scorer is None else LiveScores(scorer, RoutingShape.of(trace))
    loader = Loader(threads=0)  # every load is run by whoever waits for it
    pool_of: dict[int, ExpertPool] = {}
    pools: list[ExpertPool] = []
    for part in plan.pools:
        sizes = {layer: trace.num_experts if experts is None else experts[layer] for layer in part.quotas}
        # In place of a bank, an index and a reader: only what the pool asks of them.
        bank = SimpleNamespace(
            device=SimpleNamespace(type="cpu"), slot_nbytes=part.slot_nbytes, views=[{} for _ in range(part.slots)]
        )
        index = SimpleNamespace(path=trace.source.get("model", "a trace"), pieces=lambda layer, expert: ())
        nbytes = part.slot_nbytes
        reader = SimpleNamespace(read_into=lambda *_, size=nbytes: clock.load(size))
        rule = make_rule() if make_rule is not None else _live_rule(live, trace, sizes, part)
        table = ResidencyTable(part, sizes, rule)
        pool = ExpertPool(table, *cast(tuple[Any, Any, Any], (bank, index, reader)), loader)
        if plan.all_resident:
            pool.preload((layer, e) for layer, n in sorted(sizes.items()) for e in range(n))
        pools.append(pool)
        pool_of.update(dict.fromkeys(sizes, pool))
    layers = trace.layers.tolist()
    final = trace.source.get(FINAL_LAYER)  # the model's last layer, where of a prompt in a pass one token was run
    computed, prompt_of = trace.computed, trace.prompt_of_token()
    for rows in passes(trace):
        prefill = bool((trace.phase[rows] == PREFILL).any())
        behind = _behind(prompt_of[rows])
        if live is not None:
            _begin(live, trace, rows)
        for pool in pools:
            pool.table.begin_pass()
            pool.early.few = final
            if prefill:
                pool.early.open(len(rows))
        for rank, layer in enumerate(layers):
            known = computed[rows, rank]
            if live is not None and len(rows) == 1:
                live.route(rank, trace.experts[rows[0], rank][known[0]])
            routes, some = trace.experts[rows, rank], known.any(axis=1)
            filling: frozenset[int] = frozenset()
            if layer == final and behind.any():
                filling = _filling(pool_of[layer].table, layer, routes[some], behind[some])
                some &= behind == 0
            _serve(pool_of[layer], layer, routes[some], known[some], prefill, behind[some])
            if filling:
                pool_of[layer].fill(layer, filling)
            clock.compute(int(some.sum()))
        if live is not None:
            weights = None if trace.weights is None else trace.weights[rows]
            live.observe(trace.experts[rows], weights, None if trace.token_ids is None else trace.token_ids[rows])
        if passed is not None:
            passed(prefill, [pool_of[layer].table.counters[layer] for layer in layers])
    loader.close()
    counters = {layer: pool.table.counters[layer] for layer, pool in sorted(pool_of.items())}
    return Replay(counters, clock.now, plan.slots)


def _live_rule(live: LiveScores | None, trace: Trace, sizes: Mapping[int, int], part: PoolPlan) -> LiveScored:
    """The rule of a bank that holds these layers (layer -> experts), as the engine makes it."""
    if live is None:
        raise UsageError("a replay evicts by a rule or by a scorer: give one of them.")
    rank = {layer: number for number, layer in enumerate(trace.layers.tolist())}
    layers = sorted(sizes)
    experts, quotas = [sizes[layer] for layer in layers], [part.quotas[layer] for layer in layers]
    return LiveScored(live, [rank[layer] for layer in layers], experts, quotas)


def _begin(live: LiveScores, trace: Trace, rows: Array) -> None:
    """Announce the pass, and what prompt begins with it (as `emoe.model.scoring`)."""
    if np.isin(rows, trace.offsets[:-1]).any():
        prompts = np.searchsorted(trace.offsets, rows, side="right") - 1
        tasks = {trace.task_of(int(prompt)) for prompt in np.unique(prompts)}
        live.begin_prompt(tasks.pop() if len(tasks) == 1 else None)
    live.begin_pass(len(rows))


def passes(trace: Trace) -> Iterator[Array]:
    """The rows of each forward pass, in the order of passes; within one, in the trace's order."""
    order = trace.in_time()
    ends = np.flatnonzero(np.diff(trace.step[order])) + 1
    yield from np.split(order, ends) if len(order) else ()


def _behind(prompts: Array) -> Array:
    """int64 [tokens]: how many tokens of the same prompt come after each, where a prompt's tokens lie together."""
    starts = np.flatnonzero(np.diff(prompts, prepend=prompts[:1] - 1))
    sizes = np.diff(starts, append=len(prompts))
    found: Array = np.repeat(starts + sizes, sizes) - np.arange(len(prompts)) - 1
    return found


def _serve(pool: Any, layer: int, routes: Array, known: Array, prefill: bool, behind: Array) -> None:
    """One layer of one pass: routes [tokens, k], some of each `known` to be computed; `behind` as `_behind` has it."""
    tokens = len(routes)
    if not tokens:
        return
    pool.table.counters[layer].tokens += tokens
    if tokens == 1:
        pool.release(pool.take(layer, routes[known].tolist()))
        return
    counts = np.bincount(routes[known])
    chosen = np.flatnonzero(counts)
    by_count = chosen[np.argsort(-counts[chosen], kind="stable")].tolist()  # as Grouping.by_count
    staying = pool.table.staying(layer) if prefill and not pool.table.all_fit else 0
    keep = kept_after(routes, behind, pool.table.experts[layer], staying)
    for _ in pool.stream(layer, by_count, prefill=prefill, ahead=True, keep=keep):
        pass


def _filling(table: ResidencyTable, layer: int, routes: Array, behind: Array) -> frozenset[int]:
    """What the final layer, which runs some of a prompt's tokens, loads besides (`Runtime.filling`)."""
    if not table.below_quota(layer):
        return frozenset()
    return kept_after(routes, behind, table.experts[layer], table.share(layer))


class _Clock:
    def __init__(self, link: Link | None) -> None:
        self._link = link
        self.now = 0.0

    def load(self, nbytes: int) -> int:
        if self._link is not None:
            self.now += nbytes / self._link.bytes_per_s
        return nbytes

    def compute(self, tokens: int) -> None:
        if self._link is not None:
            self.now += tokens * self._link.layer_s
