"""The order in which look-ups are served."""

from __future__ import annotations

from itertools import zip_longest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.errors import UsageError
from emoe.routing.trace import DECODE, PREFILL, Trace
from emoe.simulation.lookups import NEVER, Lookups
from tests.simulation.stand_ins import make_trace, traces


def numbered(lengths: list[int], phase: list[int] | None = None) -> Trace:
    """One layer; token i is routed to expert i."""
    tokens = sum(lengths)
    return make_trace(np.arange(tokens).reshape(tokens, 1, 1), lengths, tokens, phase=phase)


def test_sequences_take_turns_and_one_that_ends_is_replaced() -> None:
    lookups = Lookups.of(numbered([3, 1, 2, 0, 2]), interleave=2)
    # prompt 0: 0 1 2; prompt 1: 3; prompt 2: 4 5; prompt 4: 6 7
    assert lookups.keys.ravel().tolist() == [0, 3, 1, 4, 2, 5, 6, 7]
    assert lookups.sequence.tolist() == [0, 1, 0, 2, 0, 2, 3, 3]
    assert [each.prompt for each in lookups.sequences] == [0, 1, 2, 4]
    assert [each.lane for each in lookups.sequences] == [0, 1, 1, 0]


@given(traces(), st.integers(1, 5))
def test_every_token_is_served_once_and_in_its_sequences_order(trace: Trace, lanes: int) -> None:
    lookups = Lookups.of(trace, interleave=lanes)
    assert len(lookups) == len(trace)
    assert lookups.count == int(trace.computed.sum())
    rank = np.arange(3)[:, None] * 6
    for number, sequence in enumerate(lookups.sequences):
        served = lookups.keys[lookups.sequence == number].reshape(-1, 3, 2)
        routes = trace.experts[sequence.rows]
        assert np.array_equal(served, np.where(routes == 255, lookups.nowhere, routes.astype(int) + rank))
        assert trace.task_of(sequence.prompt) == sequence.task
    begun = [int(np.flatnonzero(lookups.sequence == n)[0]) for n in range(len(lookups.sequences))]
    assert begun == sorted(begun)
    for a, b in zip(lookups.sequences, lookups.sequences[1:], strict=False):
        assert a.prompt < b.prompt
    for lane in range(lanes):
        numbers = lookups.sequence[[lookups.sequences[n].lane == lane for n in lookups.sequence]]
        assert (np.diff(numbers) >= 0).all(), "a lane serves one sequence after another"


@given(traces())
def test_the_next_use_is_the_next_token_that_looks_the_key_up(trace: Trace) -> None:
    lookups = Lookups.of(trace)
    found = lookups.next_use()
    for token, (keys, following) in enumerate(zip(lookups.keys.tolist(), found.tolist(), strict=True)):
        for key, use in zip_longest(keys, following):
            if key != lookups.nowhere:
                later = np.flatnonzero((lookups.keys[token + 1 :] == key).any(axis=1))
                assert use == (token + 1 + later[0] if later.size else NEVER)


def test_phases_and_the_first_prompts_alone() -> None:
    trace = numbered([3, 2], phase=[PREFILL, DECODE, DECODE, PREFILL, DECODE])
    assert Lookups.of(trace, phases="decode").keys.ravel().tolist() == [1, 2, 4]
    assert Lookups.of(trace, phases="prefill").keys.ravel().tolist() == [0, 3]
    assert Lookups.of(trace, prompts=1).keys.ravel().tolist() == [0, 1, 2]
    with pytest.raises(UsageError, match="no routed token in phase prefill"):
        Lookups.of(numbered([2]), phases="prefill")
    with pytest.raises(UsageError, match="of 2 tokens the trace holds no expert"):
        Lookups.of(make_trace(np.full((2, 1, 1), 255), [2], 4))


def test_an_expert_named_twice_for_a_token_is_looked_up_once() -> None:
    lookups = Lookups.of(make_trace([[[1, 1, 0]], [[2, 1, 2]]], [2], 4))
    assert lookups.keys.tolist() == [[1, 4, 0], [2, 1, 4]]
    assert lookups.count == 4
