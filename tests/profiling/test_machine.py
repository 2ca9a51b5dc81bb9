"""A machine's rates as numbers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.errors import UsageError
from emoe.profiling.machine import Machine

numbers = st.floats(1.0, 1e13)
by_threads = st.dictionaries(st.integers(1, 64), numbers, max_size=3)


@given(by_threads, st.dictionaries(st.sampled_from(["float32", "int8"]), by_threads), st.none() | numbers)
def test_what_is_kept_is_what_was_measured(memory: dict[int, float], flops: dict, rate: float | None) -> None:  # type: ignore[type-arg]
    made = Machine({"cpu": "x"}, memory_bytes_per_s=memory, flops=flops, h2d_pinned_bytes_per_s=rate, notes=("a",))
    assert Machine.from_dict(json.loads(json.dumps(made.as_dict()))) == made


def test_rates_are_the_best_of_up_to_so_many_threads() -> None:
    made = Machine({}, memory_bytes_per_s={2: 20.0, 8: 50.0}, flops={"float32": {1: 7.0}})
    assert [made.memory_rate(n) for n in (1, 2, 4, 8, 16)] == [20, 20, 20, 50, 50]
    assert Machine({}, memory_bytes_per_s={1: 30.0, 2: 20.0}).memory_rate(2) == 30
    assert made.compute_rate("bfloat16", 4) == 7.0
    with pytest.raises(UsageError, match="memory bandwidth was not measured"):
        Machine({}).memory_rate(1)
