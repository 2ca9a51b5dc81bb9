"""Predictors are trained by name, kept, and restored to the same predictions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from emoe.errors import UsageError
from emoe.prediction import registry
from emoe.prediction.protocol import RoutingShape, Trainable
from emoe.profiling.training import check_names, default_names, make, train
from emoe.routing.trace import Trace


@pytest.fixture
def trace() -> Trace:
    rng = np.random.default_rng(0)
    experts = np.stack([rng.permutation(4)[:2] for _ in range(60)]).reshape(20, 3, 2).astype(np.uint8)
    return Trace(
        experts=experts,
        phase=np.zeros(20, np.uint8),
        step=np.arange(20),
        offsets=np.array([0, 5, 12, 20]),
        task=np.array([0, 1, 0], np.int32),
        tasks=("a", "b"),
        layers=np.arange(3, dtype=np.int32),
        num_experts=4,
        prompts=({},) * 3,
    )


def test_what_is_trained_is_kept_and_not_trained_again(
    trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    states = train(["static", "task-popularity"], trace, tmp_path, 0, said.append)
    assert said[0] == "static on 20 tokens of 3 prompts"
    monkeypatch.setattr(registry, "make_predictor", None)
    again = train(["static", "task-popularity"], trace, tmp_path, 0, said.append)
    for name, state in states.items():
        assert {key: array.tobytes() for key, array in state.items()} == {
            key: array.tobytes() for key, array in again[name].items()
        }


def test_a_restored_predictor_predicts_the_same(trace: Trace, tmp_path: Path) -> None:
    shape = RoutingShape.of(trace)
    states = train(["task-popularity"], trace, tmp_path, 0, lambda _: None)
    fitted, restored = make("task-popularity", shape), make("task-popularity", shape)
    assert isinstance(fitted, Trainable)
    assert isinstance(restored, Trainable)
    fitted.fit(trace)
    restored.restore(states["task-popularity"])
    a: Any = fitted
    b: Any = restored
    for task in ("a", "b", None):
        assert np.array_equal(a.predict(task), b.predict(task))


def test_unknown_and_untrainable_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"no predictor is called .oracle.: choose from .*static"):
        check_names(["static", "oracle"])
    learner = registry.make_predictor("static", RoutingShape(2, 4, 2))
    knows_already = SimpleNamespace(
        name="oracle", begin_prompt=learner.begin_prompt, observe=learner.observe, predict=learner.predict
    )
    monkeypatch.setitem(registry.PREDICTORS, "oracle", lambda shape: knows_already)
    with pytest.raises(UsageError, match="'oracle' learns nothing beforehand"):
        check_names(["static", "oracle"])
    check_names(default_names())
