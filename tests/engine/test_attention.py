"""Each request of a packed step attends as it would alone: with its own window and sinks, and no scores written out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, PreTrainedModel

import emoe
from emoe.engine import attention, batching
from emoe.engine.attention import IMPLEMENTATION, _mask, packed_attention, places_of
from emoe.engine.batching import Batcher
from emoe.errors import UnsupportedModelError
from emoe.model.attention import SINKS
from emoe.model.bind import binding_of
from emoe.planner import facts_of
from emoe.planner.live_bytes import LiveBytes
from emoe.server.planning import plan_serving
from tests.conftest import Checkpoints
from tests.engine.running import SMALL, alone, engine_of, prompt, send

SLIDING = ("gpt_oss", "gemma4_text", "afmoe")
"""Sinks and windows; windows; windows, and layers without rotary positions."""


class Kept:
    """Chooses the likeliest tokens and keeps the logits, by request."""

    def __init__(self) -> None:
        self.logits: dict[str, list[torch.Tensor]] = {}

    def __call__(self, logits: torch.Tensor, requests: Sequence[str]) -> list[int]:
        for row, request in zip(logits, requests, strict=True):
            self.logits.setdefault(request, []).append(row.clone())
        chosen: list[int] = logits.argmax(-1).tolist()
        return chosen


def make(model: PreTrainedModel, sample: Any, batch_tokens: int, kv_tokens: int = 512) -> Batcher:
    runtime = binding_of(model).runtime
    runtime.dense_only = True
    try:
        return Batcher(model, sample, page_tokens=8, kv_tokens=kv_tokens, max_batch_tokens=batch_tokens, max_running=4)
    finally:
        runtime.dense_only = False


def run(batcher: Batcher) -> None:
    while not batcher.empty:
        batcher.prepare()
        batcher.run()
        batcher.finish()


@pytest.fixture(scope="module", params=SLIDING)
def model(request: pytest.FixtureRequest, checkpoints: Checkpoints) -> Iterator[PreTrainedModel]:
    made, _ = emoe.load(checkpoints(request.param, torch.float32), expert_memory="60%", dtype="float32")
    yield made
    emoe.close(made)


@settings(max_examples=5)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    batch_tokens=st.sampled_from([5, 17, 24, 64, 256]),
    answers=st.integers(1, 20),
)
def test_windows_go_round_in_their_pages(
    model: PreTrainedModel, lengths: list[int], batch_tokens: int, answers: int
) -> None:
    """Prompts and chunks shorter and longer than the window of 16, answers across its edge."""
    kept = Kept()
    batcher = make(model, kept, batch_tokens)
    asked = {str(number): prompt(number + 7, length) for number, length in enumerate(lengths)}
    for name, each in asked.items():
        batcher.add(name, each, answers, ())
    run(batcher)
    batcher.close()
    for name, each in asked.items():
        assert [int(row.argmax()) for row in kept.logits[name]] == alone(model, each, answers, ends=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SLIDING)
def test_a_request_alone_has_the_bits_of_generate(checkpoints: Checkpoints, name: str, dtype: torch.dtype) -> None:
    made, _ = emoe.load(checkpoints(name, dtype), dtype=dtype)
    binding_of(made).runtime.final = None  # nobody announces these steps: every token runs in every layer
    kept = Kept()
    batcher = make(made, kept, 64)
    batcher.add("a", prompt(3, 40), 10, ())
    run(batcher)
    batcher.close()
    cache, tokens = DynamicCache(config=made.config), prompt(3, 40)
    for row in kept.logits["a"]:
        with torch.no_grad():
            expected = made(torch.tensor([tokens]), past_key_values=cache, logits_to_keep=1).logits[0, -1].float()
        assert torch.equal(row, expected)
        tokens = [int(row.argmax())]
    emoe.close(made)


def test_sinks_are_served_as_they_are_generated(checkpoints: Checkpoints) -> None:
    made, _ = emoe.load(checkpoints("gpt_oss"))
    with engine_of(made, SMALL) as engine:
        assert made.config._attn_implementation == IMPLEMENTATION
        assert send(engine, prompt(1, 30), 4)[1].end.reason in ("stop", "length")
    assert made.config._attn_implementation == SINKS
    emoe.close(made)


def test_an_attention_that_was_asked_for_is_transformers(checkpoints: Checkpoints) -> None:
    made, _ = emoe.load(checkpoints("gpt_oss", torch.float32), dtype="float32", attn_implementation="eager")
    expected = alone(made, prompt(1, 30), 4)
    with engine_of(made, SMALL) as engine:
        assert made.config._attn_implementation == "paged|eager"
        answer = send(engine, prompt(1, 30), 4)[1]
        assert answer.end.reason in ("stop", "length")
        assert answer.tokens == expected
    assert made.config._attn_implementation == "eager"
    emoe.close(made)


def test_no_scores_are_held_and_the_plan_counts_none(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step makes is within the plan, and far below what transformers' packed eager attention makes."""
    path, length = checkpoints("gpt_oss", torch.float32, max_position_embeddings=2048), 1500
    peaks = {}
    for kind in ("alone", "packed"):
        made, _ = emoe.load(path, dtype="float32")
        monkeypatch.setattr(batching, "ATTENDS", attention.ATTENDS if kind == "alone" else {})
        batcher = make(made, Kept(), 512, kv_tokens=2048)
        batcher.add("a", prompt(1, length), 1, ())
        with LiveBytes() as live:
            run(batcher)
        batcher.close()
        emoe.close(made)
        peaks[kind] = live.peak
    facts = facts_of(path, dtype="float32")[1]
    assert facts.activations.pair_nbytes == 0
    planned = plan_serving(
        facts, model="m", memory_bytes=None, context=2048, max_running=4, max_batch_tokens=512, page_tokens=8
    )
    scores = 4 * 512 * length * 4  # heads x rows x keys in float32
    assert peaks["alone"] < planned.memory.activation_bytes
    assert peaks["alone"] < scores < peaks["packed"]


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_masks_are_made_once_in_a_step(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """For each request and group of layers that the cache makes, however many layers there are."""
    made, _ = emoe.load(checkpoints(name, torch.float32), dtype="float32")
    layers, batcher = made.config.num_hidden_layers, make(made, Kept(), 24)
    place = places_of(batcher._cache)
    groups = len({place(layer).group for layer in range(layers)})  # gpt-oss: two, of transformers 5.17 three
    seen: list[tuple[int, int, int | None]] = []

    def counted(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
        seen.append((queries, keys, window))
        return _mask(queries, keys, window, device)

    monkeypatch.setattr(attention, "_mask", counted)
    for number in range(3):
        batcher.add(str(number), prompt(number, 40), 3, ())
    steps = 0
    while not batcher.empty:
        requests = len(batcher.prepare())
        batcher.run()
        batcher.finish()
        assert len(seen) == requests * groups
        seen.clear()
        steps += 1
    batcher.close()
    emoe.close(made)
    assert steps > 3 and layers >= groups >= (2 if name == "gpt_oss" else 1)


@pytest.mark.parametrize("name", ["position_bias", "sinks", "attention_mask"])
def test_what_belongs_to_packed_tokens_is_refused(name: str) -> None:
    """A bias of [heads, tokens, keys of all requests] has no rows and columns of one request."""
    given: dict[str, Any] = {"attention_mask": None, name: torch.zeros(1, 2, 3, 3)}
    each = torch.zeros(1, 2, 3, 4)
    with pytest.raises(UnsupportedModelError, match=f"Linear attends with {name}"):
        packed_attention(torch.nn.Linear(1, 1), each, each, each, **given)


@given(past=st.integers(0, 40), queries=st.integers(1, 40), window=st.none() | st.integers(1, 50))
def test_masks_leave_what_a_window_leaves(past: int, queries: int, window: int | None) -> None:
    held = past if window is None else min(past, window - 1)
    mask = _mask(queries, held + queries, window, torch.device("cpu"))
    seen = torch.arange(past, past + queries)[:, None] - torch.arange(past - held, past + queries)[None]
    expected = (seen >= 0) & (seen < (window or past + queries))
    if mask is None:
        assert expected.all() or torch.equal(expected, torch.ones_like(expected).tril())
        assert queries == 1 or held == 0
    else:
        assert torch.equal(mask[0, 0], expected)
