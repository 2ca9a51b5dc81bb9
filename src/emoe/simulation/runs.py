"""Policies x capacities over a trace, each beside Belady's rule on the same bank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from emoe.errors import UsageError
from emoe.prediction.protocol import RoutingShape
from emoe.routing.trace import Trace
from emoe.simulation import policies
from emoe.simulation.banks import Policy, Tally, serve, slots_for
from emoe.simulation.clock import Latency, Link, latency
from emoe.simulation.lookups import Lookups, Phases
from emoe.simulation.policies import Settings, make_policy
from emoe.simulation.shared import serve_shared

POOL = "@pool"
"""Ends the name of a policy whose layers share one bank."""

Report = Callable[[str, int, int], None]
"""Called now and then with (what runs, tokens done, tokens in all)."""


@dataclass(frozen=True, slots=True)
class Task:
    """What to simulate.

    Attributes:
        policies: names, those of a shared bank ending in "@pool".
        capacities: shares of each layer's experts.
        settings: how the policies run.
        phases: which tokens count.
        interleave: sequences at once.
        prompts: only the first so many prompts.
        expert_bytes: bytes of one expert, None where not known.
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

    def check(self) -> None:
        """Raises UsageError, before long work, for what cannot be meant."""
        if not self.policies or not self.capacities:
            raise UsageError("name at least one policy and one capacity.")
        for name in self.policies:
            policies.check(name.removesuffix(POOL))
            if name.endswith(POOL) and policies.plans(name.removesuffix(POOL)):
                raise UsageError(f"{name}: predictors plan for the banks of single layers: leave {POOL} out.")
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
    ratios: list[float] = field(default_factory=list)
    latencies: list[Latency] = field(default_factory=list)

    def add(self, lookups: int, tally: Tally, best: Tally, clock: Latency | None) -> None:
        """Count one run in."""
        self.lookups += lookups
        self.misses += tally.misses
        self.prefetches += tally.loads - tally.misses
        self.wasted += tally.wasted
        # Where Belady's rule loads nothing nobody else does: an empty bank misses every first use.
        self.ratios.append(tally.loads / best.loads)
        if clock is not None:
            self.latencies.append(clock)

    @property
    def loads(self) -> int:
        """Demand loads and prefetches."""
        return self.misses + self.prefetches

    @property
    def hit_rate(self) -> float:
        """Share of look-ups found."""
        return 1 - self.misses / self.lookups

    @property
    def belady_ratio(self) -> float:
        """Loads over those of Belady's rule, mean over splits."""
        return float(np.mean(self.ratios))

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
        raise UsageError(f"{prompts} prompts cannot be split into two halves.")
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
    note: policies.Note = lambda _: None,
) -> list[Row]:
    """Simulate over (scored trace, history or None) pairs, all of one shape; a row for each policy and capacity.

    Raises:
        UsageError: a policy or a number that cannot be meant, traces of different shapes.
    """
    task.check()
    shape = RoutingShape.of(runs[0][0])
    for scored, history in runs:
        for other in (scored, history):
            if other is not None and RoutingShape.of(other) != shape:
                raise UsageError(f"the traces are of different models: {RoutingShape.of(other)} and {shape}.")
    slots = [slots_for(capacity, shape) for capacity in task.capacities]
    rows = {
        (name, i): Row(name, capacity, slots[i]) for name in task.policies for i, capacity in enumerate(task.capacities)
    }
    for scored, history in runs:
        lookups = Lookups.of(scored, phases=task.phases, interleave=task.interleave, prompts=task.prompts)
        count = lookups.count
        best: dict[bool, list[Tally]] = {}
        for name in task.policies:
            pool = name.endswith(POOL)
            if pool not in best:
                best[pool] = _tallies("belady" + POOL * pool, lookups, slots, task, None, report, note)
            plain = name.removesuffix(POOL) == "belady"
            tallies = best[pool] if plain else _tallies(name, lookups, slots, task, history, report, note)
            for i, tally in enumerate(tallies):
                clock = None
                if task.link is not None and task.expert_bytes is not None:
                    clock = latency(lookups, tally, task.link, task.expert_bytes)
                rows[name, i].add(count, tally, best[pool][i], clock)
    return list(rows.values())


def _tallies(
    name: str,
    lookups: Lookups,
    slots: Sequence[int],
    task: Task,
    history: Trace | None,
    report: Report | None,
    note: policies.Note,
) -> list[Tally]:
    """One policy at every capacity."""
    told = None if report is None else lambda done, total: report(name, done, total)
    bare = name.removesuffix(POOL)

    def made() -> Policy:
        return make_policy(bare, lookups.shape, task.settings, history, note)

    if bare == name:
        return serve(lookups, slots, made(), told)
    return [serve_shared(lookups, each, made(), told) for each in slots]
