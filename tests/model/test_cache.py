"""A cache that grows in place is transformers' cache, whatever is done to it."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import emoe
from emoe.model.cache import STEP, GrowingLayer, rounded
from emoe.planner import plan
from tests.conftest import Checkpoints

OPERATIONS = ["crop", "reorder", "repeat", "select", "copy", "deepcopy"]
if Version(transformers.__version__) >= Version("5.23"):
    OPERATIONS.append("reset")  # transformers 5.17 writes zeros over what it has given out, and keeps the length


def states(batch: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, batch, tokens, 2, 3, generator=generator).transpose(2, 3)
    return both[0], both[1]


def change(layer: Any, operation: str) -> Any:
    """Do it, and return the layer to go on with."""
    if operation == "crop":
        layer.crop(-min(3, layer.get_seq_length()))
    elif operation == "reorder":
        layer.reorder_cache(torch.arange(layer.keys.shape[0]).flip(0))
    elif operation == "repeat":
        layer.batch_repeat_interleave(2)
    elif operation == "select":
        layer.batch_select_indices(torch.tensor([0]))
    elif operation == "reset":
        layer.reset()
    else:
        return copy.copy(layer) if operation == "copy" else copy.deepcopy(layer)
    return layer


@given(
    steps=st.lists(st.tuples(st.sampled_from(["", *OPERATIONS]), st.integers(1, STEP + 3)), min_size=1, max_size=8),
    converted=st.integers(0, 3),
    inference=st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_it_holds_what_transformers_holds(steps: list[tuple[str, int]], converted: int, inference: list[bool]) -> None:
    theirs: Any = DynamicLayer()
    ours: Any = DynamicLayer() if converted else GrowingLayer()
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    branches: list[tuple[Any, Any]] = []
    for number, (operation, tokens) in enumerate(steps):
        if number == converted and type(ours) is DynamicLayer:
            ours = GrowingLayer.of(ours)
        with torch.inference_mode(inference[number]):
            if operation and theirs.is_initialized and theirs.get_seq_length():
                if operation in ("copy", "deepcopy"):
                    branches.append((theirs, ours))
                theirs, ours = change(theirs, operation), change(ours, operation)
            batch = theirs.keys.shape[0] if theirs.is_initialized and theirs.get_seq_length() else 2
            new = states(batch, tokens, number)
            expected = theirs.update(*new)
            found = ours.update(*new)
            kept += zip(expected, found, strict=True)
            # Whoever still holds what was before a copy appends to it too.
            for a, b in branches:
                if a.get_seq_length():
                    other = states(a.keys.shape[0], 1, 100 + number)
                    kept += zip(a.update(*other), b.update(*other), strict=True)
        assert ours.get_seq_length() == theirs.get_seq_length()
        for expected_, found_ in kept:
            assert torch.equal(expected_, found_)


def test_a_copy_made_in_inference_mode_goes_on_outside_it() -> None:
    layer = GrowingLayer()
    first, _ = layer.update(*states(2, 3, 0))
    with torch.inference_mode():
        copied = copy.deepcopy(layer)
    keys, _ = copied.update(*states(2, 1, 1))
    assert torch.equal(keys[..., :3, :], first) and torch.equal(keys[..., 3:, :], states(2, 1, 1)[0])


def test_tokens_are_written_and_not_copied() -> None:
    layer = GrowingLayer()
    places = set()
    for number in range(2 * STEP):
        keys, _ = layer.update(*states(1, 1, number))
        places.add(keys.data_ptr())
        assert keys.untyped_storage().nbytes() == rounded(number + 1) * 2 * 3 * 4
    assert len(places) <= 2


def test_other_sizes_are_refused_and_gradients_kept() -> None:
    layer = GrowingLayer()
    layer.update(*states(2, 4, 1))
    with pytest.raises(RuntimeError):
        layer.update(*states(1, 4, 1))
    keys, values = states(2, 1, 2)
    out, _ = layer.update(keys.requires_grad_(), values)
    assert out.requires_grad


def test_models_of_load_let_caches_grow(checkpoints: Checkpoints) -> None:
    path = checkpoints("gpt_oss")
    model, _ = emoe.load(path)
    ids = torch.randint(3, 128, (1, 40))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
        kinds = {type(layer).__name__ for layer in cache.layers}
        assert kinds == {"GrowingLayer", "DynamicSlidingWindowLayer"}
        first = model(ids[:, :30], use_cache=True).past_key_values
        model(ids[:, 30:31], past_key_values=first)
        assert {type(layer).__name__ for layer in first.layers} == kinds
    emoe.close(model)
    gc.collect()


def test_the_plan_counts_the_room(checkpoints: Checkpoints) -> None:
    path: Path = checkpoints("qwen3_moe")
    assert plan(path, context=1).cache_bytes == plan(path, context=STEP).cache_bytes
    assert plan(path, context=STEP + 1).cache_bytes == 2 * plan(path, context=STEP).cache_bytes
