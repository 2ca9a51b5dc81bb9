"""A fault ends the request that causes it, with its name; the others' text does not change, and nothing hangs."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import emoe
from emoe.engine.engine import Engine
from emoe.errors import EmoeError, ReadError
from emoe.model.bind import binding_of
from tests.conftest import Checkpoints
from tests.engine.running import ENDLESS, SMALL, alone, engine_of, nothing_left, prompt, send, wait_until


@pytest.fixture(params=["mixtral", "gpt_oss"])
def model(checkpoints: Checkpoints, request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    """With windows a failed step costs requests their pages, without it does not."""
    made, _ = emoe.load(checkpoints(request.param, torch.float32), expert_memory="40%", dtype="float32")
    yield made
    emoe.close(made)


def failing(model: PreTrainedModel, when: Callable[[], bool]) -> None:
    """Let the store's reads fail while `when` says so."""

    def pread(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if when():
            raise OSError(errno.EIO, "Input/output error")
        return os.preadv(descriptor, buffers, offset)

    reader: Any = binding_of(model).reader
    reader._pread = pread


def test_one_read_error_ends_nobody(model: PreTrainedModel) -> None:
    """It is gone when the requests of that step are tried again, one at a time."""
    asked = [prompt(n, 6 + n) for n in range(4)]
    expected = [alone(model, each, 20, ends=False) for each in asked]
    left = [1]

    def once() -> bool:
        if engine.stats().generation_tokens > 20 and left[0]:
            left[0] -= 1
            return True
        return False

    with engine_of(model) as engine:
        failing(model, once)
        answers = [send(engine, each, 20, sampling=ENDLESS)[1] for each in asked]
        assert [answer.end.reason for answer in answers] == ["length"] * 4
        assert not left[0]
    assert [answer.tokens for answer in answers] == expected


def test_the_request_that_needs_what_cannot_be_read_ends_and_the_others_go_on(model: PreTrainedModel) -> None:
    """A step over several fails; each is tried alone; the one that fails again ends with the store's error."""
    asked = [prompt(n, 6) for n in range(4)]
    expected = [alone(model, each, 12, ends=False) for each in asked]
    runtime = binding_of(model).runtime

    def concerns_the_second() -> bool:
        return engine.stats().generation_tokens > 8 and 2 in [s.sequence for s in runtime.now.segments]

    with engine_of(model) as engine:
        failing(model, concerns_the_second)
        answers = [send(engine, each, 12, sampling=ENDLESS)[1] for each in asked]
        for number, answer in enumerate(answers):
            assert answer.end.reason == ("error" if number == 1 else "length")
        error = answers[1].end.error
        assert isinstance(error, ReadError)
        assert "safetensors" in str(error)
        assert engine.alive
        failing(model, lambda: False)
        assert send(engine, asked[1], 12, sampling=ENDLESS)[1].end.reason == "length"
    for number, answer in enumerate(answers):
        assert answer.tokens == expected[number][: len(answer.tokens)]
    assert alone(model, asked[1], 12, ends=False) == expected[1]


def test_out_of_memory_in_the_model_is_one_requests(model: PreTrainedModel) -> None:
    """Any exception of the forward pass is treated so, also those that are not emoe's."""
    heads = model.get_output_embeddings()

    def too_much(module: Any, args: Any) -> None:
        if any(segment.prompt_tokens == 7 for segment in binding_of(model).runtime.now.segments):
            raise MemoryError("out of memory")

    handle = heads.register_forward_pre_hook(too_much)
    try:
        with engine_of(model) as engine:
            good, bad = send(engine, prompt(1, 6), 8, sampling=ENDLESS)[1], send(engine, prompt(2, 7), 8)[1]
            assert good.end.reason == "length"
            assert bad.end.reason == "error"
            assert "MemoryError: out of memory" in str(bad.end.error)
    finally:
        handle.remove()


def test_a_store_that_is_gone_stops_the_engine(model: PreTrainedModel) -> None:
    """Nobody is to blame: every request gets the error, and the engine says that it is dead."""
    engine = Engine(model, None, SMALL)
    engine.start()
    failing(model, lambda: True)
    answers = [send(engine, prompt(n, 6), 5)[1] for n in range(20)]
    for answer in answers:
        assert answer.end.reason == "error"
        assert isinstance(answer.end.error, ReadError)
    wait_until(lambda: not engine.alive)
    assert isinstance(engine.failure, ReadError)
    with pytest.raises(EmoeError, match="takes no more requests"):
        send(engine, prompt(1, 5))
    assert engine.drain(1)
    engine.stop()
    nothing_left(engine)
    failing(model, lambda: False)
    assert alone(model, prompt(1, 6), 5)


def test_a_defect_of_the_scheduler_stops_the_engine(model: PreTrainedModel) -> None:
    engine = Engine(model, None, SMALL)
    engine._scheduler.admit = lambda now: [now.waiting[0], now.waiting[0]]  # type: ignore[method-assign]
    engine.start()
    answer = send(engine, prompt(1, 6))[1]
    assert answer.end.reason == "error"
    wait_until(lambda: not engine.alive)
    assert "admits requests that do not wait" in str(engine.failure)
    engine.stop()
    nothing_left(engine)
