"""Bindings: where misses are rerouted nothing is loaded, and the dial's two ends are the other two modes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.errors import UsageError
from emoe.prediction.protocol import Array, RoutingShape
from emoe.routing.trace import Trace
from emoe.simulation.bindings import EXACT, Binding
from emoe.simulation.generate import random_trace
from emoe.simulation.lookups import Lookups
from emoe.simulation.policies import Settings
from emoe.simulation.runs import Row, Task, simulate
from emoe.tasks.sensitivity import Sensitivity

SHAPE = RoutingShape(3, 8, 2)


def trace_of(seed: int, prompts: int = 4, tokens: int = 12) -> Trace:
    trace = random_trace(SHAPE, prompts * tokens, seed)
    return Trace(
        experts=trace.experts,
        phase=trace.phase,
        step=trace.step,
        offsets=np.arange(prompts + 1, dtype=np.int64) * tokens,
        task=np.arange(prompts, dtype=np.int32) % 2,
        tasks=("easy", "hard"),
        layers=trace.layers,
        num_experts=8,
        prompts=({},) * prompts,
    )


class Fixed(Sensitivity):
    """Sensitive in layer 1 of task hard, and where nothing is known."""

    def __init__(self) -> None:
        """Nothing was measured."""

    def sensitive(self, task: str | None, threshold: float | None = None, measure: str | None = None) -> Array:
        if threshold is not None:
            return np.full(3, threshold > 1)
        return np.array([False, task == "hard", False])


def rows_of(trace: Trace, binding: Binding, policy: str = "lru", p: int = 2) -> Row:
    return simulate([(trace, None)], Task([policy], [0.4], Settings(p), binding=binding))[0]


def literal_lru(trace: Trace, p: int, slots: int) -> tuple[int, int]:
    """(misses, rerouted) of LRU whose misses are loaded only in every p-th prompt, and in layer 1 of hard ones."""
    held: list[dict[int, int]] = [{} for _ in range(3)]
    misses = rerouted = clock = 0
    last: dict[tuple[int, int], int] = {}
    for prompt in range(trace.num_prompts):
        for row in range(int(trace.offsets[prompt]), int(trace.offsets[prompt + 1])):
            clock += 1
            for layer in range(3):
                wanted = [int(e) for e in trace.experts[row, layer]]
                missing = [e for e in wanted if e not in held[layer]]
                misses += len(missing)
                for expert in wanted:
                    last[layer, expert] = clock
                if prompt % p and not (layer == 1 and trace.task_of(prompt) == "hard"):
                    rerouted += len(missing)
                    continue
                for expert in missing:
                    if len(held[layer]) == slots:
                        gone = min((e for e in held[layer] if e not in wanted), key=lambda e: (last[layer, e], e))
                        del held[layer][gone]
                    held[layer][expert] = clock
    return misses, rerouted


@given(st.integers(0, 500), st.integers(1, 4))
def test_balanced_is_the_literal_rule(seed: int, p: int) -> None:
    trace = trace_of(seed)
    row = rows_of(trace, Binding("balanced", Fixed()), p=p)
    assert (row.misses, row.rerouted) == literal_lru(trace, p, row.slots)
    assert row.loads == row.misses - row.rerouted


@given(st.integers(0, 500), st.sampled_from(["lru", "decayed", "static"]))
def test_the_ends_of_the_dial_are_the_other_modes(seed: int, policy: str) -> None:
    trace = trace_of(seed)
    sensitivity = Fixed()
    low, high = (rows_of(trace, Binding("balanced", sensitivity, at), policy) for at in (0.0, 1.1))
    resident, exact = (rows_of(trace, Binding(mode), policy) for mode in ("resident", "exact"))
    assert (low.misses, low.rerouted, low.prefetches) == (resident.misses, resident.rerouted, resident.prefetches)
    assert (high.misses, high.rerouted, high.prefetches) == (exact.misses, 0, exact.prefetches)
    assert resident.loads <= exact.loads and resident.rerouted > 0


def test_a_lossy_row_says_so_and_has_no_ratio() -> None:
    row = rows_of(trace_of(1), Binding("resident")).as_dict(10)
    assert row["lossy"] is True and row["binding"] == "resident"
    assert row["belady_ratio"] is None and row["bytes_loaded"] == 10 * row["loads"]
    assert rows_of(trace_of(1), EXACT).as_dict(None)["lossy"] is False


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="give --profile"):
        Binding("balanced")
    for policy in ("belady", "lru@pool", "lru@engine"):
        with pytest.raises(UsageError, match="loads every miss"):
            rows_of(trace_of(0), Binding("resident"), policy)
    waits = Binding("balanced", Sensitivity.unknown(5)).waits(Lookups.of(trace_of(0)), None)
    assert waits is not None
    with pytest.raises(UsageError, match="knows 5 MoE layers and the trace has 3"):
        waits(1)
