"""Asking a predictor in a process of its own, and what happens when that process dies."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import emoe
from emoe.errors import UsageError
from emoe.model.asking import AnswersAside, AnswersHere
from emoe.model.bind import binding_of
from emoe.prediction.protocol import RoutingShape
from emoe.prediction.registry import make_predictor
from emoe.prediction.worker import PredictorProcess
from tests.families import make_checkpoint
from tests.model.test_exact import batch_of, logits_of

SHAPE = RoutingShape(3, 8, 2)


def test_an_answer_from_a_process_is_the_predictors_own_for_every_task_asked() -> None:
    random = np.random.default_rng(0)
    here = AnswersHere(make_predictor("task-popularity", SHAPE))
    aside = AnswersAside(PredictorProcess("task-popularity", SHAPE))
    try:
        for task in ("a", "b", "a", None):
            routes = np.argsort(random.random((20, 3, 8)))[:, :, :2].astype(np.uint8)
            for answers in (here, aside):
                answers.tell(task, routes)
        for answers in (here, aside):
            answers.ask(["b"])  # superseded
            answers.ask(["a", None, "b"])
        expected, found = here.poll(), None
        until = time.monotonic() + 60
        while found is None and time.monotonic() < until:
            found = aside.poll()
            time.sleep(0.01)
        assert expected is not None and found is not None
        assert list(found) == list(expected) == ["a", None, "b"]
        for task in expected:
            assert np.array_equal(found[task], expected[task])
        assert here.poll() is None and aside.poll() is None
        assert aside.spent().calls >= 3 and aside.spent().memory_bytes > 0 and here.spent().calls == 4
    finally:
        aside.close()


def test_a_predictor_that_dies_is_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_checkpoint("deepseek_v3", tmp_path, seed=6)
    whole, _ = emoe.load(path)
    monkeypatch.setattr(
        "emoe.model.foresight.AnswersHere",
        lambda predictor: AnswersAside(PredictorProcess(predictor.name, predictor.shape)),
    )
    model, _ = emoe.load(path, expert_memory="60%", predictor="static")
    answers: Any = binding_of(model).ahead._answers
    logits_of(model, batch_of(0, 1, 5), 2)
    answers._process._child.kill()
    answers._process._child.wait()
    for seed in (1, 2):
        inputs = batch_of(seed, 1, 5)
        for ours, theirs in zip(logits_of(model, inputs, 2), logits_of(whole, inputs, 2), strict=True):
            assert torch.equal(ours, theirs)
    ahead = emoe.stats(model)["prefetch"]
    assert ahead["active"] is False and "ended with signal 9" in ahead["reason"]
    emoe.close(model)


def test_a_network_that_was_not_trained_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    path = make_checkpoint("deepseek_v3", tmp_path, seed=6)
    with pytest.raises(UsageError, match="emoe profile --predictors emoe-a"):
        emoe.load(path, expert_memory="60%", predictor="emoe-a")
