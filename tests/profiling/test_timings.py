"""Loads are timed through the reader and the loader; answers' times are averaged by token."""

from __future__ import annotations

from typing import Any

import pytest

from emoe.model.bind import binding_of
from emoe.profiling.running import Answer
from emoe.profiling.timings import _Slots, measure_timings


def test_times_are_of_the_fastest_tenth_and_loads_take_their_bytes(loaded: Any) -> None:
    model, _ = loaded
    slow = [Answer([1, 2, 3], True, 9.0, 9.0)] * 18
    answers = [Answer([1, 2, 3], False, 0.5, 0.2), Answer([1, 2], False, 0.4, 0.3), *slow, Answer([1], False, 0.1, 0.0)]
    timings = measure_timings(model, [10, 4, *[1] * 18, 1], answers, loads=8)
    assert timings.prefill_token_s == pytest.approx(0.1)  # the third fastest of 21
    assert timings.token_s == pytest.approx(4.5)  # the third fastest of 20
    timings = measure_timings(model, [10, 4], answers[:2], loads=8)
    assert timings.token_s == pytest.approx(0.1)
    assert timings.load_bytes_per_s is not None
    assert timings.load_bytes_per_s > 0
    assert timings.expert_load_s is not None
    assert timings.expert_load_s > 0
    assert (timings.reader, timings.device) == (binding_of(model).reader.kind, "cpu")


def test_without_decoding_there_is_no_time_for_a_token(loaded: Any) -> None:
    model, _ = loaded
    assert measure_timings(model, [3], [Answer([1], False, 0.5, 0.0)], loads=3).token_s is None


def test_the_scratch_slots_get_the_experts_own_weights(loaded: Any) -> None:
    """The model's own slots are left alone."""
    model, _ = loaded
    binding = binding_of(model)
    slots = _Slots(binding)
    pool = binding.pools[0]
    loads = pool.table.counters[0].loads
    nbytes = binding.loader.wait(slots.start((0, 3), 1))
    assert nbytes == binding.index.stored_nbytes(0, 3)
    resident = pool.table.find((0, 3))
    assert resident is not None
    scratch = slots._scratch[0][0]
    for name, view in pool.bank.views[resident].items():
        assert scratch.views[1][name].equal(view)
    assert pool.table.counters[0].loads == loads
