"""eMoE-A and eMoE-L: they learn what is there to learn, repeat by seed, and come back from their state."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from emoe.errors import UsageError
from emoe.prediction import fitting
from emoe.prediction.emoe_sequence import EmoeA, NotFittedError
from emoe.prediction.networks import Vocabulary
from emoe.prediction.protocol import Predictor, RoutingShape, Trainable
from emoe.prediction.registry import make_predictor
from emoe.routing.trace import Trace
from tests.prediction.histories import routes_by_task, trace_of

SHAPE = RoutingShape(3, 8, 2)
ALL = ("emoe-a", "emoe-l", "emoe-a-gpt2", "emoe-a-bert", "emoe-l-gpt2", "emoe-l-bert")
TASKS = ("a", "b", "c")


def history(prompts: int = 60, tasks: bool = True, in_turn: bool = False) -> Trace:
    rng = np.random.default_rng(0)
    numbers = [i % 3 if in_turn else int(rng.integers(3)) for i in range(prompts)]
    routes = [routes_by_task(rng, SHAPE, 20, number) for number in numbers]
    return trace_of(SHAPE, routes, [TASKS[number] if tasks else None for number in numbers])


@cache
def _fitted_state(name: str) -> dict[str, Any]:
    predictor: Any = make_predictor(name, SHAPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "MAX_EPOCHS", 12)
        predictor.fit(history(), seed=3)
    state: dict[str, Any] = predictor.state()
    return state


def fitted_small(name: str) -> Any:
    """A predictor that was fitted on `history()`; the fit is made once for each name."""
    predictor: Any = make_predictor(name, SHAPE)
    predictor.restore(_fitted_state(name))
    return predictor


def favoured(task: int) -> list[set[int]]:
    return [{(3 * task + layer + j) % 8 for j in range(2)} for layer in range(3)]


def named(shares: Any) -> list[set[int]]:
    return [set(np.argsort(-row)[:2].tolist()) for row in shares]


@pytest.mark.parametrize("name", ALL)
def test_each_learns_the_tasks_experts(name: str) -> None:
    predictor = fitted_small(name)
    assert all(isinstance(predictor, protocol) for protocol in (Predictor, Trainable))
    assert predictor.name == name
    for task in range(3):
        shares = predictor.predict(TASKS[task])
        assert shares.shape == (3, 8) and shares.dtype == np.float64
        np.testing.assert_allclose(shares.sum(axis=1), 2)
        assert named(shares) == favoured(task)
    assert predictor.predict("never seen").shape == (3, 8)
    assert predictor.nbytes == 4 * predictor.parameters > 0


@pytest.mark.parametrize("name", ["emoe-a", "emoe-l"])
def test_what_is_restored_predicts_the_same_from_then_on(name: str) -> None:
    first, again = fitted_small(name), make_predictor(name, SHAPE)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    again.restore(first.state())  # type: ignore[attr-defined]
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random numbers are not touched"
    rng = np.random.default_rng(0)
    for task in (1, 2):
        routes = routes_by_task(rng, SHAPE, 6, task)
        for predictor in (first, again):
            predictor.begin_prompt(TASKS[task])
            predictor.observe(routes)
        for asked in (None, "a", "c", "unseen"):
            np.testing.assert_array_equal(again.predict(asked), first.predict(asked))


def test_a_seed_repeats_and_another_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "MAX_EPOCHS", 3)
    for name in ("emoe-a", "emoe-l"):
        made: list[Any] = [make_predictor(name, SHAPE) for _ in range(3)]
        for predictor, seed in zip(made, (1, 1, 2), strict=True):
            torch.rand(int(torch.randint(9, (1,))))
            before = torch.random.get_rng_state()
            predictor.fit(history(20), seed=seed)
            assert torch.equal(torch.random.get_rng_state(), before)
        first, again, other = (predictor.predict("b") for predictor in made)
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["emoe-a", "emoe-l"])
def test_both_follow_the_previous_prompt_where_no_task_is_known(name: str) -> None:
    """Tasks take turns and have no labels: only the previous prompt's routes tell what comes. L sees that in its first
    layer alone, and must chain on its own choices to know the others."""
    predictor: Any = make_predictor(name, SHAPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "MAX_EPOCHS", 40)
        predictor.fit(history(150, tasks=False, in_turn=True), seed=0)
    rng = np.random.default_rng(5)
    for task in range(3):
        predictor.begin_prompt(None)
        predictor.observe(routes_by_task(rng, SHAPE, 20, task))
        assert named(predictor.predict(None)) == favoured((task + 1) % 3)


@pytest.mark.parametrize("name", ["emoe-a", "emoe-l"])
def test_fitting_forgets_what_was_observed_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "MAX_EPOCHS", 1)
    used, fresh = (make_predictor(name, SHAPE) for _ in range(2))
    used.begin_prompt("c")
    used.observe(routes_by_task(np.random.default_rng(1), SHAPE, 9, 2))
    for predictor in (used, fresh):
        predictor.fit(history(12))  # type: ignore[attr-defined]
    last = history(12).counts()[-1]
    for predictor in (used, fresh):
        np.testing.assert_array_equal(predictor.latest, last)  # type: ignore[attr-defined]
    np.testing.assert_array_equal(used.predict("a"), fresh.predict("a"))


@pytest.mark.parametrize(("direction", "kept"), [(1.0, 0.5), (-1.0, 0.5 + 3 * fitting.LEARNING_RATE)])
def test_the_weights_of_the_best_epoch_are_kept(direction: float, kept: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training raises the weight; the held-out loss falls with it, or rises and then the untrained one is kept."""
    monkeypatch.setattr(fitting, "MAX_EPOCHS", 3)
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(network.weight, 0.5)

    def loss(part: Any, training: bool) -> torch.Tensor:
        return (-1.0 if training else direction) * network.weight.sum()

    sides = np.arange(1), np.arange(1, 3)
    fitting.train("toy", network, loss, sides, 4, np.random.default_rng(0), None)
    assert float(network.weight.detach()) == pytest.approx(kept, abs=2e-4)


