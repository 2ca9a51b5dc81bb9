"""bench/quality.py on two prompts: a mode that loses nothing loses nothing, and figures add up."""

from __future__ import annotations

import runpy
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import emoe
from emoe.model import close, label_task
from emoe.prediction.protocol import RoutingShape

QUALITY: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "quality.py"))


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> Namespace:
    """Settings, with a history of two prompts."""
    trace = tmp_path_factory.mktemp("history") / "t.npz"
    model, tokenizer = emoe.load(trace=trace)
    assert tokenizer is not None
    for task in ("qa", "code"):
        label_task(model, task)
        model(**tokenizer(f"A prompt of task {task}, to learn from.", return_tensors="pt"))
    close(model)
    given = {"data": None, "prompts": 2, "prompt_tokens": 64, "tokens": 6, "seed": 0, "profile": Path("nowhere")}
    return Namespace(history=trace, memory="60%", no_networks=True, **given)


@pytest.mark.filterwarnings("ignore:.*requires_grad.*")
def test_exact_loses_nothing_and_lossy_modes_are_compared_with_it(args: Namespace) -> None:
    items = QUALITY["items_of"](args, reference=False)
    assert len(items) == 2 and all(0 < len(item.text) <= 6 and len(item.ids) <= 64 for item in items)
    exact = QUALITY["run"](items, expert_memory="40%", eviction="lru")
    assert (exact["accuracy"], exact["ratio"]) == (1.0, 1.0)
    profile = QUALITY["profile_of"](args, ["task-popularity"])
    assert set(profile.popularity) == {"qa", "code", "other"}
    common = {"mode": "resident", "expert_memory": "20%", "profile": profile, "predictor": "task-popularity"}
    lossy = QUALITY["run"](items, **common)
    assert lossy["plans"] == 1 and lossy["rerouted_share"] > 0
    assert lossy["perplexity"] == pytest.approx(exact["perplexity"] / lossy["ratio"], rel=1e-2)


def test_a_scorer_as_predictor_ranks_each_layer() -> None:
    class Scorer:
        name = "scorer"

        def scores(self) -> Any:
            return np.array([[-3.0, -1.0, -2.0]])

    shares = QUALITY["ByScore"](RoutingShape(1, 3, 2), Scorer()).predict(None)
    assert shares.argsort(axis=1).tolist() == [[0, 2, 1]]
    assert shares.sum() == pytest.approx(2)
