"""Policies x capacities over a trace, each beside Belady's rule on the same bank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from emoe.config import Mode
from emoe.errors import UsageError
from emoe.prediction.protocol import RoutingShape
from emoe.prediction.registry import SCORERS, make_scorer
from emoe.prediction.schedule import make_schedule
from emoe.residency.eviction import EVICTION_RULES, make_eviction
from emoe.routing.trace import Trace
from emoe.simulation import policies
from emoe.simulation.banks import Policy, Tally, serve, slots_for
from emoe.simulation.bindings import EXACT, Binding
from emoe.simulation.clock import Latency, Link, latency
from emoe.simulation.learning import Note, Past
from emoe.simulation.lookups import Lookups, Phases
from emoe.simulation.policies import Settings, make_policy
from emoe.simulation.replay import Replay, plan_of, replay
from emoe.simulation.shared import serve_shared

POOL = "@pool"
"""Ends the name of a policy whose layers share one bank."""

ENGINE = "@engine"
"""Ends the name of a rule that is replayed through the engine's own pool: passes as recorded, prefills streamed."""

Report = Callable[[str, int, int], None]
"""Called now and then with (what runs, tokens done, tokens in all)."""


@dataclass(frozen=True, slots=True)
class Task:
    """What to simulate.

    Attributes:
        policies: names, those of a shared bank ending in "@pool", those of a replay in "@engine".
        capacities: shares of each layer's experts.
        settings: how the policies run.
        phases: which tokens count.
        interleave: sequences at once.
        prompts: only the first so many prompts.
        expert_bytes: bytes of one expert, None where not known.
        binding: what misses are bound to.
        link: the virtual clock's bandwidth and compute time, None without a clock.
    """

    policies: Sequence[str]
    capacities: Sequence[float]
    settings: Settings = field(default_factory=Settings)
    phases: Phases = "all"
    interleave: int = 1
    prompts: int | None = None
    expert_bytes: int | None = None
    link: Link | None = None
    binding: Binding = EXACT

    def check(self) -> None:
        """Raises UsageError, before long work, for what cannot be meant."""
        if not self.policies or not self.capacities:
            raise UsageError("name at least one policy and one capacity.")
        for name in self.policies:
            bare = name.removesuffix(POOL).removesuffix(ENGINE)
            policies.check(bare)
            if self.binding.lossy and (bare != name or bare == "belady"):
                raise UsageError(f"{name} loads every miss: it cannot run with the binding {self.binding.mode}.")
            if name.endswith(POOL) and policies.plans(bare):
                raise UsageError(f"{name}: predictors plan for the banks of single layers: leave {POOL} out.")
            if name.endswith(ENGINE):
                if bare not in EVICTION_RULES and bare not in SCORERS:
                    raise UsageError(f"{name}: the engine evicts by {', '.join((*EVICTION_RULES, *SCORERS))}.")
                if self.interleave != 1 or self.phases != "all" or self.prompts is not None:
                    raise UsageError(
                        f"{name} replays every pass as it was recorded: choose no phase, order or prompts."
                    )
        if self.link is not None and self.expert_bytes is None:
            raise UsageError("a bandwidth says nothing without the size of an expert: give --expert-bytes.")


@dataclass(slots=True)
class Row:
    """One policy at one capacity. Counts are sums over all splits, ratios and times means."""

    policy: str
    capacity: float
    slots: int
    lookups: int = 0
    misses: int = 0
    prefetches: int = 0
    wasted: int = 0
    rerouted: int = 0
    mode: Mode = "exact"
    ratios: list[float] = field(default_factory=list)
    latencies: list[Latency] = field(default_factory=list)

    def add(self, lookups: int, tally: Tally, best: Tally, clock: Latency | None) -> None:
        """Count one run in."""
        self.lookups += lookups
        self.misses += tally.misses
        rerouted = 0 if tally.rerouted is None else int(tally.rerouted.sum(dtype=np.int64))
        self.rerouted += rerouted
        self.prefetches += tally.loads - (tally.misses - rerouted)
        self.wasted += tally.wasted
        if self.mode == "exact":  # Belady's rule bounds the loads of those that load every miss
            self.ratios.append(tally.loads / best.loads)  # never of 0: an empty bank misses every first use
        if clock is not None:
            self.latencies.append(clock)

    def add_replay(self, done: Replay) -> None:
        """Count one replay in. What was loaded before the first pass, where everything fits, counts as prefetched."""
        self.slots = done.slots // len(done.layers)
        self.lookups += done.total("hits") + done.total("misses")
        self.misses += done.total("misses")
        self.prefetches += done.total("loads") - done.total("misses")

    @property
    def loads(self) -> int:
        """Demand loads and prefetches."""
        return self.misses - self.rerouted + self.prefetches

    @property
    def hit_rate(self) -> float:
        """Share of look-ups found."""
        return 1 - self.misses / self.lookups

    @property
    def belady_ratio(self) -> float | None:
        """Loads over those of Belady's rule, mean over splits; None where that rule has no such bank."""
        return float(np.mean(self.ratios)) if self.ratios else None

    def as_dict(self, expert_bytes: int | None) -> dict[str, Any]:
        """The row as `--json` prints it (docs/cli.md)."""
        values: dict[str, Any] = {
            "policy": self.policy,
            "capacity": self.capacity,
            "lookups": self.lookups,
            "misses": self.misses,
            "loads": self.loads,
            "hit_rate": self.hit_rate,
            "belady_ratio": self.belady_ratio,
            "bytes_loaded": None if expert_bytes is None else self.loads * expert_bytes,
            "wasted_prefetch_bytes": None if expert_bytes is None else self.wasted * expert_bytes,
            "binding": self.mode,
            "lossy": self.mode != "exact",
            "rerouted": self.rerouted,
            "prefetches": self.prefetches,
            "wasted_prefetches": self.wasted,
            "slots_per_layer": self.slots,
            "belady_ratios": self.ratios,
        }
        if self.latencies:
            for name in ("mean_s", "p50_s", "p95_s"):
                values[f"token_{name}"] = float(np.mean([getattr(each, name) for each in self.latencies]))
        return values