def test_a_short_history_and_another_model_are_refused_by_name() -> None:
    for name in ALL:
        predictor: Any = make_predictor(name, SHAPE)
        with pytest.raises(UsageError, match=f"{name} learns from at least 10 prompts .* holds 9"):
            predictor.fit(history(9))
        with pytest.raises(NotFittedError, match=f"{name} predicts with a network and has learned nothing"):
            predictor.predict("a")
        with pytest.raises(UsageError, match=f"{name} is made for"):
            predictor.fit(trace_of(RoutingShape(2, 8, 2), [], []))
    with pytest.raises(UsageError, match="no network is called 'lstm'"):
        EmoeA(SHAPE, "emoe-a", "lstm")


def test_a_state_of_another_kind_is_refused_and_changes_nothing() -> None:
    predictor = fitted_small("emoe-a")
    before = predictor.predict("a")
    with pytest.raises(UsageError, match="the stored state of emoe-a"):
        predictor.restore(fitted_small("emoe-a-gpt2").state())
    state = predictor.state()
    with pytest.raises(UsageError, match=r"holds 'weight\.popularity' as"):
        predictor.restore(state | {"weight.popularity": np.zeros((3, 9), dtype=np.float32)})
    np.testing.assert_array_equal(predictor.predict("a"), before)


def test_an_unfitted_state_is_restored_as_unfitted() -> None:
    empty: Any = make_predictor("emoe-a", SHAPE)
    predictor = fitted_small("emoe-a")
    predictor.restore(empty.state())
    assert predictor.parameters == predictor.nbytes == 0
    with pytest.raises(NotFittedError):
        predictor.predict(None)


def test_training_works_where_gradients_are_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "MAX_EPOCHS", 1)
    with torch.no_grad():
        predictor: Any = make_predictor("emoe-a", SHAPE)
        predictor.fit(history(12), seed=0)
        assert not torch.is_grad_enabled()


def test_training_reports_and_stops_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "MAX_SECONDS", 0.0)
    lines: list[str] = []
    predictor: Any = make_predictor("emoe-a", SHAPE)
    predictor.fit(history(12), progress=lines.append)
    assert len(lines) == 1 and "emoe-a: epoch 1" in lines[0] and "stopped after 0 s" in lines[0]


def test_a_routes_tokens_name_each_layers_most_used_experts() -> None:
    vocabulary = Vocabulary(SHAPE, 2)
    counts = np.zeros((3, 8), dtype=np.int64)
    counts[0, [2, 5]] = 3, 4
    counts[1, 7] = 1
    tokens = vocabulary.most_used(counts)
    assert tokens.tolist() == [[5, 2], [15, 24], [24, 24]]
    assert vocabulary.most_used_in(np.array([1, 0]), counts[[1, 0]]).tolist() == [[15, 24], [5, 2]]
    others = [vocabulary.first, vocabulary.onward, vocabulary.task(None), vocabulary.task(0), vocabulary.task(1)]
    assert sorted({*others, vocabulary.nothing}) == list(range(24, 30))
    assert vocabulary.size == 30


def test_thinning_keeps_a_part() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 50, (40, 3, 8))
    kept = fitting.thinned(counts, rng)
    assert ((kept >= 0) & (kept <= counts)).all()
    assert 0.05 < kept.sum() / counts.sum() < 0.7


def test_cross_entropy_leaves_out_layers_without_tokens() -> None:
    logits = torch.tensor([[[0.0, 1.0], [5.0, -5.0]]])
    shares = torch.tensor([[[0.25, 0.75], [0.0, 0.0]]])
    known = torch.tensor([[1.0, 0.0]])
    log = logits[0, 0].log_softmax(-1)
    assert float(fitting.cross_entropy(logits, shares, known)) == pytest.approx(float(-(0.25 * log[0] + 0.75 * log[1])))
    assert float(fitting.cross_entropy(logits, shares, 0 * known)) == 0


def test_a_fifth_is_held_out_and_at_least_one_sample() -> None:
    for samples in (9, 10, 101):
        trained, held = fitting.split(samples, np.random.default_rng(0))
        assert sorted([*trained, *held]) == list(range(samples))
        assert len(held) == max(1, samples // 5)


@pytest.mark.parametrize("name", ["emoe-a", "emoe-l"])
def test_training_starts_at_the_popularity_of_the_history(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert that the history never used has a share, too: a small one, and no NaN."""
    monkeypatch.setattr(fitting, "train", lambda *args: None)
    rng = np.random.default_rng(0)
    routes = [routes_by_task(rng, SHAPE, 20, 1) % 7 for _ in range(30)]
    predictor: Any = make_predictor(name, SHAPE)
    predictor.fit(trace_of(SHAPE, routes, ["a"] * 30))
    popular = np.bincount(np.concatenate(routes)[:, 0].ravel(), minlength=8)
    found = predictor.predict("a")
    assert np.isfinite(found).all() and (found > 0).all()
    assert np.argmax(found[0]) == np.argmax(popular)
    assert found[0, 7] < 0.01 < found[0].max() - 1 / 4
