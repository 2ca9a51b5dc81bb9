"""What a pass says of its tokens, and what is done with it when a prompt has been read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import emoe
from emoe.model import runtime
from emoe.model.bind import binding_of
from emoe.model.passes import Pass, Segment
from tests.families import make_checkpoint
from tests.model.test_exact import batch_of, logits_of


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"), seed=6)


def test_a_token_knows_how_many_of_its_own_sequence_follow() -> None:
    assert Pass(batch=2, tokens=3).behind().tolist() == [2, 1, 0, 2, 1, 0]
    parts = (Segment(7, 0, 1, "decode", False), Segment(9, 1, 4, "prefill", True))
    assert Pass(tokens=4, segments=parts, announced=True).behind().tolist() == [0, 2, 1, 0]


def test_rows_that_are_not_the_pass_tokens_count_alike(path: Path) -> None:
    """A model may route fewer or more rows than the pass has tokens: what its prompt used most stays then."""
    model, _ = emoe.load(path, expert_memory="60%")
    bound = binding_of(model).runtime
    layer = next(iter(bound.layers.values()))
    routes = torch.tensor([[0, 1]] * 5 + [[2, 3]] * 2)
    bound.now = Pass(tokens=4)
    kept = bound._kept_after(layer, routes)
    assert {0, 1} <= kept
    assert len(kept) <= layer.pool.table.staying(layer.layer)
    emoe.close(model)


def test_nothing_is_chosen_to_stay_where_everything_does(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def note(routes: Any, *_: Any) -> frozenset[int]:
        asked.append(len(routes))
        return frozenset()

    monkeypatch.setattr(runtime, "kept_after", note)
    for memory, expected in ((None, False), ("60%", True)):
        asked.clear()
        model, _ = emoe.load(path, expert_memory=memory)
        logits_of(model, batch_of(1, 1, 9), 1)
        assert bool(asked) == expected
        emoe.close(model)
