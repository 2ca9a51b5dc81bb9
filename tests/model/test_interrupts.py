"""Ctrl-C at any line of a forward pass, twice: the next request gives the right numbers, and no slot is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import emoe
from emoe.model.bind import binding_of
from tests.families import make_checkpoint
from tests.interrupting import Interrupts


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral"), seed=2)


@pytest.fixture(scope="module")
def whole(path: Path) -> Iterator[PreTrainedModel]:
    model, _ = emoe.load(path)
    yield model
    emoe.close(model)


@pytest.fixture(scope="module")
def part(path: Path) -> Iterator[PreTrainedModel]:
    model, _ = emoe.load(path, expert_memory="40%", reader="direct")
    yield model
    emoe.close(model)


def logits(model: PreTrainedModel, seed: int) -> list[torch.Tensor]:
    """Of a prompt, and of single tokens without a past."""
    ids = torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return [model(ids).logits, *(model(ids[:, at : at + 1]).logits for at in range(4))]


# Python loses an interrupt that comes while it ends a generator that nobody holds any more, and warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@settings(max_examples=40)
@given(line=st.integers(1, 6000), then=st.integers(0, 40), seed=st.integers(0, 99))
def test_interrupts_at_any_line_cost_no_slot_and_no_bit(
    part: PreTrainedModel, whole: PreTrainedModel, line: int, then: int, seed: int
) -> None:
    """One model for all examples: whatever one left behind would show in those after it."""
    interrupts = Interrupts(line, then)
    interrupts.during(lambda: logits(part, seed))
    for found, expected in zip(logits(part, seed + 1), logits(whole, seed + 1), strict=True):
        assert torch.equal(found, expected), interrupts.raised
    for pool in binding_of(part).pools:
        assert all(slot.state.value in ("empty", "ready") for slot in pool.table.slots), interrupts.raised
        assert len(pool.table._free) + pool.table.occupied == len(pool.table.slots), interrupts.raised
