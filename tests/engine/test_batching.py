"""Everything that the engine relies on in transformers' continuous batching: what moves there must fail here, loudly.

`emoe.engine.batching` touches internals of transformers. These tests pin names, signatures and behaviour; a failure
means that a release of transformers has changed what the engine is built on, and says what.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import pytest
import torch
import transformers
from transformers import PreTrainedModel
from transformers.generation.continuous_batching import scheduler as tf_scheduler
from transformers.generation.continuous_batching.model_runner import ModelRunner

import emoe
from emoe.engine import batching
from emoe.engine.batching import Batcher, Slice
from emoe.engine.moved import check, moved
from emoe.errors import UnsupportedModelError
from emoe.model.attention import FEW_ROWS_SDPA
from emoe.model.bind import binding_of
from tests.conftest import Checkpoints
from tests.engine.running import alone, prompt

MOVED = (
    f"transformers {transformers.__version__} has changed its continuous batching, which emoe.engine.batching is built "
    "on: read its sources again, adapt that file (and emoe.engine.moved), and name the versions it then works with."
)


def greedy(logits: torch.Tensor, requests: Sequence[str]) -> list[int]:
    assert logits.dtype == torch.float32, MOVED
    assert logits.shape[0] == len(requests), MOVED
    tokens: list[int] = logits.argmax(-1).tolist()
    return tokens


@pytest.fixture
def model(checkpoints: Checkpoints) -> Iterator[PreTrainedModel]:
    made, _ = emoe.load(checkpoints("mixtral", torch.float32), dtype="float32")
    yield made
    emoe.close(made)


def make(model: PreTrainedModel, kv_tokens: int = 64, max_batch_tokens: int = 16, max_running: int = 4) -> Batcher:
    runtime = binding_of(model).runtime
    runtime.dense_only = True
    try:
        return Batcher(
            model,
            greedy,
            page_tokens=8,
            kv_tokens=kv_tokens,
            max_batch_tokens=max_batch_tokens,
            max_running=max_running,
        )
    finally:
        runtime.dense_only = False


def step(batcher: Batcher) -> tuple[list[Slice], set[str]]:
    parts = batcher.prepare()
    if not parts:
        return [], set()
    batcher.run()
    return parts, batcher.finish()


def test_nothing_has_moved() -> None:
    assert not moved(), f"{MOVED}\n" + "\n".join(moved())


def test_what_has_moved_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def schedule_batch(self: object, budget: int) -> None: ...

    monkeypatch.setattr(tf_scheduler.Scheduler, "schedule_batch", schedule_batch)
    monkeypatch.delattr(ModelRunner, "_sample")
    with pytest.raises(UnsupportedModelError) as error:
        check()
    assert transformers.__version__ in str(error.value)
    assert "Scheduler.schedule_batch(self, budget) instead of (self, token_budget, cache_budget)" in str(error.value)
    assert "ModelRunner._sample() instead of (self, scores, output_ids)" in str(error.value)


def test_our_scheduler_is_the_one_that_is_made(model: PreTrainedModel) -> None:
    batcher = make(model)
    assert type(batcher._scheduler) is batching.ScheduledOnly, MOVED
    assert list(inspect.signature(batcher._scheduler._process_candidates).parameters) == [
        "candidates",
        "token_budget",
        "cache_budget",
        "request_ids_to_remove_from_waiting",
    ], MOVED
    batcher.close()


def test_steps(model: PreTrainedModel) -> None:
    """Decoding first, then prompts in the order of admission, cut at the token budget; pages freed at the end."""
    batcher = make(model)
    assert batcher.free_tokens == batcher.kv_tokens == 64, MOVED
    one, other = prompt(1, 5), prompt(2, 20)
    batcher.add("one", one, 4, ())
    assert step(batcher)[0] == [Slice("one", 0, 5, True)], MOVED
    assert batcher.free_tokens == 64 - 8, MOVED
    batcher.add("other", other, 2, ())
    assert step(batcher)[0] == [Slice("one", 5, 1, True), Slice("other", 0, 15, False)], MOVED
    assert batcher.input_ids(16).tolist()[0][1:] == other[:15], MOVED
    assert step(batcher)[0] == [Slice("one", 6, 1, True), Slice("other", 15, 5, True)], MOVED
    parts, done = step(batcher)
    assert parts == [Slice("one", 7, 1, True), Slice("other", 20, 1, True)], MOVED
    assert done == {"one", "other"}, MOVED
    assert batcher.empty
    assert batcher.free_tokens == 64, MOVED
    batcher.close()


def test_end_tokens_end(model: PreTrainedModel) -> None:
    expected = alone(model, prompt(3, 6), 8, ends=False)
    batcher = make(model)
    batcher.add("a", prompt(3, 6), 8, {expected[0]})
    assert step(batcher) == ([Slice("a", 0, 6, True)], {"a"}), MOVED
    batcher.close()


def test_preemption_takes_pages_and_is_told(model: PreTrainedModel) -> None:
    """Four pages for two requests that need five: the one admitted last goes, and is not taken back by itself."""
    batcher = make(model, kv_tokens=32)
    batcher.add("first", prompt(1, 14), 20, (), (0, 1.0))
    step(batcher)
    batcher.add("last", prompt(2, 14), 20, (), (0, 2.0))
    lost: list[str] = []
    for _ in range(20):
        parts, _ = step(batcher)
        lost += batcher.take_preempted()
        if lost:
            break
    assert lost == ["last"], MOVED
    parts, _ = step(batcher)
    assert [part.id for part in parts] == ["first"], MOVED
    assert batcher.take_preempted() == []
    assert batcher.free_tokens >= 8, MOVED
    batcher.remove("first")
    assert batcher.free_tokens == 32, MOVED
    batcher.close()


def test_a_step_can_be_undone(model: PreTrainedModel) -> None:
    """After a failed forward pass the same step gives the same tokens."""
    asked = {"a": prompt(1, 6), "b": prompt(2, 25), "c": prompt(3, 4)}
    expected = {name: alone(model, each, 5, ends=False) for name, each in asked.items()}
    batcher = make(model, kv_tokens=256)
    found: dict[str, list[int]] = {name: [] for name in asked}
    heads = model.get_output_embeddings()

    def fail(module: object, args: object) -> None:
        raise RuntimeError("in the middle")

    batcher.add("a", asked["a"], 5, ())
    turn = 0
    while not batcher.empty or turn == 0:
        if turn == 1:
            batcher.add("b", asked["b"], 5, ())
            batcher.add("c", asked["c"], 5, ())
        before = batcher.prepare()
        if turn % 2 == 0:
            handle = heads.register_forward_pre_hook(fail)
            with pytest.raises(RuntimeError, match="in the middle"):
                batcher.run()
            handle.remove()
            batcher.undo()
            assert batcher.prepare() == before, MOVED
        batcher.run()
        tokens = batcher._processor.inputs_and_outputs.output_ids[0].tolist()
        batcher.finish()
        for part in before:
            if part.answers:
                found[part.id].append(tokens.pop(0))
        turn += 1
    assert found == expected, MOVED
    assert batcher.free_tokens == 256
    batcher.close()


def test_only_some_run(model: PreTrainedModel) -> None:
    batcher = make(model)
    for name in "abc":
        batcher.add(name, prompt(1, 4), 3, ())
    parts = batcher.prepare({"b"})
    assert [part.id for part in parts] == ["b"]
    batcher.run()
    batcher.finish()
    assert [part.id for part in batcher.prepare()] == ["b", "a", "c"], MOVED
    batcher.run()
    batcher.finish()
    assert [part.id for part in batcher.prepare({"c"})] == ["c"], "of those that have begun, too"
    batcher.undo()
    assert batcher.prepare({"nobody"}) == [] and batcher.take_preempted() == []
    batcher.close()
    assert batcher.empty


def test_who_finds_no_pages_waits_and_takes_none(model: PreTrainedModel) -> None:
    """Also where the step fails: what a new request was given goes back."""
    batcher = make(model, kv_tokens=32)
    batcher.add("first", prompt(1, 20), 8, (), (0, 1.0))
    step(batcher)
    step(batcher)
    batcher.add("large", prompt(2, 20), 4, (), (0, 2.0))
    free = batcher.free_tokens
    assert [part.id for part in batcher.prepare()] == ["first"], MOVED
    batcher.run()
    batcher.finish()
    assert batcher.take_preempted() == [] and batcher.free_tokens == free, MOVED
    batcher.remove("large")
    batcher.add("small", prompt(3, 6), 2, (), (0, 3.0))
    assert [part.id for part in batcher.prepare()] == ["first", "small"], MOVED
    assert batcher.free_tokens < free
    batcher.undo()
    assert batcher.free_tokens == free
    batcher.close()


def test_only_requests_with_a_new_token_are_asked_for_one(model: PreTrainedModel) -> None:
    """And nothing is kept of what transformers would hand out."""
    batcher = make(model)
    asked: list[list[str]] = []

    def sample(logits: torch.Tensor, requests: Sequence[str]) -> list[int]:
        asked.append(list(requests))
        return greedy(logits, requests)

    batcher._sample = sample
    batcher.add("short", prompt(1, 4), 3, ())
    batcher.add("long", prompt(2, 30), 3, ())
    for _ in range(3):
        step(batcher)
        assert batcher._manager.output_router.output_queue.empty(), MOVED
    assert asked == [["short"], ["short"], ["short", "long"]]
    batcher.close()


def test_a_model_that_cannot_be_batched_keeps_its_attention(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**settings: object) -> None:
        raise ValueError("not this one")

    monkeypatch.setattr(model, "init_continuous_batching", refuse)
    model.set_attn_implementation(FEW_ROWS_SDPA)  # continuous batching does not know it: it is put aside first
    with pytest.raises(UnsupportedModelError, match="not this one"):
        make(model)
    assert model.config._attn_implementation == FEW_ROWS_SDPA


def test_memory_is_what_was_asked_for_whatever_transformers_thinks_is_free(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How much KV memory there is has been planned; a guess about free memory must not refuse or change it."""
    for module in ("cache", "utils", "requests"):
        there = getattr(transformers.generation.continuous_batching, module)
        if hasattr(there, "get_device_and_memory_breakdown"):
            monkeypatch.setattr(
                there, "get_device_and_memory_breakdown", lambda: (torch.device("cpu"), 10_000, 9_000, 9_000)
            )
    batcher = make(model, kv_tokens=4096)
    assert batcher.kv_tokens == batcher.free_tokens == 4096, MOVED
    batcher.close()


def test_closing_gives_the_model_back(model: PreTrainedModel) -> None:
    expected = alone(model, prompt(1, 6), 5)
    batcher = make(model)
    assert model.config._attn_implementation == "emoe_paged"
    batcher.add("a", prompt(1, 6), 5, ())
    step(batcher)
    batcher.close()
    assert model.config._attn_implementation == "sdpa"
    assert alone(model, prompt(1, 6), 5) == expected
