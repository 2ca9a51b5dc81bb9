"""What the engine counts: steps, tokens, and who wanted which experts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from emoe.engine.accounting import Accounting, StepUse
from emoe.engine.batching import Slice
from emoe.engine.interface import EngineStats
from emoe.engine.tickets import Ticket
from emoe.model.bind import Binding
from emoe.model.passes import Pass
from emoe.scheduling.costs import Step
from emoe.tasks.keywords import OTHER

Array = npt.NDArray[Any]


class Measures:
    """Counters since the engine was made. Written by its thread, read by any."""

    def __init__(self, binding: Binding) -> None:
        """Start at zero; the pools' own counters may have begun before, with `generate()`."""
        self._binding = binding
        index, self._layers = binding.index, sorted(binding.runtime.layers)
        self._nbytes = {layer: index.stored_nbytes(layer, 0) for layer in self._layers}
        self._accounting = Accounting(binding.runtime.layers, self._nbytes)
        self.preemptions = 0
        self._steps = self._prompt_tokens = self._generation_tokens = 0
        self._busy_s = 0.0
        self._departures = 0
        self._wanted = self._planned = 0
        self._tickets: list[Ticket] = []
        self._by_task: dict[str, Array] = defaultdict(lambda: np.zeros((4, len(self._layers)), dtype=np.int64))
        self._begun = self._now = self._totals()
        self._unused = self._unused_prefetches()

    # -- steps ----------------------------------------------------------------------------------------------

    def begin_step(self, tickets: Sequence[Ticket], now: Pass) -> None:
        """A step over these requests starts."""
        self._now = self._totals()
        self._tickets = list(tickets)
        self._accounting.begin(now)

    def observe(self, now: Pass, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """What a layer's router chose, before its experts are asked for."""
        self._accounting.observe(layer, ids)

    def loads_of_step(self) -> tuple[int, float]:
        """Experts loaded since the step began that were waited for, and the seconds waited for them.

        Of the loads, prefetches are not waited for, and of the misses, what is rerouted is not loaded.
        """
        loads, _, wait_s, misses = self._totals()
        return min(loads - self._now[0], misses - self._now[3]), wait_s - self._now[2]

    def end_step(self, step: Step, parts: Sequence[Slice]) -> None:
        """The step went well. What a preempted request reads again counts once."""
        self._steps += 1
        self._busy_s += step.seconds
        self._generation_tokens += sum(part.answers for part in parts)
        for ticket, part in zip(self._tickets, parts, strict=True):
            read = min(ticket.request.input_tokens, part.past + part.queries)
            self._prompt_tokens += max(0, read - ticket.read)
            ticket.read = max(ticket.read, read)
        planner = self._binding.ahead.planner
        use = self._accounting.end(None if planner is None else planner.planned)
        self._share_out(use)
        if use.planned is not None:
            self._planned += int(use.planned.sum())
            self._wanted += int(use.hits.sum() + use.misses.sum())

    def _share_out(self, use: StepUse) -> None:
        table = np.stack([use.hits, use.misses, use.loads, use.bytes, use.rerouted], axis=0).sum(axis=2)
        for ticket, (hits, misses, loads, nbytes, rerouted) in zip(self._tickets, table.T.tolist(), strict=True):
            used = ticket.used
            used.hits += hits
            used.misses += misses
            used.loads += loads
            used.bytes_loaded += nbytes
            used.rerouted += rerouted
        tasks = [ticket.request.task or OTHER for ticket in self._tickets]
        for task in dict.fromkeys(tasks):
            own = [row for row, each in enumerate(tasks) if each == task]
            self._by_task[task] += np.stack(
                [part[own].sum(axis=0) for part in (use.hits, use.misses, use.rerouted, use.routed)]
            )

    def end_request(self, ticket: Ticket) -> None:
        """A request has ended."""
        self._departures += 1

    # -- reading --------------------------------------------------------------------------------------------

    def seconds_per_departure(self) -> float:
        """How long it takes, about, until a request ends and one that waits is admitted; at least 1."""
        return max(1.0, self._busy_s / max(1, self._departures))

    def _totals(self) -> tuple[int, int, float, int]:
        """Loads, their bytes, seconds waited, misses."""
        counters = [c for pool in self._binding.pools for c in pool.table.counters.values()]
        wait_s = sum(pool.load_wait_s for pool in self._binding.pools)
        misses = sum(c.misses for c in counters)
        return sum(c.loads for c in counters), sum(c.bytes_read for c in counters), wait_s, misses

    def _unused_prefetches(self) -> dict[int, int]:
        return {layer: c.prefetches_unused for pool in self._binding.pools for layer, c in pool.table.counters.items()}

    def stats(self, running: int, waiting: int, kv_used: int, kv_tokens: int) -> EngineStats:
        """Everything, as one snapshot."""
        pools, ahead = self._binding.pools, self._binding.ahead
        loads, nbytes, wait_s, _ = self._totals()
        unused = {layer: n - self._unused[layer] for layer, n in self._unused_prefetches().items()}
        by_task = {task: counts.copy() for task, counts in self._by_task.copy().items()}
        spent = ahead.spent()
        return EngineStats(
            running=running,
            waiting=waiting,
            kv_tokens_used=kv_used,
            kv_tokens=kv_tokens,
            steps=self._steps,
            busy_s=self._busy_s,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            preemptions=self.preemptions,
            hits={(task, rank): int(n) for task, c in by_task.items() for rank, n in enumerate(c[0])},
            misses={(task, rank): int(n) for task, c in by_task.items() for rank, n in enumerate(c[1])},
            rerouted_tokens={task: int(counts[2].sum()) for task, counts in by_task.items()},
            routed_tokens={task: int(counts[3].sum()) for task, counts in by_task.items()},
            loads=loads - self._begun[0],
            bytes_loaded=nbytes - self._begun[1],
            load_wait_s=wait_s - self._begun[2],
            prefetches_unused=sum(unused.values()),
            prefetch_bytes_unused=sum(n * self._nbytes[layer] for layer, n in unused.items()),
            resident_bytes=sum(pool.table.occupied * pool.bank.slot_nbytes for pool in pools),
            budget_bytes=self._binding.plan.budget_bytes,
            predictor_calls=spent.calls,
            predictor_s=spent.seconds,
            predictor_hit_rate=self._planned / self._wanted if self._wanted else None,
            plans=0 if ahead.planner is None else ahead.planner.plans,
        )
