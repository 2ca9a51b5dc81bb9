"""Fitting a trace to a shape: which tokens, which layers, and what is left of reuse distances."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe.bench.plant.resample import Routes, first_tokens, fit, layer_sets, merged, read_trace
from emoe.bench.plant.shapes import PUBLISHED
from emoe.bench.shapes import Shape
from emoe.errors import UsageError
from emoe.routing.trace import Array, missing_id
from tests.bench.plant.made_up import made_up_trace


def a_shape(layers: int, experts: int, k: int) -> Shape:
    return replace(PUBLISHED["tiny-qwen3-moe"], layers=layers, experts=experts, top_k=k)


def distances(experts: Array, prompts: tuple[tuple[int, int], ...] | None = None) -> Counter[int]:
    """Tokens between two uses of one expert [tokens, k]: how often each distance; within `prompts` only, if given."""
    found: Counter[int] = Counter()
    for start, end in prompts or ((0, len(experts)),):
        last: dict[int, int] = {}
        for token in range(start, end):
            for expert in experts[token].tolist():
                if expert in last:
                    found[token - last[expert]] += 1
                last[expert] = token
    return found


def assert_routes(routes: Routes, shape: Shape, tokens: int) -> None:
    """k different experts of the shape everywhere, the best first."""
    assert routes.experts.shape == (tokens, len(shape.moe_layers), routes.top_k)
    assert int(routes.experts.max()) < shape.experts
    ordered = np.sort(routes.experts, axis=2)
    assert (ordered[:, :, 1:] != ordered[:, :, :-1]).all()
    assert routes.weights is not None
    assert (routes.weights[:, :, 1:] <= routes.weights[:, :, :-1]).all()
    assert (routes.weights > 0).all()


def test_a_trace_of_the_shape_is_taken_as_it_is() -> None:
    trace = made_up_trace(60, 5)
    routes = fit(trace, a_shape(3, 8, 2), 50, seed=0)
    assert not routes.resampled
    assert np.array_equal(routes.experts, trace.experts[:50, :3])
    assert routes.prompts == ((0, 20), (20, 40), (40, 50))
    assert routes.kept == "every route as recorded"


def test_fewer_experts_per_token_than_the_shape_has_are_planted_as_recorded() -> None:
    routes = fit(made_up_trace(60, 3, 8, 2), a_shape(3, 8, 4), 50, seed=0)
    assert routes.top_k == 2
    assert routes.kept == "every route as recorded; 2 of 4 experts per token, as recorded"


@settings(max_examples=40)
@given(
    experts=st.integers(2, 12),
    k=st.integers(1, 3),
    together=st.integers(2, 3),
    layers=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_side_by_side_every_reuse_distance_is_kept(experts: int, k: int, together: int, layers: int, seed: int) -> None:
    k = min(k, experts)
    trace = made_up_trace(40, 6, experts, k, seed=seed)
    shape = a_shape(layers, together * experts, together * k)
    routes = fit(trace, shape, 40, seed)
    assert_routes(routes, shape, 40)
    assert routes.kept.endswith("every reuse distance is kept")
    recorded = [distances(trace.experts[:, layer]) for layer in range(6)]
    for layer, chosen in enumerate(layer_sets(6, together, layers)):
        assert distances(routes.experts[:, layer]) == sum((recorded[one] for one in chosen), Counter())


@settings(max_examples=30)
@given(factor=st.sampled_from([1.5, 2, 3]), prompts=st.integers(1, 4), seed=st.integers(0, 1000))
def test_split_experts_keep_every_distance_within_prompts(factor: float, prompts: int, seed: int) -> None:
    trace = made_up_trace(48, 4, 8, 2, prompts, seed)
    shape = a_shape(4, int(8 * factor), 2)
    routes = fit(trace, shape, 48, seed)
    assert_routes(routes, shape, 48)
    assert routes.resampled
    for layer in range(4):
        kept = distances(routes.experts[:, layer], routes.prompts)
        assert kept == distances(trace.experts[:, layer], routes.prompts)
    assert (np.unique(routes.experts).size > 8) or prompts == 1


@settings(max_examples=30)
@given(experts=st.integers(3, 9), k=st.integers(1, 3), seed=st.integers(0, 1000))
def test_any_shape_gets_k_different_experts(experts: int, k: int, seed: int) -> None:
    shape = a_shape(2, experts, min(k, experts))
    routes = fit(made_up_trace(30, 5, 8, 2, seed=seed), shape, 30, seed)
    assert_routes(routes, shape, 30)
    again = fit(made_up_trace(30, 5, 8, 2, seed=seed), shape, 30, seed)
    assert np.array_equal(routes.experts, again.experts)


def test_experts_that_go_together_are_not_merged() -> None:
    ids = np.array([[0, 1], [2, 3]] * 10)  # 0 and 1 always together, 2 and 3 too
    group = merged(ids, 4, 2)
    assert sorted(np.bincount(group)) == [2, 2]
    assert group[0] != group[1]
    assert group[2] != group[3]


def test_olmoe_of_gpt_oss_follows_its_layers_in_order() -> None:
    assert list(layer_sets(24, 2, 16)) == [(layer, layer + 8) for layer in range(16)]
    sets = {tuple(sorted(chosen)) for chosen in layer_sets(24, 2, 48)}
    assert len(sets) == 48


def test_layers_are_not_repeated() -> None:
    with pytest.raises(UsageError, match=r"3 recorded layers, 2 at a time, make 3 layers .* and 4 are needed"):
        list(layer_sets(3, 2, 4))
    with pytest.raises(UsageError, match=r"the trace has 2 layers and tiny-qwen3-moe has 3 with experts.*--layers"):
        fit(made_up_trace(20, 2, 8, 2), a_shape(3, 8, 2), 20, seed=0)


def test_loops_are_skipped_and_the_last_prompt_is_cut() -> None:
    trace = made_up_trace(60, prompts=4)
    trace = replace(trace, prompts=({}, {"repetition": True}, {"repetition": False}, {}))
    rows, prompts = first_tokens(trace, 40)
    assert prompts == ((0, 15), (15, 30), (30, 40))
    assert rows.tolist() == [*range(15), *range(30, 55)]
    with pytest.raises(UsageError, match="45 tokens in prompts that do not loop; ask for at most 45"):
        first_tokens(trace, 46)


def test_routes_that_were_not_recorded_repeat_the_next_token_that_has_them() -> None:
    trace = made_up_trace(20)
    experts = trace.experts.copy()
    experts[3:6, 1] = missing_id(experts.dtype)
    experts[19, 1] = missing_id(experts.dtype)
    routes = fit(replace(trace, experts=experts), a_shape(3, 8, 2), 20, seed=0)
    assert (routes.experts[3:6, 1] == trace.experts[6, 1]).all()
    assert (routes.experts[19, 1] == trace.experts[18, 1]).all()
    assert "6.7% of routes, not recorded, repeat a neighbouring token's" in routes.kept
    assert fit(replace(trace, experts=experts), a_shape(1, 8, 2), 20, seed=0).kept == "every route as recorded"
    experts[:, 2] = missing_id(experts.dtype)
    with pytest.raises(UsageError, match="no complete route of layer 2"):
        fit(replace(trace, experts=experts), a_shape(3, 8, 2), 20, seed=0)


@pytest.mark.parametrize("tokens", [0, 65])
def test_more_tokens_than_the_hidden_size_are_refused(tokens: int) -> None:
    with pytest.raises(UsageError, match=rf"{tokens} tokens cannot .* of size 64; ask for 1 to 64 tokens"):
        fit(made_up_trace(80), a_shape(3, 8, 2), tokens, seed=0)


def test_a_trace_that_does_not_show_its_last_expert_is_of_the_shape(tmp_path: Path) -> None:
    """Foreign layouts do not say how many experts there are."""
    trace = made_up_trace(30, 3, 7, 2)
    assert trace.weights is not None
    np.savez(tmp_path / "trace.npz", sel=trace.experts, weights=trace.weights, phase=trace.phase)
    assert read_trace(tmp_path, a_shape(3, 8, 2)).num_experts == 8
    assert read_trace(tmp_path, a_shape(3, 64, 8)).num_experts == 7
    trace.write(tmp_path / "own.npz")
    assert read_trace(tmp_path / "own.npz", a_shape(3, 8, 2)).num_experts == 7