def halves(prompts: int, seed: int) -> tuple[list[int], list[int]]:
    """A random half of the prompts to learn from, and the other to score; each in the trace's own order.

    Raises:
        UsageError: there are fewer than two prompts.
    """
    if prompts < 2:
        raise UsageError(f"{prompts} prompts cannot be split into two halves: record at least two.")
    order = np.random.default_rng(seed).permutation(prompts)
    return np.sort(order[: prompts // 2]).tolist(), np.sort(order[prompts // 2 :]).tolist()


def without(trace: Trace, *, tasks: bool = False, token_ids: bool = False) -> Trace:
    """The trace with its task labels, or the ids of its tokens, hidden."""
    if tasks:
        trace = dataclasses.replace(trace, task=np.full_like(trace.task, -1), tasks=())
    if token_ids:
        trace = dataclasses.replace(trace, token_ids=None, prompt_token_ids=None, prompt_token_offsets=None)
    return trace


def simulate(
    runs: Sequence[tuple[Trace, Trace | None]],
    task: Task,
    report: Report | None = None,
    note: Note | None = None,
) -> list[Row]:
    """Simulate over (scored trace, history or None) pairs, all of one shape; a row for each policy and capacity.

    Raises:
        UsageError: a policy or a number that cannot be meant, traces of different shapes.
    """
    task.check()
    shape = RoutingShape.of(runs[0][0])
    for scored, history in runs:
        policies.check_history(task.policies, history)
        for other in (scored, history):
            if other is not None and RoutingShape.of(other) != shape:
                raise UsageError(f"the traces are of different models: {RoutingShape.of(other)} and {shape}.")
    slots = [slots_for(capacity, shape) for capacity in task.capacities]
    rows = {
        (name, i): Row(name, capacity, slots[i], mode=task.binding.mode)
        for name in task.policies
        for i, capacity in enumerate(task.capacities)
    }
    for scored, history in runs:
        lookups = Lookups.of(scored, phases=task.phases, interleave=task.interleave, prompts=task.prompts)
        count = lookups.count
        past = None if history is None else Past(history, task.settings.seed, note)
        best: dict[bool, list[Tally]] = {}
        for name in task.policies:
            if name.endswith(ENGINE):
                for i, capacity in enumerate(task.capacities):
                    rows[name, i].add_replay(
                        _replayed(name.removesuffix(ENGINE), scored, past, capacity, task.expert_bytes or 1)
                    )
                continue
            pool = name.endswith(POOL)
            if pool not in best:
                best[pool] = _tallies("belady" + POOL * pool, lookups, slots, task, None, report)
            plain = name.removesuffix(POOL) == "belady"
            tallies = best[pool] if plain else _tallies(name, lookups, slots, task, past, report)
            for i, tally in enumerate(tallies):
                clock = None
                if task.link is not None and task.expert_bytes is not None:
                    clock = latency(lookups, tally, task.link, task.expert_bytes)
                rows[name, i].add(count, tally, best[pool][i], clock)
    return list(rows.values())


def _replayed(name: str, trace: Trace, past: Past | None, capacity: float, expert_bytes: int) -> Replay:
    """One rule or scorer at one capacity, through the engine's pool."""
    if name in EVICTION_RULES:
        plan = plan_of(trace, capacity, make_eviction(name), expert_bytes)
        return replay(trace, plan, lambda: make_eviction(name))
    scorer = make_scorer(name, RoutingShape.of(trace))
    if past is not None:
        past.teach(name, scorer)
    return replay(trace, plan_of(trace, capacity, expert_bytes=expert_bytes), scorer=scorer)


def _tallies(
    name: str,
    lookups: Lookups,
    slots: Sequence[int],
    task: Task,
    past: Past | None,
    report: Report | None,
) -> list[Tally]:
    """One policy at every capacity."""
    told = None if report is None else lambda done, total: report(name, done, total)
    bare = name.removesuffix(POOL)

    def made() -> Policy:
        return make_policy(bare, lookups.shape, task.settings, past)

    if bare == name:
        every = None if policies.plans(bare) else make_schedule(task.settings.replan_prompts).horizon
        return serve(lookups, slots, made(), told, task.binding.waits(lookups, every) if name != "belady" else None)
    return [serve_shared(lookups, each, made(), told) for each in slots]
