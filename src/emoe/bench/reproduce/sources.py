"""Whose routes an experiment looks at: the model's own, and those of every other model whose trace was given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emoe.bench.reproduce.keeping import routes_digest
from emoe.bench.reproduce.workbench import Workbench
from emoe.errors import UsageError
from emoe.prediction.scoring import halves, sides
from emoe.routing.counts import PromptCounts
from emoe.routing.trace import Trace

LEAST_PROMPTS = 4
COUNTED_PROMPTS = (50, 400)
"""Prompts on each side of a file of counts, which may hold thousands: quick, and in full."""


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Routes of one model. learn, score: prompts to learn from and to score; ordered: False where only counts are
    known, so that which experts one token took together is made up; digest: for the keys of cells."""

    name: str
    learn: Trace
    score: Trace
    ordered: bool
    digest: str


def sources(bench: Workbench, ordered: bool = False, seed: int | None = None) -> list[Source]:
    """The model's own routes, and random halves of each trace's prompts, prompts in random order.

    ordered: only those that know each token's experts; seed: of halves and order, the run's by default.

    Raises:
        UsageError: a trace with too few prompts to compare.
    """
    seed = bench.settings.seed if seed is None else seed
    others = [found for name in bench.traces if (found := _halved(bench, name, seed)).ordered or not ordered]
    learn, score = sides(bench.recorded("score")[0], bench.recorded("learn")[0], seed, in_order=False)
    return [Source(bench.name, learn, score, True, "own"), *others]


def left_out(bench: Workbench, what: str = "") -> tuple[str, ...]:
    """A note for each trace that `sources(ordered=True)` leaves out, or of which only `what` is."""
    return tuple(
        f"{name} is left out{f' of {what}' if what else ''}: its file counts tokens by prompt, and "
        "does not hold which experts a token took together."
        for name, routes in bench.traces.items()
        if isinstance(routes, PromptCounts)
    )


def enough(bench: Workbench, name: str) -> None:
    """Refuse a trace with too few prompts to compare.

    Raises:
        UsageError: with what to do.
    """
    routes = bench.traces[name]
    if routes.num_prompts < LEAST_PROMPTS:
        raise UsageError(
            f"the trace {name} holds {routes.num_prompts} prompts, and comparing needs at least {LEAST_PROMPTS}: leave "
            f"out --trace {name}=..., or record more."
        )


def _halved(bench: Workbench, name: str, seed: int) -> Source:
    enough(bench, name)
    routes = bench.traces[name]
    digest = routes_digest(routes)
    learn, score = halves(routes.num_prompts, seed)
    if isinstance(routes, PromptCounts):
        most = bench.pick(*COUNTED_PROMPTS)
        made = [routes.select(part[:most]).as_trace(seed) for part in (learn, score)]
        return Source(name, made[0], made[1], False, digest)
    return Source(name, routes.select(learn), routes.select(score), True, digest)


def by_task(trace: Trace, seed: int) -> Sequence[int]:
    """Prompt numbers, one task after another, in random order within a task."""
    order = np.random.default_rng(seed).permutation(trace.num_prompts)
    found: list[int] = order[np.argsort(trace.task[order], kind="stable")].tolist()
    return found


def mixed(trace: Trace, seed: int) -> Sequence[int]:
    """Prompt numbers in random order."""
    found: list[int] = np.random.default_rng(seed).permutation(trace.num_prompts).tolist()
    return found
