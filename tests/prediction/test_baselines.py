"""The simple predictors: the protocol's promises for all of them, and each against a literal version."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe.errors import UsageError
from emoe.prediction import matching
from emoe.prediction.counting import PromptCounter, pack_names, unpack_names
from emoe.prediction.popularity import PRIOR_PROMPTS, PROMPT_DECAY
from emoe.prediction.protocol import Predictor, RoutingShape, Trainable
from emoe.prediction.registry import make_predictor
from tests.prediction.histories import Array, random_routes, routes_by_task, trace_of

SIMPLE = ("static", "task-popularity", "previous-prompt", "decayed-prompt", "transitions", "moe-infinity")
SHAPE = RoutingShape(3, 8, 2)


def made(name: str, shape: RoutingShape = SHAPE) -> Any:
    return make_predictor(name, shape)


def random_prompts(seed: int, count: int, missing: float = 0.0) -> tuple[list[Array], list[str | None]]:
    rng = np.random.default_rng(seed)
    prompts = [random_routes(rng, SHAPE, int(rng.integers(0, 9)), missing) for _ in range(count)]
    tasks = [(None, "a", "b")[int(rng.integers(3))] for _ in range(count)]
    return prompts, tasks


def fed(name: str, prompts: list[Array], tasks: list[str | None], one_by_one: bool = False) -> Any:
    predictor = made(name)
    for routes, task in zip(prompts, tasks, strict=True):
        predictor.begin_prompt(task)
        for part in np.split(routes, len(routes)) if one_by_one and len(routes) else [routes]:
            predictor.observe(part)
    return predictor


def counts_of(routes: Array) -> Array:
    counts = np.zeros((SHAPE.layers, SHAPE.experts))
    for token in routes:
        for layer, experts in enumerate(token):
            for expert in experts:
                if expert < SHAPE.experts:
                    counts[layer, expert] += 1
    return counts


def to_k(amounts: Array) -> Array:
    rows = [row * SHAPE.top_k / row.sum() if row.sum() else np.full(8, SHAPE.top_k / 8) for row in amounts]
    return np.array(rows)


@pytest.mark.parametrize("name", SIMPLE)
def test_a_simple_predictor_keeps_the_protocol(name: str) -> None:
    predictor = made(name)
    assert isinstance(predictor, Predictor) and isinstance(predictor, Trainable)
    assert predictor.name == name
    np.testing.assert_array_equal(predictor.predict(None), SHAPE.uniform())
    np.testing.assert_array_equal(predictor.predict("never seen"), SHAPE.uniform())


@pytest.mark.parametrize("name", SIMPLE)
@settings(max_examples=25)
@given(seed=st.integers(0, 999), count=st.integers(1, 7), missing=st.sampled_from([0.0, 0.3, 1.0]))
def test_predictions_are_shares_whatever_the_pieces(name: str, seed: int, count: int, missing: float) -> None:
    prompts, tasks = random_prompts(seed, count, missing)
    whole, pieces = fed(name, prompts, tasks), fed(name, prompts, tasks, one_by_one=True)
    for task in (None, "a", "never seen"):
        shares = whole.predict(task)
        assert shares.shape == (3, 8) and shares.dtype == np.float64
        assert (shares >= 0).all()
        np.testing.assert_allclose(shares.sum(axis=1), SHAPE.top_k)
        np.testing.assert_array_equal(pieces.predict(task), shares)
        np.testing.assert_array_equal(whole.predict(task), shares, "predicting changes nothing")


@pytest.mark.parametrize("name", SIMPLE)
@settings(max_examples=15)
@given(seed=st.integers(0, 999), count=st.integers(0, 6), later=st.integers(0, 3))
def test_what_is_restored_predicts_the_same_from_then_on(name: str, seed: int, count: int, later: int) -> None:
    first, again = fed(name, *random_prompts(seed, count)), made(name)
    saved = {key: array.copy() for key, array in first.state().items()}
    assert all(array.dtype != object for array in saved.values())
    again.restore(first.state())
    for routes, task in zip(*random_prompts(seed + 1, later), strict=True):
        for predictor in (first, again):
            predictor.observe(routes)
            predictor.begin_prompt(task)
    for task in (None, "a", "b"):
        np.testing.assert_array_equal(again.predict(task), first.predict(task))
    unchanged = made(name)
    unchanged.restore(saved)
    assert unchanged.state().keys() == saved.keys()
    for key, array in unchanged.state().items():
        np.testing.assert_array_equal(array, saved[key], key)


@pytest.mark.parametrize("name", SIMPLE)
def test_a_state_stays_as_the_predictor_goes_on(name: str) -> None:
    predictor = fed(name, *random_prompts(5, 6))
    state = predictor.state()
    saved = {key: array.copy() for key, array in state.items()}
    for routes, task in zip(*random_prompts(6, 6), strict=True):
        predictor.begin_prompt(task)
        predictor.observe(routes)
    predictor.predict("a")
    for key, array in state.items():
        np.testing.assert_array_equal(array, saved[key], key)


@pytest.mark.parametrize("name", SIMPLE)
def test_a_history_is_the_same_as_having_seen_it(name: str) -> None:
    prompts, tasks = random_prompts(3, 9)
    fitted, lines = fed(name, *random_prompts(8, 4)), list[str]()
    fitted.fit(trace_of(SHAPE, prompts, tasks), seed=1, progress=lines.append)
    live = fed(name, prompts, tasks)
    live.begin_prompt(None)
    for task in (None, "a", "b"):
        np.testing.assert_array_equal(fitted.predict(task), live.predict(task))
    assert lines == [f"{name}: counted 9 prompts"]


@pytest.mark.parametrize("name", SIMPLE)
def test_another_models_history_routes_and_state_are_refused(name: str) -> None:
    other = RoutingShape(2, 8, 2)
    predictor = made(name)
    with pytest.raises(UsageError, match=f"{name} is made for RoutingShape"):
        predictor.fit(trace_of(other, [], []))
    with pytest.raises(UsageError, match="do not fit a model of 3 MoE layers"):
        predictor.observe(np.zeros((1, 2, 2), dtype=np.uint8))
    with pytest.raises(UsageError, match="it is of another model"):
        predictor.restore(made(name, other).state())
    for key in predictor.state():
        with pytest.raises(UsageError, match=f"of {name} lacks '{key}'"):
            predictor.restore({k: v for k, v in predictor.state().items() if k != key})


@pytest.mark.parametrize("name", SIMPLE)
def test_routes_may_be_overwritten_after_observing(name: str) -> None:
    rng = np.random.default_rng(0)
    routes = random_routes(rng, SHAPE, 5)
    predictor = made(name)
    predictor.observe(routes)
    routes[:] = 7
    np.testing.assert_array_equal(
        predictor.predict(None), fed(name, [random_routes(np.random.default_rng(0), SHAPE, 5)], [None]).predict(None)
    )


@pytest.mark.parametrize("name", [name for name in SIMPLE if name != "transitions"])
def test_counts_do_where_a_trace_holds_no_order(name: str) -> None:
    prompts, tasks = random_prompts(4, 6)
    counted = made(name)
    for routes, task in zip(prompts, tasks, strict=True):
        counted.begin_prompt(task)
        counted.observe_counts(counts_of(routes).astype(np.int64))
    np.testing.assert_array_equal(counted.predict("a"), fed(name, prompts, tasks).predict("a"))
    with pytest.raises(UsageError, match="counts of shape"):
        counted.observe_counts(np.zeros((8, 3), dtype=np.int64))


def test_transitions_refuse_counts() -> None:
    with pytest.raises(UsageError, match="needs each token's routes"):
        made("transitions").observe_counts(np.zeros((3, 8), dtype=np.int64))


@settings(max_examples=25)
@given(seed=st.integers(0, 999), count=st.integers(1, 7), missing=st.sampled_from([0.0, 0.3]))
def test_popularities_against_literal_versions(seed: int, count: int, missing: float) -> None:
    prompts, tasks = random_prompts(seed, count, missing)
    all_counts = [counts_of(routes) for routes in prompts]
    seen = [(counts, task) for counts, task in zip(all_counts, tasks, strict=True) if counts.any()]
    overall = to_k(sum((counts for counts, _ in seen), start=np.zeros((3, 8))))
    np.testing.assert_allclose(fed("static", prompts, tasks).predict("a"), overall)

    mine = [counts for counts, task in seen if task == "a"]
    total = sum(mine, start=np.zeros((3, 8)))
    weight = len(mine) / (len(mine) + PRIOR_PROMPTS)
    expected = np.where(total.sum(1, keepdims=True) > 0, weight * to_k(total) + (1 - weight) * overall, overall)
    by_task = fed("task-popularity", prompts, tasks)
    np.testing.assert_allclose(by_task.predict("a"), expected)
    np.testing.assert_allclose(by_task.predict(None), overall)

    last = seen[-1][0] if seen else np.zeros((3, 8))
    np.testing.assert_allclose(fed("previous-prompt", prompts, tasks).predict("a"), to_k(last))

    decayed = np.zeros((3, 8))
    for counts, _ in seen:
        for layer in range(3):
            if counts[layer].any():
                decayed[layer] = PROMPT_DECAY * decayed[layer] + counts[layer] / counts[layer].sum()
    np.testing.assert_allclose(fed("decayed-prompt", prompts, tasks).predict("a"), to_k(decayed))


@settings(max_examples=25)
@given(seed=st.integers(0, 999), count=st.integers(1, 7), missing=st.sampled_from([0.0, 0.3]))
def test_transitions_against_a_literal_version(seed: int, count: int, missing: float) -> None:
    prompts, tasks = random_prompts(seed, count, missing)
    pairs, total, latest = np.zeros((2, 8, 8)), np.zeros((3, 8)), np.zeros((3, 8))
    for routes in prompts:
        total += counts_of(routes)
        latest = counts_of(routes) if counts_of(routes).any() else latest
        for token in routes:
            for layer in range(2):
                for a in token[layer][token[layer] < 8]:
                    for b in token[layer + 1][token[layer + 1] < 8]:
                        pairs[layer, a, b] += 1
    shares = [to_k(latest)[0]]
    for layer in range(2):
        nxt = np.zeros(8)
        for a in range(8):
            row = pairs[layer, a]
            nxt += shares[-1][a] * (row / row.sum() if row.any() else to_k(total)[layer + 1] / SHAPE.top_k)
        shares.append(nxt)
    np.testing.assert_allclose(fed("transitions", prompts, tasks).predict("a"), shares)


def test_transitions_find_a_permutation_between_layers() -> None:
    """Layer l + 1 goes to expert e + 1 whenever layer l goes to e: the first layer tells everything."""
    start = np.random.default_rng(0).integers(0, 8, 500)
    routes = np.stack([(start + layer) % 8 for layer in range(3)], axis=1)[:, :, None]
    predictor = make_predictor("transitions", RoutingShape(3, 8, 1))
    predictor.observe(routes)
    predictor.begin_prompt(None)
    predictor.observe(np.array([[[4], [0], [0]]]))
    shares = predictor.predict(None)
    assert [int(row.argmax()) for row in shares] == [4, 5, 6]


def nearest(stored: list[Array], counts: Array) -> int:
    def cosine(a: Array, b: Array) -> float:
        length = float(np.linalg.norm(a) * np.linalg.norm(b))
        return float(a @ b) / length if length else 0.0

    return int(np.argmax([sum(cosine(a, b) for a, b in zip(one, counts, strict=True)) for one in stored]))


@settings(max_examples=25)
@given(seed=st.integers(0, 999), count=st.integers(2, 7))
def test_matching_against_a_literal_version(seed: int, count: int) -> None:
    prompts, tasks = random_prompts(seed, count)
    stored = [counts_of(routes) for routes in prompts if len(routes)]
    if len(stored) < 2:
        return
    predictor = fed("moe-infinity", prompts, tasks)
    found = nearest(stored[:-1], stored[-1])
    np.testing.assert_allclose(predictor.predict(None), to_k(stored[found]))
    predictor.begin_prompt(None)
    np.testing.assert_allclose(predictor.predict(None), to_k(stored[found]), err_msg="the last prompt is not its match")
    predictor.observe(prompts[[len(routes) > 0 for routes in prompts].index(True)])
    np.testing.assert_allclose(predictor.predict(None), to_k(stored[0]), err_msg="the same prompt again")


def test_matching_keeps_a_bounded_and_varied_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "STORED_PROMPTS", 3)
    rng = np.random.default_rng(0)
    predictor = made("moe-infinity")
    for task in (0, 1, 2, 2, 2, 2):
        predictor.begin_prompt(None)
        predictor.observe(routes_by_task(rng, SHAPE, 60, task))
    predictor.begin_prompt(None)
    assert len(predictor.state()["stored"]) == 3
    for task in range(3):
        predictor.begin_prompt(None)
        predictor.observe(routes_by_task(rng, SHAPE, 5, task))
        favoured = (3 * task + np.arange(3)) % 8
        assert (predictor.predict(None)[np.arange(3), favoured] > 0.8).all()


def test_the_running_prompt_is_the_latest_from_its_first_token_on() -> None:
    predictor = cast(PromptCounter, make_predictor("previous-prompt", SHAPE))
    rng = np.random.default_rng(0)
    first, second = routes_by_task(rng, SHAPE, 20, 0), routes_by_task(rng, SHAPE, 3, 1)
    predictor.begin_prompt(None)
    predictor.observe(first)
    predictor.begin_prompt(None)
    np.testing.assert_array_equal(predictor.latest, counts_of(first))
    predictor.observe(second)
    np.testing.assert_array_equal(predictor.latest, counts_of(second))


def test_names_of_tasks_survive_any_text() -> None:
    names = [None, "", "résumé", 'a "quoted"\n one']
    assert unpack_names(pack_names(names)) == names
    for damaged in (b"[1]", b"{}", b"[\xff"):
        with pytest.raises(UsageError, match="names of tasks are damaged"):
            unpack_names(np.frombuffer(damaged, dtype=np.uint8))
