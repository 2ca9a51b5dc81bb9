"""bench/perplexity.py on two prompts: budgets change nothing, forms of the experts change little."""

from __future__ import annotations

import gzip
import math
import runpy
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

PERPLEXITY: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "bench" / "perplexity.py"))


def test_every_form_at_every_budget(tmp_path: Path) -> None:
    corpus = tmp_path / "some.txt.gz"
    corpus.write_bytes(gzip.compress(b"Once upon a time there was a river. It was long and calm. " * 20))
    rows = PERPLEXITY["text"](
        Namespace(
            expert_dtypes=["native", "int4"],
            budgets=["100%", "40%"],
            expert_cache=str(tmp_path),
            corpus=[corpus],
            windows=2,
            window_tokens=40,
            prompts=1,
            tokens=2,
        )
    )
    assert [(row["experts"], row["budget"]) for row in rows] == [
        (form, budget) for form in ("native", "int4") for budget in ("100%", "40%")
    ]
    native, int4 = rows[::2]
    assert native["same_answers"] == "1/1"
    assert native["some_tokens"] == 2 * 39
    assert native["expert_mb"] > 3 * int4["expert_mb"]
    for name in ("reference_perplexity", "some_perplexity"):
        assert abs(math.log(int4[name] / native[name])) < 0.3


def test_logits_beside_float32(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    args = Namespace(
        model=checkpoints("qwen3_moe", moe_intermediate_size=64),
        expert_dtypes=["native", "int8", "int4"],
        budgets=["60%"],
        expert_cache=str(tmp_path),
        tokens=24,
        steps=3,
        seed=0,
    )
    rows = PERPLEXITY["logits"](args)
    assert [(row["experts"], row["runs in"]) for row in rows] == [
        ("native", "as stored"),
        ("int8", "float32"),
        ("int8", "as stored"),
        ("int4", "float32"),
        ("int4", "as stored"),
    ]
    assert 0 < rows[1]["median_error"] < rows[3]["median_error"] < 1
    assert 0 <= rows[1]["median_divergence"] < rows[3]["median_divergence"]
    assert all(0.5 < row["same_routes"] <= 1 for row in rows)


def test_shared_routes_are_counted_whatever_their_order() -> None:
    a, b = torch.tensor([[0, 1, 5], [2, 3, 4]]), torch.tensor([[1, 5, 7], [2, 3, 4]])
    assert PERPLEXITY["_same_routes"](a, b) == 5


def test_logits_of_no_model_is_refused() -> None:
    with pytest.raises(SystemExit, match="--model"):
        PERPLEXITY["logits"](Namespace(model=None))
