"""Predictors on per-prompt counts: how much of what a prompt uses lies in the set of experts that was planned for it.

With the order of tokens unknown there is nothing to evict. A plan holds the C experts of each layer with the largest
predicted shares; its hit share is the share of the prompt's look-ups that go to them. No plan of C experts for a whole
prompt can do better than the prompt's own C most used: the *best set*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from emoe.errors import UsageError
from emoe.prediction.protocol import RoutingShape
from emoe.prediction.registry import PREDICTORS, make_predictor
from emoe.routing.counts import PromptCounts
from emoe.routing.trace import Array, Trace
from emoe.simulation.asking import Asking
from emoe.simulation.banks import slots_for
from emoe.simulation.learning import Note, Past
from emoe.simulation.policies import Settings, check_history
from emoe.simulation.runs import Report

REPORT_PROMPTS = 50


@dataclass(slots=True)
class PlanRow:
    """One predictor at one capacity, summed over all splits."""

    policy: str
    capacity: float
    slots: int
    lookups: int = 0
    found: int = 0
    best: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of look-ups that went to planned experts."""
        return self.found / self.lookups

    @property
    def best_rate(self) -> float:
        """The same of the best set."""
        return self.best / self.lookups

    def as_dict(self) -> dict[str, Any]:
        """The row as `--json` prints it (docs/cli.md): what only an order of tokens gives is null."""
        return {
            "policy": self.policy,
            "capacity": self.capacity,
            "lookups": self.lookups,
            "misses": self.lookups - self.found,
            "loads": None,
            "hit_rate": self.hit_rate,
            "belady_ratio": None,
            "bytes_loaded": None,
            "wasted_prefetch_bytes": None,
            "slots_per_layer": self.slots,
            "best_set_hit_rate": self.best_rate,
        }


def check_predictors(names: Sequence[str]) -> None:
    """Raises UsageError where a policy is no predictor."""
    for name in names:
        if name not in PREDICTORS:
            raise UsageError(
                f"{name}: counts say nothing of the order of tokens, so only predictors can be judged on them: choose "
                f"from {', '.join(sorted(PREDICTORS))}."
            )


def plan_prompts(
    runs: Sequence[tuple[PromptCounts, PromptCounts | None]],
    names: Sequence[str],
    capacities: Sequence[float],
    settings: Settings,
    report: Report | None = None,
    note: Note | None = None,
) -> list[PlanRow]:
    """Judge predictors over (scored counts, history or None) pairs; a row for each predictor and capacity.

    A predictor is asked as `settings.replan_prompts` says, with the coming prompt's label. Until the first call,
    without a history, the plan is the experts with the lowest numbers.

    Raises:
        UsageError: a name that is no predictor's, or a capacity that cannot be meant.
    """
    check_predictors(names)
    first = runs[0][0]
    shape = RoutingShape(first.counts.shape[1], first.counts.shape[2], first.top_k)
    slots = [slots_for(capacity, shape) for capacity in capacities]
    rows = {(name, c): PlanRow(name, capacity, slots[c]) for name in names for c, capacity in enumerate(capacities)}
    for scored, history in runs:
        check_history(names, history)
        best = -np.sort(-scored.counts, axis=2)
        routes = scored.as_trace(settings.seed)
        past = None if history is None else Past(history.as_trace(settings.seed), settings.seed, note)
        for name in names:
            predictor = make_predictor(name, shape)
            if past is not None:
                past.teach(name, predictor)
            asking = Asking(predictor, shape, settings.replan_prompts, learned=past is not None)
            found = _found(asking, scored, routes, slots, name, report)
            for c, size in enumerate(slots):
                row = rows[name, c]
                row.lookups += int(scored.counts.sum())
                row.found += int(found[c])
                row.best += int(best[:, :, :size].sum())
    return list(rows.values())


def _found(
    asking: Asking,
    scored: PromptCounts,
    routes: Trace,
    slots: Sequence[int],
    name: str,
    report: Report | None,
) -> Array:
    """int64 [capacities]: look-ups that went to planned experts."""
    found = np.zeros(len(slots), dtype=np.int64)
    order = np.zeros(scored.counts.shape[1:], dtype=np.int64) + np.arange(scored.counts.shape[2])
    for prompt in range(scored.num_prompts):
        shares = asking.begins(prompt, scored.task_of(prompt))
        if shares is not None:
            order = np.argsort(-shares, axis=1, kind="stable")
        used = np.take_along_axis(scored.counts[prompt], order, axis=1)
        found += [int(used[:, :size].sum()) for size in slots]
        asking.ended(scored.task_of(prompt), routes.experts[routes.offsets[prompt] : routes.offsets[prompt + 1]])
        if report is not None and prompt % REPORT_PROMPTS == 0:
            report(name, prompt, scored.num_prompts)
    if report is not None:
        report(name, scored.num_prompts, scored.num_prompts)
    return found
