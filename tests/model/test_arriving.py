"""One token's missing experts: the first projection of the last one is computed while its second is read."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import emoe
from emoe.errors import ReadError
from emoe.model.bind import binding_of
from emoe.residency.pool import ExpertPool
from emoe.residency.prefetches import Taking
from tests.families import make_checkpoint
from tests.model.test_exact import batch_of, logits_of


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the last expert's first projection was there before its second, each time that this was asked."""
    found: list[bool] = []
    plain = ExpertPool.arrive_first

    def arrive_first(self: ExpertPool, taking: Taking) -> Any:
        while not all(flight.load.claimed for flight in taking.flights):
            time.sleep(1e-4)  # as if residents had been computed meanwhile
        there = plain(self, taking)
        found.append(there is not None)
        return there

    monkeypatch.setattr(ExpertPool, "arrive_first", arrive_first)
    return found


def slow(model: Any, fails: bool = False) -> None:
    """Every read takes a while; with `fails` those of second projections end in an error."""
    reader = binding_of(model).reader
    plain = reader._pread

    def pread(descriptor: int, buffers: Any, offset: int) -> int:
        time.sleep(0.002)
        return plain(descriptor, buffers, offset)

    reader._pread = pread
    if fails:
        whole, told = reader._read_round, ReadError("second projections cannot be read")

        def read_round(early: Any, late: Any, parts: Any, priority: int, reached: Any = None) -> int:
            nbytes = whole(early, late, parts, priority, reached)
            if reached is not None:
                raise told
            return nbytes

        reader._read_round = read_round  # type: ignore[method-assign]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
def test_what_is_begun_early_has_the_same_bits(
    name: str, dtype: torch.dtype, tmp_path: Path, begun: list[bool]
) -> None:
    path = make_checkpoint(name, tmp_path, seed=4, dtype=dtype)
    whole, _ = emoe.load(path)
    model, _ = emoe.load(path, expert_memory="50%")
    slow(model)
    inputs = batch_of(2, 1, 5)
    for ours, theirs in zip(logits_of(model, inputs, 10), logits_of(whole, inputs, 10), strict=True):
        assert torch.equal(ours, theirs)
    assert any(begun)
    stats = emoe.stats(model)
    for layer, entry in stats["layers"].items():
        assert entry["bytes_read"] == entry["loads"] * binding_of(model).index.stored_nbytes(layer, 0)
    emoe.close(model)


def test_a_second_projection_that_cannot_be_read_ends_the_request_and_leaves_no_slot_loading(
    tmp_path: Path, begun: list[bool]
) -> None:
    path = make_checkpoint("mixtral", tmp_path, seed=4)
    model, _ = emoe.load(path, expert_memory="50%")
    inputs = batch_of(2, 1, 5)
    expected = logits_of(model, inputs, 6)
    reader = binding_of(model).reader
    slow(model, fails=True)
    with pytest.raises(ReadError, match="cannot be read"):
        logits_of(model, batch_of(3, 1, 1), 12)
    for pool in binding_of(model).pools:
        assert {slot.state.value for slot in pool.table.slots} <= {"empty", "ready"}
    del reader._read_round
    for ours, theirs in zip(logits_of(model, inputs, 6), expected, strict=True):
        assert torch.equal(ours, theirs)
    emoe.close(model)
