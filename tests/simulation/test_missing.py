"""What a budget misses on a trace."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe.errors import UsageError
from emoe.prediction.protocol import RoutingShape
from emoe.routing.trace import Trace
from emoe.simulation.generate import random_trace
from emoe.simulation.missing import WINDOWS, after_prompt, distinct, first_tokens, like_model, missing


@pytest.fixture(scope="module")
def trace() -> Trace:
    return random_trace(RoutingShape(3, 8, 2), 120, seed=1)


def test_belady_misses_least_and_more_memory_misses_less(trace: Trace) -> None:
    found = missing(trace, [0.3, 0.5, 0.75, 1.0])
    assert [each.share for each in found] == [0.3, 0.5, 0.75, 1.0]
    for each in found:
        assert 0 <= each.belady <= each.policy <= 1
    assert [each.belady for each in found] == sorted((each.belady for each in found), reverse=True)
    assert found[-1].policy == 0
    assert found[0].policy > 0.4  # random routes


def test_a_trace_of_more_layers_fits_a_model_of_fewer(trace: Trace) -> None:
    fewer = like_model(trace, 2, 8, 2)
    assert fewer.experts.shape[1] == len(fewer.layers) == 2
    assert (fewer.experts == trace.experts[:, :2]).all()
    for shape in ((4, 8, 2), (3, 16, 2), (3, 8, 4)):
        with pytest.raises(UsageError, match="record one of this model"):
            like_model(trace, *shape)


@given(st.integers(1, 200))
def test_a_part_of_a_trace_has_whole_prompts(tokens: int) -> None:
    trace = random_trace(RoutingShape(1, 4, 1), 60, seed=2)
    part = first_tokens(trace, tokens)
    assert len(part) == trace.offsets[part.num_prompts]
    assert len(part) >= min(tokens, len(trace))


def test_distinct_experts_grow_with_the_window_up_to_all(trace: Trace) -> None:
    counts = [distinct(trace, tokens) for tokens in (1, 8, 120)]
    assert counts[0] == [2, 2, 2]
    assert all(a <= b for a, b in zip(counts[0], counts[1], strict=True))
    assert counts[2] == [8, 8, 8]


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_shares_that_cannot_be_are_refused(trace: Trace, share: float) -> None:
    with pytest.raises(UsageError, match="shares of experts"):
        missing(trace, [share])


def test_tokens_after_a_prompt_find_what_the_prompt_left() -> None:
    """Two layers, top-1, room for two of four experts each: counted by hand."""
    # A prompt of 3 uses experts 0, 1, 2; the two tokens after it want 2 and 3.
    routes = np.array([0, 1, 2, 2, 3], dtype=np.uint8)[:, None, None].repeat(2, axis=1)
    trace = random_trace(RoutingShape(2, 4, 1), 5)
    trace = dataclasses.replace(trace, experts=routes)
    found = after_prompt(trace, 0.5, prompt=3, new=2, policy="lru", ends_in_experts=True)
    assert found.prompt_loads[0] in (2.0, 3.0)
    assert found.prompt_loads[1] <= 1  # the last layer runs the prompt's last token alone
    assert found.miss_rate == found.waiting  # top-1: a token that misses waits
    assert 0.25 <= found.miss_rate <= 0.5  # all of it in the first layer
    whole = after_prompt(trace, 1.0, prompt=3, new=2)
    assert (whole.prompt_loads, whole.miss_rate, whole.waiting) == ((0.0, 0.0), 0.0, 0.0)


@given(share=st.sampled_from([0.25, 0.5, 0.75]), prompt=st.integers(1, 40), new=st.integers(1, 20))
@settings(max_examples=15, deadline=None)
def test_what_follows_a_prompt_stays_within_bounds(share: float, prompt: int, new: int) -> None:
    trace = random_trace(RoutingShape(2, 8, 2), 100)
    found = after_prompt(trace, share, prompt, new)
    assert 0 <= found.miss_rate <= found.waiting <= 1
    assert found.waiting <= 2 * found.miss_rate + 1e-12  # each that waits misses one of its two, or both
    assert all(0 <= loads <= 8 for loads in found.prompt_loads)
    assert WINDOWS > 0


def test_numbers_of_tokens_are_checked() -> None:
    with pytest.raises(UsageError, match="at least one token"):
        after_prompt(random_trace(RoutingShape(1, 4, 1), 5), 0.5, 0, 1)


def test_large_experts_pass_through_in_fewer_slots() -> None:
    """As in the engine, where slots to pass through are limited by their bytes: more of a prompt's experts stay."""
    trace = random_trace(RoutingShape(4, 64, 2), 600)
    small = after_prompt(trace, 0.5, prompt=200, new=20)
    large = after_prompt(trace, 0.5, prompt=200, new=20, expert_bytes=100 << 20)
    assert sum(large.prompt_loads) < sum(small.prompt_loads)
