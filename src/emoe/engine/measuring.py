"""What the engine counts: steps, tokens, and what the pools say."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from emoe.engine.batching import Slice
from emoe.engine.interface import EngineStats
from emoe.engine.tickets import Ticket
from emoe.model.bind import Binding
from emoe.model.runtime import Pass
from emoe.scheduling.costs import Step


class Measures:
    """Counters since the engine was made. Written by its thread, read by any."""

    def __init__(self, binding: Binding) -> None:
        """Start at zero; the pools' own counters may have begun before, with `generate()`."""
        self._binding = binding
        self.preemptions = 0
        self._steps = self._prompt_tokens = self._generation_tokens = 0
        self._busy_s = 0.0
        self._departures = 0
        self._loads, self._bytes, self._wait_s = self._begun = self._totals()
        self._now = self._begun

    def begin_step(self, tickets: Sequence[Ticket], parts: Sequence[Slice]) -> None:
        """A step over these requests starts."""
        self._now = self._totals()

    def observe(self, now: Pass, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """What a layer's router chose, before its experts are asked for."""

    def step_loads(self) -> int:
        """Experts loaded since the step began."""
        return self._totals()[0] - self._now[0]

    def step_wait_s(self) -> float:
        """Seconds waited for them."""
        return self._totals()[2] - self._now[2]

    def end_step(self, step: Step) -> None:
        """The step went well."""
        self._steps += 1
        self._busy_s += step.seconds
        self._prompt_tokens += step.prefill_tokens
        self._generation_tokens += step.decode_tokens

    def end_request(self, ticket: Ticket, now_s: float) -> None:
        """A request has ended."""
        self._departures += 1

    def seconds_per_departure(self) -> float:
        """How long it takes, about, until a request ends."""
        return max(1.0, self._busy_s / max(1, self._departures))

    def _totals(self) -> tuple[int, int, float]:
        counters = [c for pool in self._binding.pools for c in pool.table.counters.values()]
        wait_s = sum(pool.load_wait_s for pool in self._binding.pools)
        return sum(c.loads for c in counters), sum(c.bytes_read for c in counters), wait_s

    def stats(self, running: int, waiting: int, kv_used: int, kv_tokens: int) -> EngineStats:
        """Everything, as one snapshot."""
        pools = self._binding.pools
        loads, nbytes, wait_s = self._totals()
        index = self._binding.index
        unused = {layer: c.prefetches_unused for pool in pools for layer, c in pool.table.counters.items()}
        spent = self._binding.ahead.spent()
        planner = self._binding.ahead.planner
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
            hits={},
            misses={},
            rerouted_tokens={},
            routed_tokens={},
            loads=loads - self._begun[0],
            bytes_loaded=nbytes - self._begun[1],
            load_wait_s=wait_s - self._begun[2],
            prefetches_unused=sum(unused.values()),
            prefetch_bytes_unused=sum(n * index.stored_nbytes(layer, 0) for layer, n in unused.items()),
            resident_bytes=sum(pool.table.occupied * pool.bank.slot_nbytes for pool in pools),
            budget_bytes=self._binding.plan.budget_bytes,
            predictor_calls=spent.calls,
            predictor_s=spent.seconds,
            predictor_hit_rate=None,
            plans=0 if planner is None else planner.plans,
        )
